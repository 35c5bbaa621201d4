import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import read_ledger, table
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
