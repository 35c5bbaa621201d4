import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import table
from sae_jax import cell as cells_schema
from sae_jax import files, metrics, schema
from sae_jax.errors import UserError
from tests import cells


def cell(n=64, k=3, learning_rate=1e-3, seed=0):
  return cells.cell(
    **{
      'sae.n_latents': n,
      'sae.k': k,
      'sae.d_model': 13,
      'sae.k_aux': 0,
      'train.batch_tokens': 11,
      'train.tokens': 1100,
      'optim.learning_rate': learning_rate,
      'recipe.learning_rate_at_16k': learning_rate,
      'train.seed': seed,
    }
  )


def result_of(ledger, c):
  return files.join(ledger, 'cells', c.id, schema.RESULT)


def test_load_ledger_keeps_finished_cells_only(tmp_path):
  ledger = str(tmp_path)
  a, b, c = cell(), cell(seed=1), cell(seed=2)
  cells.write(ledger, a, nmse=0.4, flops_useful=7.0)
  cells.write(ledger, b, finished=False)
  failed = cells.write(ledger, c, finished=False)
  metrics.record_failure(failed, UserError('out of memory'))
  done = table.load_ledger(ledger)
  assert done['id'].tolist() == [a.id]
  assert done['nmse'].tolist() == [0.4] and done['flops_useful'].tolist() == [7.0]
  assert {o['id']: o['state'] for o in done.attrs['not_done']} == {b.id: 'waiting', c.id: 'failed'}
  every = table.load_cells(ledger).set_index('id')
  assert every.loc[c.id, 'reason'] == 'UserError: out of memory (1 attempts)'
  assert pd.isna(every.loc[b.id, 'nmse'])  # missing, not 0
  assert [w['code'] for w in done.attrs['warnings']] == ['cells_missing']


@pytest.mark.parametrize(
  'changes',
  [
    {'nmse': None},
    {'nmse': 'low'},
    {'nmse': 0.0},
    {'n_latents': True},
    {'id': 'other'},
    {'flops_useful': -1.0},
    {'n_latents': 65},  # of another size than its configuration
  ],
)
def test_load_cells_refuses_a_result_it_cannot_believe(tmp_path, changes):
  cells.write(str(tmp_path), cell(), **changes)
  assert table.load_cells(str(tmp_path))['state'].tolist() == ['invalid']
  assert table.load_ledger(str(tmp_path)).empty


