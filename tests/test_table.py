import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import every_law, learning_rate, plots, read_ledger, seeds, setting, table
from sae_jax.errors import UserError
from tests import cells
from tests.test_read_ledger import cell


def test_best_learning_rate_keeps_the_seeds_of_the_best_mean(tmp_path):
  losses = {
    1e-3: (0.50, 0.60),
    2e-3: (0.52, 0.53),
    4e-3: (0.70, 0.40),  # the lowest single loss is not the lowest mean
  }
  for rate, pair in losses.items():
    for seed, nmse in enumerate(pair):
      cells.write(str(tmp_path), cell(learning_rate=rate, seed=seed), nmse=nmse)
  best = table.best_learning_rate(read_ledger.load_ledger(str(tmp_path)))
  assert sorted(best['nmse']) == [0.52, 0.53]
  assert best.attrs['warnings'] == []


def test_best_learning_rate_warns_at_the_edge_of_each_setting(tmp_path):
  for n in (64, 128):
    for i, rate in enumerate((1e-3, 2e-3, 4e-3)):
      nmse = 0.5 + (0.1 * i if n == 64 else 0.1 * abs(i - 1))
      cells.write(str(tmp_path), cell(n=n, learning_rate=rate), nmse=nmse)
  best = table.best_learning_rate(read_ledger.load_ledger(str(tmp_path)))
  assert best.set_index('n_latents')['learning_rate'].to_dict() == {64: 1e-3, 128: 2e-3}
  (found,) = best.attrs['warnings']
  assert found['code'] == 'edge_minimum' and 'n=64' in found['message'] and 'n=128' not in found['message']


def ended(seen, asked=105, rates=(1e-3, 2e-3, 4e-3), **columns):
  """Three learning rates of one setting and budget in batches of ten tokens, which saw so many before they ended."""
  sizes = {'n_latents': 64, 'k': 3, 'batch_tokens': 10, 'setting': str(asked)}
  losses = {'learning_rate': rates, 'seed': 0, 'nmse': [0.5, 0.4, 0.45], 'tokens': seen, 'tokens_asked': asked}
  return pd.DataFrame(sizes | losses | columns)


def both(*frames):
  return pd.concat(frames, ignore_index=True)


def test_cells_that_ended_at_different_steps_are_one_setting():
  cells = both(ended([60, 80, 100]), ended([60, 70, 80], asked=205))
  best = table.best_learning_rate(cells)
  assert best[['nmse', 'tokens']].to_numpy().tolist() == [[0.4, 80], [0.4, 70]]  # and tokens are those seen
  found = learning_rate.valleys(cells)
  assert found[['tokens', 'rates', 'verdict']].to_numpy().tolist() == [[100, 3, 'minimum'], [200, 3, 'minimum']]
  drawn = [line.get_xdata() for line in plots.learning_rates(cells).axes[0].lines]
  assert sum(len(x) == 3 and np.allclose(sorted(x), [1e-3, 2e-3, 4e-3]) for x in drawn) == 2


def test_cells_that_saw_their_budget_belong_together_as_their_tokens_do():
  """Budgets that differ in a partial batch are one, and a table may not say what was asked for."""
  one = ended(100, tokens_asked=[100, 105, 109], setting='a')
  assert len(setting.keys(one).drop_duplicates()) == 1
  assert setting.keys(one)['tokens'].tolist() == [100] * 3
  for unsaid in ('tokens_asked', 'batch_tokens'):
    cells = ended([60, 80, 80], setting='a').drop(columns=unsaid)
    assert setting.keys(cells)['tokens'].tolist() == [60, 80, 80]
  partly = ended([60, 80, 80], tokens_asked=[105, np.nan, 105])
  assert setting.keys(partly)['tokens'].tolist() == [100, 80, 100]


def test_the_longest_runs_keep_all_seeds_of_their_setting():
  alike = {'rates': 2e-3, 'seed': [0, 1, 2]}
  cells = both(ended([60, 80, 90], **alike), ended([90, 120, 100], asked=205, **alike))
  kept = setting.longest(cells)
  assert kept['tokens'].tolist() == [90, 120, 100] and setting.longest_run(cells).tolist() == [90] * 3 + [120] * 3
  repeats = seeds.replicates(kept, ['n_latents', 'k'])
  assert repeats is not None and repeats.tolist() == [0] * 3
  # One that was not to end at convergence saw more, and is another setting.
  whole = ended(200, asked=205, setting='whole', **alike)
  assert setting.longest(both(cells, whole))['setting'].tolist() == ['whole'] * 3


def test_seeds_that_converge_at_different_tokens_ask_for_no_law_of_tokens(tmp_path):
  for n in (64, 128):
    for seed in (0, 1):
      one = {'recipe.horizon': 'so far', 'optim.ema_decay': None, 'loss.dead_tokens': None, 'train.stop_gain': 0.01}
      asked = cells.cell(**one | {'sae.n_latents': n, 'train.seed': seed})
      cells.write(str(tmp_path), asked, nmse=0.5 + n / 1000, tokens=400 + 40 * seed, steps=10 + seed)
  found = every_law.analyse(str(tmp_path), bootstrap=0)
  assert 'L(n,T), latents against tokens: one token budget a size' in found.not_attempted


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
