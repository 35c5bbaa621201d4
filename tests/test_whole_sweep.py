"""The whole sweep against other libraries: the same rows, one judge, and no report of what was not trained."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from bench import sweep, whole_sweep
from bench.stored import Stored
from experiments import demo
from sae_jax import metrics, schema
from sae_jax.data import feed, source, store_writer
from sae_jax.errors import UserError
from sae_jax.sharding import make_mesh
from sweeps import grid, ledger
from tests import cells, test_store

TOKENS = 1536


@pytest.mark.parametrize('dtype', ['float16', 'float32'])
def test_numpy_alone_reads_our_batches_bit_for_bit(dtype, tmp_path):
  test_store.write_store(tmp_path, dtype=dtype)
  cell = test_store.cell(tmp_path, **{'data.epochs': 3, 'train.batch_tokens': 8, 'train.tokens': 3 * test_store.TRAIN})
  ours, stored = source.open_source(cell), Stored(str(tmp_path))
  for at, x_BD in enumerate(feed.batches(ours, make_mesh(cell.mesh), 8, 0, cell.train.steps)):
    rows = stored.rows(at * 8, (at + 1) * 8)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, np.asarray(x_BD))
  assert at + 1 == cell.train.steps == 3 * test_store.TRAIN // 8
  np.testing.assert_array_equal(stored.held_out(7, 19), ours.held_out(7, 19))


@pytest.fixture
def exported(trained, tmp_path):
  """A trained cell of ours as another library leaves its own: the cell, its result, what it took, and its weights."""
  store = ledger.Ledger(str(trained))
  entry = next(iter(store.entries()))
  folder = pathlib.Path(store.folder(entry.id))
  params = safetensors.numpy.load_file(folder / schema.ARTIFACT / 'raw.safetensors')
  np.savez(tmp_path / 'weights.npz', **params)
  x_BD = source.open_source(entry.cell).held_out(0, entry.cell.eval.tokens)
  pre_BF = (x_BD - params['b_pre_D']) @ params['w_enc_FD'].T + params['b_enc_F']
  kth_B1 = np.sort(pre_BF, axis=1)[:, -entry.cell.sae.k][:, None]
  x_hat_BD = np.where(pre_BF >= kth_B1, np.maximum(pre_BF, 0), 0) @ params['w_dec_FD'] + params['b_pre_D']
  tokens = entry.cell.train.steps * entry.cell.train.batch_tokens
  took = {'tokens': tokens, 'square_error': float(((x_BD - x_hat_BD) ** 2).sum())}
  result = json.loads((folder / schema.RESULT).read_text())
  return entry.cell, result, took, tmp_path / 'weights.npz'


def test_weights_of_others_are_judged_as_ours_are(exported):
  cell, result, took, weights = exported
  assert whole_sweep.checked('other', took, cell, weights) == took | {'nmse': result['nmse_raw']}


def test_cell_that_did_not_see_all_tokens_is_not_reported(exported):
  cell, _, took, weights = exported
  with pytest.raises(UserError, match=f'other was trained on {took["tokens"] - 1} of {took["tokens"]} tokens'):
    whole_sweep.checked('other', took | {'tokens': took['tokens'] - 1}, cell, weights)


@pytest.mark.parametrize('factor', [1.01, float('nan')])
def test_weights_that_mean_something_else_to_their_library_are_refused(exported, factor):
  cell, _, took, weights = exported
  with pytest.raises(UserError, match='do not mean the same in both'):
    whole_sweep.checked('other', took | {'square_error': factor * took['square_error']}, cell, weights)


@pytest.mark.parametrize('best', [1.25e-4, 1e-3, 8e-3])
def test_rate_is_tuned_until_the_best_is_not_at_an_end(best):
  tried = whole_sweep.tuned(lambda rate: abs(np.log2(rate / best)), (5e-4, 1e-3, 2e-3))
  assert min(tried, key=lambda rate: tried[rate]) == best
  assert min(tried) < best < max(tried)


@pytest.fixture
def commands(monkeypatch):
  """Replaces launches and other libraries by what they leave behind; lists which ran. A rate of 2e-3 is best."""
  ran = []

  def run(module, *flags, python=''):
    given = dict(flag.removeprefix('--').split('=', 1) for flag in flags if '=' in flag)
    if module == 'sweeps.launch':
      ran.append(f'group{given["group"]}')
      ours = ledger.Ledger(given['ledger'])
      ours.register(grid.build(given['sweep']))
      for entry in ours.entries():
        cells.finish(ours.folder(entry.id), entry.cell, nmse_raw=0.5, nmse_ema=0.4, params_digest=entry.id)
      return {'seconds': 100.0 / int(given['group']), 'cpu_s': 1.0, 'peak_bytes': 10**9, 'load_of_others': 0.0}
    todo = json.loads(pathlib.Path(given['cells']).read_text())
    ran.append(f'{given["library"]} {len(todo)}{" together" * ("--together" in flags)}')
    for name, fields in todo.items():
      took = {'seconds': 30.0, 'cpu_s': 2.0, 'start_s': 5.0, 'start_cpu_s': 1.0, 'peak_bytes': 7, 'threads': 2}
      took |= {'load_of_others': 0.25, 'versions': {}, 'fields': fields}
      pathlib.Path(given['out'], f'{name}.json').write_text(json.dumps(took))
    return took

  def judge(label, took, cell, weights):
    rate = took['fields']['rate'] * np.sqrt(cell.sae.n_latents / 2**14)
    return took | {'nmse': 0.8 + abs(np.log2(rate / 2e-3)) + (took['fields']['dead_tokens'] == cell.loss.dead_tokens)}

  monkeypatch.setattr(sweep, 'run', run)
  monkeypatch.setattr(whole_sweep, 'checked', judge)
  return ran


@pytest.fixture
def store(tmp_path):
  """As the demo's, but narrow and of noise."""
  data, rng = demo.get_config().data, np.random.default_rng(0)
  settings = {key: data[key] for key in test_store.SETTINGS if key in data} | {'seed': 0}
  writer = store_writer.StoreWriter(
    str(tmp_path / 'store'), d_model=7, settings=settings, provenance={}, flops_per_token=0.0
  )
  for name, stream in writer.streams.items():
    for block in range(stream.blocks):
      writer.write(name, block, rng.standard_normal((stream.size(block), 7), np.float32))
  writer.finish()
  return str(tmp_path / 'store')