@settings(max_examples=30, deadline=None)
@given(
  st.binary(max_size=40)
  | st.recursive(st.none() | st.floats() | st.text(max_size=5), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_load_cells_survives_any_file(data):
  ledger = 'memory://fuzz'
  folder = cells.write(ledger, cell(), {1: 0.5})
  for name in ('result.json', 'config.json', 'metrics.jsonl'):
    files.replace(files.join(folder, name), data)
  assert table.load_cells(ledger)['state'].tolist() == ['invalid']
  assert table.load_curves(ledger).empty


@pytest.mark.parametrize('data', [b'{"error": "\\ud800"}', b'{"error": "\xed\xa0\x80"}'])
def test_load_cells_lets_no_text_in_that_cannot_be_written(tmp_path, data):
  folder = cells.write(str(tmp_path), cell(), finished=False)
  files.replace(files.join(folder, 'failure.json'), data)
  (row,) = table.load_cells(str(tmp_path)).to_dict('records')
  assert row['state'] == 'invalid' and row['reason'].encode().startswith(b'failure.json: its text is not UTF-8')


def test_load_ledger_says_where_none_is(tmp_path):
  with pytest.raises(UserError, match='no ledger'):
    table.load_ledger(str(tmp_path / 'nothing'))


def test_load_curves_takes_the_later_line_and_drops_a_torn_one(tmp_path):
  lines = [{'step': s, 'tokens': 11 * s, 'flops_useful': 5.0 * s, 'eval/nmse': 1.0 / s} for s in (1, 2, 3)]
  again = {'step': 2, 'tokens': 22, 'flops_useful': 10.0, 'eval/nmse': 0.7}
  folder = cells.write(str(tmp_path), cell(), [*lines, again])
  with open(files.join(folder, 'metrics.jsonl'), 'a') as f:
    f.write('{"step": 4, "eval/nm')
  curves = table.load_curves(str(tmp_path))
  assert curves['step'].tolist() == [1, 2, 3]
  assert curves['nmse'].tolist() == [1.0, 0.7, 1 / 3]
  assert curves['l0'].isna().all()  # never written, so missing
  assert curves['n_latents'].tolist() == [64] * 3 and set(curves['state']) == {'done'}


def test_load_curves_names_finished_cells_with_holes(tmp_path):
  """A power cut, or lines that were changed: the cell is done and the curve is not what was planned."""
  planned = sorted(cells_schema.log_spaced(100, cell().eval.per_decade))
  whole, torn, bare = cell(), cell(seed=1), cell(seed=2)
  cells.write(str(tmp_path), whole, dict.fromkeys([*planned, 41], 0.5))
  cells.write(str(tmp_path), torn, dict.fromkeys(planned[3:], 0.5))
  cells.write(str(tmp_path), bare)
  cells.write(str(tmp_path), cell(seed=3), {1: 0.5}, finished=False)  # goes on
  (found,) = table.load_curves(str(tmp_path)).attrs['warnings']
  assert found['code'] == 'holes' and whole.id not in found['message']
  assert f'{torn.id} (3 of {len(planned)})' in found['message']
  assert f'{bare.id} ({len(planned)} of {len(planned)})' in found['message']
  assert found['message'].startswith(f'{3 + len(planned)} planned evaluations are missing from the curves of 2 ')
  changed = files.join(str(tmp_path), 'cells', whole.id, schema.METRICS)
  files.replace(changed, files.read(changed).replace(b'"tokens": 11,', b'"tokens": 12,'))
  (found,) = table.load_curves(str(tmp_path)).attrs['warnings']
  assert f'{whole.id} (1 of {len(planned)})' in found['message']


def test_load_curves_merges_attempts_of_an_object_store():
  ledger = 'memory://attempts'
  folder = cells.write(ledger, cell())
  for attempt, loss in (('0009', 0.9), ('0010', 0.8)):
    line = schema.dump_line({'step': 5, 'eval/nmse': loss}, cell().id)
    files.replace(files.join(folder, f'metrics.{attempt}.jsonl'), line)
  assert table.load_curves(ledger)['nmse'].tolist() == [0.8]


def test_best_learning_rate_keeps_the_seeds_of_the_best_mean(tmp_path):
  losses = {
    1e-3: (0.50, 0.60),
    2e-3: (0.52, 0.53),
    4e-3: (0.70, 0.40),  # the lowest single loss is not the lowest mean
  }
  for rate, pair in losses.items():
    for seed, nmse in enumerate(pair):
      cells.write(str(tmp_path), cell(learning_rate=rate, seed=seed), nmse=nmse)
  best = table.best_learning_rate(table.load_ledger(str(tmp_path)))
  assert sorted(best['nmse']) == [0.52, 0.53]
  assert best.attrs['warnings'] == []


def test_best_learning_rate_warns_at_the_edge_of_each_setting(tmp_path):
  for n in (64, 128):
    for i, rate in enumerate((1e-3, 2e-3, 4e-3)):
      nmse = 0.5 + (0.1 * i if n == 64 else 0.1 * abs(i - 1))
      cells.write(str(tmp_path), cell(n=n, learning_rate=rate), nmse=nmse)
  best = table.best_learning_rate(table.load_ledger(str(tmp_path)))
  assert best.set_index('n_latents')['learning_rate'].to_dict() == {64: 1e-3, 128: 2e-3}
  (found,) = best.attrs['warnings']
  assert found['code'] == 'edge_minimum' and 'n=64' in found['message'] and 'n=128' not in found['message']


def test_load_ledger_warns_of_mixed_versions(tmp_path):
  cells.write(str(tmp_path), cell())
  cells.write(str(tmp_path), cell(n=128))
  assert table.load_ledger(str(tmp_path)).attrs['warnings'] == []
  cells.write(str(tmp_path), cell(n=256), versions={'jax': '2'})
  assert [w['code'] for w in table.load_ledger(str(tmp_path)).attrs['warnings']] == ['mixed_versions']


def test_matching_compares():
  frame = pd.DataFrame({'n': [1, 2, 3], 'eval/x': [0.1, np.nan, 0.3]})
  assert table.matching(frame, 'n>=2').tolist() == [False, True, True]
  assert table.matching(frame, ' eval/x < 2e-1 ').tolist() == [True, False, False]
  assert table.matching(frame.rename(columns={'n': 'n, all (2024)'}), '"n, all (2024)" >= 2').tolist() == [
    False,
    True,
    True,
  ]
  assert table.matching(frame, 'n != 2').tolist() == [True, False, True]


@settings(max_examples=60, deadline=None)
@given(
  st.text(max_size=20)
  | st.sampled_from(['n>1 or n<0', '__import__("os")>1', 'n>nan', 'n>1e', 'm>1', 'n=>1', 'n>1_', '>1'])
)
def test_matching_refuses_what_is_not_one_comparison(rule):
  with pytest.raises(UserError):
    table.matching(pd.DataFrame({'n': [1, 2]}), rule)


@pytest.mark.parametrize(
  ('values', 'words'),
  [
    (['1', 'many'], "'many' in row 2"),
    ([1.0, 0.0], 'row 2'),
    ([np.nan, 1.0], 'row 1'),
    ([1.0, np.inf], 'row 2'),
    ([True, True], 'row 1'),
  ],
)
def test_positive_names_the_row_it_refuses(values, words):
  with pytest.raises(UserError, match=words):
    table.positive(pd.DataFrame({'n': values}), ['n'])


@pytest.mark.parametrize('content', [b'', b'a,b\n', b'\xff\xfe\x00\x80', b'"a\n1'])
def test_read_csv_refuses_what_is_no_table(tmp_path, content):
  (tmp_path / 'x.csv').write_bytes(content)
  with pytest.raises(UserError, match=r'x\.csv'):
    table.read_csv(str(tmp_path / 'x.csv'))
