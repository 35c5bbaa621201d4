import json

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import learning_rate, read_ledger, seeds, table
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
  done = read_ledger.load_ledger(ledger)
  assert done['id'].tolist() == [a.id]
  assert done['nmse'].tolist() == [0.4] and done['flops_useful'].tolist() == [7.0]
  assert {o['id']: o['state'] for o in done.attrs['not_done']} == {b.id: 'waiting', c.id: 'failed'}
  every = read_ledger.load_cells(ledger).set_index('id')
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
  assert read_ledger.load_cells(str(tmp_path))['state'].tolist() == ['invalid']
  assert read_ledger.load_ledger(str(tmp_path)).empty


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
  assert read_ledger.load_cells(ledger)['state'].tolist() == ['invalid']
  assert read_ledger.load_curves(ledger).empty


@pytest.mark.parametrize('data', [b'{"error": "\\ud800"}', b'{"error": "\xed\xa0\x80"}'])
def test_load_cells_lets_no_text_in_that_cannot_be_written(tmp_path, data):
  folder = cells.write(str(tmp_path), cell(), finished=False)
  files.replace(files.join(folder, 'failure.json'), data)
  (row,) = read_ledger.load_cells(str(tmp_path)).to_dict('records')
  assert row['state'] == 'invalid' and row['reason'].encode().startswith(b'failure.json: its text is not UTF-8')


def test_load_ledger_says_where_none_is(tmp_path):
  with pytest.raises(UserError, match='no ledger'):
    read_ledger.load_ledger(str(tmp_path / 'nothing'))


def test_load_curves_takes_the_later_line_and_drops_a_torn_one(tmp_path):
  lines = [{'step': s, 'tokens': 11 * s, 'flops_useful': 5.0 * s, 'eval/nmse': 1.0 / s} for s in (1, 2, 3)]
  again = {'step': 2, 'tokens': 22, 'flops_useful': 10.0, 'eval/nmse': 0.7}
  folder = cells.write(str(tmp_path), cell(), [*lines, again])
  with open(files.join(folder, 'metrics.jsonl'), 'a') as f:
    f.write('{"step": 4, "eval/nm')
  curves = read_ledger.load_curves(str(tmp_path))
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
  (found,) = read_ledger.load_curves(str(tmp_path)).attrs['warnings']
  assert found['code'] == 'holes' and whole.id not in found['message']
  assert f'{torn.id} (3 of {len(planned)})' in found['message']
  assert f'{bare.id} ({len(planned)} of {len(planned)})' in found['message']
  assert found['message'].startswith(f'{3 + len(planned)} planned evaluations are missing from the curves of 2 ')
  changed = files.join(str(tmp_path), 'cells', whole.id, schema.METRICS)
  files.replace(changed, files.read(changed).replace(b'"tokens": 11,', b'"tokens": 12,'))
  (found,) = read_ledger.load_curves(str(tmp_path)).attrs['warnings']
  assert f'{whole.id} (1 of {len(planned)})' in found['message']


def test_load_curves_merges_attempts_of_an_object_store():
  ledger = 'memory://attempts'
  folder = cells.write(ledger, cell())
  for attempt, loss in (('0009', 0.9), ('0010', 0.8)):
    line = schema.dump_line({'step': 5, 'eval/nmse': loss}, cell().id)
    files.replace(files.join(folder, f'metrics.{attempt}.jsonl'), line)
  assert read_ledger.load_curves(ledger)['nmse'].tolist() == [0.8]


def test_load_ledger_warns_of_mixed_versions(tmp_path):
  cells.write(str(tmp_path), cell())
  cells.write(str(tmp_path), cell(n=128))
  assert read_ledger.load_ledger(str(tmp_path)).attrs['warnings'] == []
  cells.write(str(tmp_path), cell(n=256), versions={'jax': '2'})
  assert [w['code'] for w in read_ledger.load_ledger(str(tmp_path)).attrs['warnings']] == ['mixed_versions']


def test_a_cell_without_a_k_is_done_and_says_its_coefficient(tmp_path):
  cells.write(str(tmp_path), cell(k=3), {100: 0.25})
  penalised = cells.cell(**{'sae.activation': 'relu', 'sae.k': None, 'loss.sparsity': 0.05})
  cells.write(str(tmp_path), penalised, {20: 0.25}, l0=9.5)
  waiting = cells.cell(**{'sae.activation': 'relu', 'sae.k': None, 'loss.sparsity': 0.1})
  cells.write(str(tmp_path), waiting, {5: 0.5}, finished=False)
  done = read_ledger.load_ledger(str(tmp_path)).set_index('id')
  assert len(done) == 2 and done.attrs['not_done'][0]['state'] == 'waiting'
  found = done.loc[penalised.id, ['activation', 'sparsity', 'l0', 'target']].tolist()
  assert found == ['relu', 0.05, 9.5, 'sparsity=0.05']
  (other,) = done.index.difference([penalised.id])
  assert done.loc[other, ['activation', 'k', 'target']].tolist() == ['topk', 3, 'k=3']
  assert done.index[done['k'].isna()].tolist() == [penalised.id] and done.index[done['sparsity'].isna()].tolist() == [
    other
  ]
  curves = read_ledger.load_curves(str(tmp_path)).set_index('id')
  assert curves.loc[[penalised.id, waiting.id], 'sparsity'].tolist() == [0.05, 0.1]
  assert curves['activation'].value_counts().to_dict() == {'relu': 2, 'topk': 1}


def test_what_a_cell_extends_and_where_it_ran_is_no_part_of_its_setting(tmp_path):
  rates = ((1e-3, 0, 0.5), (2e-3, 0, 0.4), (2e-3, 1, 0.42))
  for i, (rate, seed, nmse) in enumerate(rates):
    elsewhere = {
      'train.extends': f'{i:012x}',
      'train.checkpoint_every': 5 + i,
      'mesh.row_chunks': 2**i,
      'data.path': f'store-{i}',
    }
    one = cells.cell(**elsewhere | {'optim.learning_rate': rate, 'train.seed': seed})
    cells.write(str(tmp_path), one, nmse=nmse)
  done = read_ledger.load_ledger(str(tmp_path))
  assert done['setting'].nunique() == 1 and learning_rate.valleys(done)['rates'].tolist() == [2]
  best = table.best_learning_rate(done)
  assert sorted(best['nmse']) == [0.4, 0.42]
  repeats = seeds.replicates(best, ['n_latents'])
  assert repeats is not None and repeats.tolist() == [0, 0]
  cells.write(str(tmp_path), cells.cell(**{'optim.learning_rate': 1e-3, 'optim.clip_norm': 2.0}))
  assert read_ledger.load_ledger(str(tmp_path))['setting'].nunique() == 2
