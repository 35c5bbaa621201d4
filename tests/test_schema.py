"""Records say what they are, and a record that was changed, cut or swapped is not believed."""

import json

import hypothesis
import hypothesis.strategies as st
import pytest

from sae_jax import cell_state, files, lease, metrics, product, schema
from sae_jax.errors import UserError
from tests import cells

RESULT = schema.dump(cells.result(cells.cell()))


def believed(data: bytes) -> dict:
  record = schema.parse(data)
  schema.check(record, schema.RESULTS)
  return schema.content(record)


@hypothesis.given(st.integers(0, len(RESULT) - 1), st.integers(1, 255))
@hypothesis.settings(max_examples=200, deadline=None)
def test_changed_byte_changes_nothing_that_is_believed(at, difference):
  data = bytearray(RESULT)
  data[at] ^= difference
  try:
    assert believed(bytes(data)) == believed(RESULT)  # white space, say
  except schema.Broken as error:
    assert len(str(error)) <= 200 and '\n' not in str(error)


@pytest.mark.parametrize(
  ('data', 'why'),
  [
    (b'', 'it is empty'),
    (b' \n', 'it is empty'),
    (b'[1]', 'not a JSON object but a list'),
    (RESULT[:-30], 'not JSON'),
    (b'[' * 100_000, 'nested too deeply'),
    (b'{"a":' * 100_000, 'nested too deeply'),
    (b'{"step": Infinity}', 'Infinity is not a finite number'),
    (b'{"step": 1e999}', '1e999 is not a finite number'),
    (b'{"step": NaN}', 'NaN is not a finite number'),
    (b'{"error": "\\ud800"}', 'not UTF-8'),
    (b'{"error": "\xed\xa0\x80"}', 'not UTF-8'),
    (b'{"n": ' + b'1' * 5000 + b'}', 'not JSON'),
    (b'"' + b'x' * 2**22 + b'"', 'bytes, more than'),
  ],
)
def test_what_is_no_record_says_why(data, why):
  with pytest.raises(schema.Broken, match=why):
    schema.parse(data)


@pytest.mark.parametrize('field', schema.RESULTS, ids=lambda field: field.name)
def test_result_needs_every_field_in_its_type(field):
  whole = cells.result(cells.cell())
  wrong = ['x' if field.kind is not str else 3, [] if field.kind is not list else {}]
  for value in wrong + ([] if field.may else [None]):
    with pytest.raises(schema.Broken, match=field.name):
      believed(schema.dump(whole | {field.name: value}))


def test_record_of_a_later_version_is_refused_and_of_an_earlier_one_is_read():
  whole = cells.result(cells.cell())
  later = json.loads(schema.dump(whole | {'schema': schema.SCHEMA + 1}))
  with pytest.raises(schema.Broken, match=f'its schema is {schema.SCHEMA + 1} and this version knows up to'):
    believed(json.dumps(later).encode())
  kept = {field.name for field in schema.RESULTS if field.must} | {'id'}
  earlier = {name: value for name, value in whole.items() if name in kept}
  assert believed(json.dumps(earlier).encode()) == earlier
  assert not schema.verified(earlier) and schema.verified(json.loads(RESULT))


def test_line_of_another_cell_is_passed_over(tmp_path):
  metrics.MetricsFile(str(tmp_path), 'a').write(1, {'eval/nmse': 0.5})
  metrics.MetricsFile(str(tmp_path), 'b').write(2, {'eval/nmse': 0.4})
  assert metrics.read_metrics(str(tmp_path), 'a') == [{'step': 1, 'eval/nmse': 0.5}]
  assert metrics.read_metrics(str(tmp_path), 'b') == [{'step': 2, 'eval/nmse': 0.4}]


def test_incomplete_result_is_never_committed(tmp_path):
  incomplete = cells.result(cells.cell())
  del incomplete['l0']
  with pytest.raises(schema.Broken, match='l0 is missing'):
    metrics.commit_result(str(tmp_path), incomplete)
  assert files.listdir(str(tmp_path)) == []


# ----- the one vocabulary of states


def read(folder):
  return cell_state.read(folder, cells.cell().id)


def test_states_of_a_folder_without_a_ledger(tmp_path):
  folder = cells.write(str(tmp_path), cells.cell(), finished=False)
  assert read(folder).state == schema.WAITING and read(str(tmp_path / 'nowhere')).state == schema.WAITING
  metrics.record_failure(folder, ValueError('once'))
  assert read(folder).state == schema.WAITING and 'attempt 1 of 3 failed: ValueError: once' in read(folder).reason
  metrics.record_failure(folder, UserError('bad value'))
  assert read(folder).state == schema.FAILED and read(folder).attempts == 2
  held = lease.Lease(folder, 1, refresh_s=30, stale_s=90, clock=lambda: 0.0)
  held.acquire()
  assert read(folder).state == schema.RUNNING
  held.release()
  files.replace(files.join(folder, schema.CANCEL), b'{}')
  assert read(folder).state == schema.CANCELLED
  cells.finish(folder, cells.cell())
  assert read(folder).state == schema.DONE and read(folder).result == cells.result(cells.cell())


def test_imported_autoencoder_has_no_training_record_and_is_nobodys_work(tmp_path):
  folder = files.join(str(tmp_path), 'imported')
  info = {
    'id': 'x',
    'n_latents': 5,
    'k': 2,
    'd_model': 3,
    'activation': 'topk',
    'weights': 'raw',
    'subject': 's',
  }
  info |= {'site': 't', 'normalize': 'none', 'identity': '', 'sha256': {}}
  path = files.join(folder, schema.ARTIFACT, schema.ARTIFACT_INFO)
  files.replace(path, schema.dump(info))
  assert cell_state.read(folder, 'imported').state == schema.WAITING  # a crash between sae/ and result.json
  files.replace(path, schema.dump(info | {'imported_from': 'saelens'}))
  assert cell_state.read(folder, 'imported').state == schema.IMPORTED
  assert schema.IMPORTED not in schema.UNFINISHED
  # Early versions listed here the files of the activations that a cell of theirs was trained on.
  files.replace(path, schema.dump(info | {'imported_from': ['acts.npy']}))
  assert cell_state.read(folder, 'imported').state == schema.WAITING
  assert product.check(folder)


def test_reason_is_one_short_line(tmp_path):
  folder = cells.write(str(tmp_path), cells.cell(), finished=False)
  metrics.record_failure(folder, ValueError('x' * 3000 + '\n\x1b[2J'), permanent=True)
  reason = read(folder).reason
  assert len(reason) <= 200 and reason.isprintable() and reason.endswith('(1 attempts)')
