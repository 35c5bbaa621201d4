"""Whatever becomes of a file, what is believed is what was written, or one line says which file cannot be believed."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
import pytest

import sae_jax
from analysis import read_ledger, report
from sae_jax import distributed, files, metrics, schema, train, training
from sae_jax.errors import UserError
from sweeps import launch, ledger, retry, status
from tests import cells

LONGEST = 200  # characters of what is said, without the path


@dataclasses.dataclass
class Place:
  """A ledger of two finished cells and one whose first attempt failed, outside of which nothing is touched."""

  path: pathlib.Path
  ids: tuple[str, str, str]

  def file(self, name: str, other: bool = False) -> pathlib.Path:
    """A file of the first finished cell, of the failed one where only that has it, or of the ledger."""
    if name == schema.SWEEP:
      return self.path / name
    at = 2 if name.startswith((schema.FAILURE, schema.CLAIMS)) else int(other)
    return self.path / schema.CELLS / self.ids[at] / name


@pytest.fixture(scope='module')
def pristine(trained, tmp_path_factory):
  """Copied without checkpoints, which have tests of their own."""
  path = tmp_path_factory.mktemp('pristine') / 'ledger'
  shutil.copytree(trained, path, ignore=shutil.ignore_patterns(schema.CHECKPOINTS))
  third = cells.cell(**{'train.seed': 2})
  record = json.loads((path / schema.SWEEP).read_text())
  config = schema.content(json.loads(third.to_json())) | {'schema': 1}
  entry = {'overrides': {'train.seed': 2}, 'config': config}
  cells.edit(str(path / schema.SWEEP), cells=record['cells'] | {third.id: entry})
  folder = cells.write(str(path), third, finished=False)
  metrics.record_failure(folder, ValueError('once'))
  store = ledger.Ledger(str(path))
  with store.claim(third.id):
    pass
  return Place(path, tuple(entry.id for entry in store.entries()))


@pytest.fixture
def place(pristine, tmp_path):
  return Place(shutil.copytree(pristine.path, tmp_path / 'ledger'), pristine.ids)


class Trains(Exception):
  """Training would begin."""


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch):
  def begin(*_):
    raise Trains

  monkeypatch.setattr(training, 'open_source', begin)


def ends(main: Callable, *argv: str) -> tuple[int, str, str]:
  """Exit code and output of a command; any exception but its exit is a failure."""
  out, error = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), pytest.raises(SystemExit) as ended:
    main(list(argv))
  return ended.value.code or 0, out.getvalue(), error.getvalue()


def grid_of(folder: pathlib.Path) -> str:
  (folder / 'trained.py').write_text(
    'from experiments import tiny\nfrom tests import cells\nEXPERIMENT = tiny\n'
    'def sweep(): return [cells.SHARED | {"train.seed": seed} for seed in (0, 1, 2)]\n'
  )
  return str(folder / 'trained.py')


def believed(place: Place, folder: pathlib.Path) -> dict:
  """What every reader says of the ledger and of its first cell, with errors as their one line."""
  argv = f'--ledger={place.path}'
  said = {}
  code, out, error = ends(status.main, argv, '--json')
  said['status'] = (code, json.loads(out) if out else short(error, place.path))
  code, out, error = ends(launch.main, argv, f'--sweep={grid_of(folder)}', '--dry_run', '--flops_per_second=1e9')
  said['launch'] = (code, out or short(error, place.path))
  rows = read_ledger.load_cells(str(place.path)).set_index('id')[['state', 'reason', 'nmse']]
  said['report'] = rows.to_dict('index')
  found = report.analyse(str(place.path), bootstrap=0)
  assert found.cells['state'].tolist() == rows['state'].tolist()
  said['load'], said['train'] = loaded(place), trained_again(place)
  return said


def loaded(place: Place) -> object:
  try:
    sae = sae_jax.load(str(place.file('')))
  except UserError as error:
    return short(str(error), place.path)
  return sae.info, [np.asarray(p).tobytes() for p in jax.tree.leaves(sae.sae.params())]


def trained_again(place: Place) -> str:
  c = cells.cell()
  try:
    return training.train(c, str(place.file('')))
  except Trains:
    return 'trains'
  except UserError as error:
    return short(str(error), place.path)


def short(text: str, path: pathlib.Path) -> str:
  """A message without the path, one line and not long."""
  line = text.strip().replace(str(path), '')
  assert line and '\n' not in line and len(line) <= LONGEST + 20, text  # 'error: ', and a remedy
  return line


def replaced_by_the_other_kind(place: Place, name: str) -> None:
  path = place.file(name)
  if path.is_dir():
    shutil.rmtree(path)
    path.write_bytes(b'x')
  else:
    path.unlink()
    path.mkdir()
    (path / 'x').write_bytes(b'x')


HARMS: dict[str, Callable[[bytes], bytes]] = {
  'emptied': lambda data: b'',
  'cut': lambda data: data[: len(data) // 2],
  'a list': lambda data: b'[1]',
  'brackets': lambda data: b'[' * 100_000,
  'nested': lambda data: b'{"id":' * 900 + b'1' + b'}' * 900,
  'Infinity': lambda data: b'{"step": Infinity}',
  'no digest': lambda data: b'{"step": 1, "id": 3, "wall_s": "x", "tokens": []}',
  'vast': lambda data: b'{"step": 1' + b'0' * 400 + b', "attempts": 1' + b'0' * 400 + b'}',
}
FILES = (
  schema.CONFIG,
  schema.RESULT,
  schema.METRICS,
  schema.FAILURE,
  'sae/sae.json',
  'sae/raw.safetensors',
  'sae/ema.safetensors',
  'claims/1.json',
  schema.SWEEP,
)
FOLDERS = ('', schema.ARTIFACT, schema.CLAIMS)


@pytest.fixture(scope='module')
def truth(pristine, tmp_path_factory):
  folder = tmp_path_factory.mktemp('truth')
  place = Place(shutil.copytree(pristine.path, folder / 'ledger'), pristine.ids)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(training, 'open_source', lambda *_: pytest.fail('a finished cell is not trained'))
    return believed(place, folder)


def check(place: Place, name: str, truth: dict, folder: pathlib.Path) -> dict:
  """What is said after `name` was damaged differs from the truth by naming it, and in nothing else."""
  said = believed(place, folder)
  if name == schema.SWEEP:
    for command in ('status', 'launch'):
      assert said[command] == truth[command] or (said[command][0] == 2 and name in said[command][1])
    return said
  (code, shown), (launch_code, _) = said['status'], said['launch']
  assert code == 0 and launch_code == 0
  damaged = next(cell_id for cell_id in place.ids if f'/{cell_id}' in str(place.file(name)))
  for row, true_row in zip(shown['cells'], truth['status'][1]['cells'], strict=True):
    reported, true = said['report'][row['id']], truth['report'][row['id']]
    assert reported['state'] == row['state'] and reported['reason'] == row['reason']
    assert (len(row['reason']) <= LONGEST and row['reason'].isprintable()) or not row['reason']
    if row['id'] != damaged or row['state'] == schema.DONE:
      assert (row['state'], row.get('nmse')) == (true_row['state'], true_row.get('nmse'))
      assert reported['nmse'] == true['nmse'] or np.isnan(true['nmse'])
    else:
      assert row['state'] in (schema.INVALID, schema.WAITING, schema.RUNNING)
      if row['state'] == schema.INVALID:
        assert row['reason'].startswith((name.split('/')[0], 'the cell is a file'))
  if said['load'] != truth['load']:
    assert 'damaged' in said['load'] or 'no trained autoencoder' in said['load']
  if said['train'] not in ('done', 'trains'):
    assert (name in said['train'] and 'sweeps.retry' in said['train']) or 'holds cell' in said['train']
  first = shown['cells'][0]
  assert (said['train'] == 'done') == (first['state'] == schema.DONE)
  return said


@pytest.mark.parametrize('harm', [*HARMS, 'ten gigabytes', 'the other kind', "another cell's"])
@pytest.mark.parametrize('name', FILES)
def test_damaged_file_is_named_or_changes_nothing(place, truth, tmp_path, name, harm):
  path = place.file(name)
  if harm == 'the other kind':
    replaced_by_the_other_kind(place, name)
  elif harm == 'ten gigabytes':
    os.truncate(path, 10 * 2**30)
  elif harm == "another cell's":
    if name in (schema.SWEEP, schema.FAILURE, 'claims/1.json'):
      pytest.skip('they name no cell')
    shutil.copy(place.file(name, other=True), path)
  else:
    path.write_bytes(HARMS[harm](path.read_bytes()))
  check(place, name, truth, tmp_path)


@pytest.mark.parametrize('name', FOLDERS)
def test_file_in_the_place_of_a_folder_is_named_or_changes_nothing(place, truth, tmp_path, name):
  replaced_by_the_other_kind(place, name)
  if name:
    check(place, name, truth, tmp_path)
    return
  with pytest.raises(UserError):  # there is nothing to load and no place to train in
    sae_jax.load(str(place.file('')))
  (row, *_) = json.loads(ends(status.main, f'--ledger={place.path}', '--json')[1])['cells']
  assert (row['state'], row['reason']) == (schema.INVALID, 'the cell is a file and not a folder')


@pytest.mark.parametrize('name', FILES)
def test_flipped_bit_is_named_or_changes_nothing(place, name):
  """At positions all over the file; looked at by the readers that are cheap."""

  def seen() -> tuple:
    try:
      rows = status.report(ledger.Ledger(str(place.path)), 3)['cells']
    except UserError as error:
      assert name == schema.SWEEP
      return short(str(error), place.path), loaded(place)
    return [(r['state'], r.get('nmse'), r.get('step')) for r in rows], loaded(place)

  path, true = place.file(name), seen()
  weights = json.loads(place.file('sae/sae.json').read_text())['weights']
  data = path.read_bytes()
  noticed = 0
  tensors = name.endswith('.safetensors')
  at = np.linspace(0, len(data) - 1, 6 if tensors else 24).astype(int)
  for i in at.tolist():
    changed = bytearray(data)
    changed[i] ^= 1 << i % 8
    path.write_bytes(changed)
    rows, sae = seen()
    if isinstance(rows, str):
      noticed += 1
      continue
    for now, before in zip(rows, true[0], strict=True):
      assert now == before or now[0] in (schema.INVALID, schema.RUNNING)
    assert sae == true[1] or isinstance(sae, str)
    noticed += (rows, sae) != true
  if name == schema.METRICS:
    assert noticed == 0  # the line is left out, and the report says that the curve has a hole
  elif not tensors or weights in name:
    assert noticed >= len(at) - 3  # white space means nothing


# ----- single faults


@pytest.mark.parametrize('change', [{'k': 12}, {'weights': 'swap'}, {'normalize': 'center_unit'}, {'id': 'x'}])
def test_changed_artifact_info_is_refused(place, change):
  path = place.file('sae/sae.json')
  record = json.loads(path.read_text())
  if change.get('weights'):
    change = {'weights': {'raw': 'ema', 'ema': 'raw'}[record['weights']]}
  path.write_text(json.dumps(record | change))
  assert 'is damaged (sae/sae.json: it' in loaded(place)
  cells.edit(str(path), **change)  # and by whom knows how to seal it
  assert 'is damaged (sae/sae.json: it' in loaded(place)


def test_swapped_weights_are_refused(place):
  raw, ema = (place.file(f'sae/{name}.safetensors') for name in ('raw', 'ema'))
  raw_data, ema_data = raw.read_bytes(), ema.read_bytes()
  raw.write_bytes(ema_data)
  ema.write_bytes(raw_data)
  assert 'safetensors: it does not fit its digest' in loaded(place)


def test_autoencoder_of_another_cell_is_refused(place):
  shutil.rmtree(place.file(schema.ARTIFACT))
  shutil.copytree(place.file(schema.ARTIFACT, other=True), place.file(schema.ARTIFACT))
  assert 'sae/sae.json: it is not the one that result.json was written with' in loaded(place)
  shutil.copy(place.file(schema.RESULT, other=True), place.file(schema.RESULT))  # and with the result of its own
  assert f"it is of cell '{place.ids[1]}'" in loaded(place)


@pytest.mark.parametrize('sealed', [True, False])
def test_changed_digit_of_the_loss_is_noticed(place, sealed):
  """By the digest, and in a result from before digests by the last line of the metrics."""
  path = place.file(schema.RESULT)
  record = json.loads(path.read_text())
  if not sealed:
    record = schema.content(record)
  changed = record | {'nmse': record['nmse'] + 0.01}
  path.write_text(json.dumps(changed))
  (row, *_) = status.report(ledger.Ledger(str(place.path)), 3)['cells']
  assert row['state'] == schema.INVALID
  assert ('digest' if sealed else 'in the last line of metrics.jsonl') in row['reason']
  assert read_ledger.load_ledger(str(place.path))['id'].tolist() == [place.ids[1]]


def test_line_of_a_worker_that_came_too_late_makes_no_result_invalid(place):
  """It lost the cell in its last step and measured on another mesh; the line that the result is from is there too."""
  line = metrics.read_metrics(str(place.file('')), place.ids[0])[-1]
  files.append(
    str(place.file(schema.METRICS)),
    schema.dump_line(line | {'eval/nmse': line['eval/nmse'] + 1e-9}, place.ids[0]),
  )
  assert ledger.Ledger(str(place.path)).states()[0].state == schema.DONE


@pytest.mark.parametrize('gone', [True, False])
def test_cell_without_metrics_is_done(place, gone):
  path = place.file(schema.METRICS)
  path.unlink()
  if not gone:
    path.touch()
  assert ledger.Ledger(str(place.path)).states()[0].state == schema.DONE


def test_launch_says_that_an_invalid_cell_is_not_done(place, tmp_path):
  place.file(schema.RESULT).write_bytes(b'')
  argv = (f'--ledger={place.path}', f'--sweep={grid_of(tmp_path)}', '--workers=0')
  shutil.rmtree(place.file(schema.FAILURE).parent)
  shutil.copytree(place.file(''), place.file(schema.FAILURE).parent)  # now another cell's folder: invalid as well
  code, out, _ = ends(launch.main, *argv)
  assert code == 1 and '1 done' in out and '2 invalid' in out and 'result.json: it is empty' in out
  assert 'python -m sweeps.retry' in out


# ----- the way back


@pytest.mark.parametrize('name', [schema.RESULT, schema.CONFIG, schema.FAILURE])
@pytest.mark.parametrize('harm', ['emptied', 'the other kind'])
def test_retry_moves_a_broken_file_aside(place, name, harm):
  path = place.file(name)
  data = b''
  if harm == 'the other kind':
    replaced_by_the_other_kind(place, name)
  else:
    path.write_bytes(data)
  code, out, _ = ends(retry.main, f'--ledger={place.path}')
  assert code == 0 and f'moved {name} to corrupt/{name}-0 ({name}: ' in out
  assert (path.parent / 'corrupt' / f'{name}-0').exists()
  at = 2 if name == schema.FAILURE else 0
  states = ledger.Ledger(str(place.path)).states()
  assert states[at].state == (schema.DONE if name == schema.CONFIG else schema.WAITING)
  assert not states[at].attempts
  if name == schema.CONFIG:
    assert json.loads(path.read_text())['id'] == place.ids[0]
  path.unlink(missing_ok=True)
  path.write_bytes(b'[]')  # and again
  retry.retry(ledger.Ledger(str(place.path)), [place.ids[at]])
  assert (path.parent / 'corrupt' / f'{name}-1').read_bytes() == b'[]'


def test_retry_of_a_named_cell_sets_a_damaged_autoencoder_aside_with_its_result(place):
  store = ledger.Ledger(str(place.path))
  with pytest.raises(UserError, match='is done, with no failure to clear'):
    retry.retry(store, [place.ids[0]])
  path = place.file('sae/ema.safetensors')
  path.write_bytes(path.read_bytes()[:-1] + b'\x7f')
  (one,) = retry.retry(store, [place.ids[0]])
  assert one.moved == ((schema.RESULT, 'corrupt/result.json-0'), (schema.ARTIFACT, 'corrupt/sae-0'))
  assert one.reason == 'sae/ema.safetensors: it does not fit its digest: it was changed'
  assert trained_again(place) == 'trains'


def test_refused_training_charges_no_attempt(place, capsys, monkeypatch):
  """Else the cell would have failed for good once its broken file is gone."""
  monkeypatch.setattr(distributed, 'initialize', lambda: None)
  monkeypatch.setattr(train, 'resolve', lambda _: cells.cell())
  place.file(schema.RESULT).write_bytes(b'')
  code, _, error = ends(train.main, '--config=experiments/tiny.py', f'--workdir={place.file("")}')
  assert code == 2 and f'{place.file(schema.RESULT)}: it is empty; move it aside' in error
  assert not place.file('').joinpath(schema.FAILURE).exists()