def test_whole_sweep_counts_each_library_once_and_goes_on_where_it_was_cut(commands, store, tmp_path):
  def measured(*libraries):
    return whole_sweep.measure(store, 'python', tmp_path / 'work', TOKENS, 5, libraries)

  row = measured('sparsify', 'dictionary_learning')
  tuning = (
    4 + 2
  )  # 5e-4, 1e-3, 2e-3, and 4e-3 since the best was at the end; then the two ways in which a latent is dead
  one_by_one = ['sparsify 1'] * tuning + ['sparsify 4']
  assert commands == [
    'group4',
    'group1',
    *one_by_one,
    *['dictionary_learning 1 together'] * tuning,
    'dictionary_learning 4 together',
  ]
  assert row['runs']['sparsify']['seconds'] == 5 + 4 * 30 and row['runs']['sparsify']['rate_at_16k'] == 2e-3
  assert row['runs']['sparsify']['dead_tokens'] == 10_000_000
  assert row['nmse_over_ours']['sparsify'] == {'sae_jax raw': [1.6] * 4, 'sae_jax EMA': [2.0] * 4}
  assert '| sparsify | 125 s | 5.00 | 1.25 | 9 s | 0.00 GB | 1.600 (1.600 to 1.600) | 2.000' in whole_sweep.table(row)
  assert 'dead after 10,000,000 tokens. NMSE of the sparsest cell by these tokens: 512 1.8000, 10,000,000 0.8000' in (
    whole_sweep.table(row)
  )
  assert row['runs'][sweep.TOGETHER]['git_commit'] == metrics.git_commit()
  commands.clear()
  for library in ('sparsify', 'dictionary_learning'):
    (cut,) = tmp_path.glob(f'work/*/{library}/cells-*/n1024-k32.json')
    cut.unlink()
  assert measured('sparsify', 'dictionary_learning') == row
  assert commands == ['sparsify 1', 'dictionary_learning 4 together']


def test_whole_sweep_times_again_what_another_version_of_the_code_or_of_a_library_took(
  commands, store, tmp_path, monkeypatch
):
  def measured():
    commands.clear()
    return whole_sweep.measure(store, 'python', tmp_path / 'work', TOKENS, 5, ['sparsify'])

  measured()
  monkeypatch.setattr(metrics, 'git_commit', lambda: 'another')
  assert measured()['runs'][sweep.APART]['git_commit'] == 'another' and commands == ['group4', 'group1']
  monkeypatch.setenv('LD_PRELOAD', '')  # a matrix library may be told something by it
  measured()
  assert commands[:3] == ['group4', 'group1', 'sparsify 1']
  cells_done = tmp_path.glob('work/*/sparsify/cells-*/n1024-k32.json')
  one = max(cells_done, key=lambda path: path.stat().st_mtime_ns)
  one.write_text(json.dumps(json.loads(one.read_text()) | {'versions': {'torch': '0'}}))
  with pytest.raises(UserError, match='of several versions of it; delete that folder'):
    measured()
