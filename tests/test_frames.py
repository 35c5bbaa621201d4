"""What pandas would answer where it should ask is refused: one line with the value, the rule and the remedy."""

import numpy as np
import pandas as pd
import pytest

from analysis import fit, frames, isoflop, laws, table
from analysis.compare import Comparison
from sae_jax.errors import UserError

N = np.array([100, 200, 400, 800, 1600, 3200])


def points(**change):
  return pd.DataFrame({'id': list('abcdef'), 'n_latents': N, 'nmse': 0.1 + 4 * N**-0.5}).assign(**change)


def power(frame, **more):
  return fit.fit_law(frame, 'power', **({'bootstrap': 0} | more))


@pytest.mark.parametrize(
  ('frame', 'words'),
  [
    (points(n_latents=pd.date_range('2024', periods=6)), r'n_latents holds datetime64.*no plain numbers'),
    (points(n_latents=pd.to_timedelta(N, 's')), 'n_latents holds timedelta64'),
    (points(nmse=(0.1 + 4 * N**-0.5) * (1 + 0j)), 'nmse holds complex128'),
    (points(nmse=pd.Series([1j, *[0.5] * 5], dtype=object)), 'nmse=1j in row 1 is not a number'),
    (pd.concat([points(), points()[['nmse']]], axis=1), "two columns 'nmse'"),
    (
      points(no_better_than_mean=[2, 0, 0, 0, 0, 0]),
      'no_better_than_mean=2 in row 1 is neither true nor false',
    ),
    (points().rename(columns={'n_latents': 'n_latent'}), r'did you mean n_latent\?'),
    (points().to_dict('list'), 'table=dict of 3 is not a table'),
  ],
)
def test_columns_that_are_no_numbers_are_refused(frame, words):
  with pytest.raises(UserError, match=words):
    power(frame)


def test_a_law_is_named_and_the_nearest_is_offered():
  with pytest.raises(UserError, match=r"law 'joint' is not known; use one of .*did you mean joint_nk\?"):
    laws.named('joint')


def test_x_and_y_are_different_columns():
  for x, y in ((['n_latents'], 'n_latents'), (['n_latents', 'n_latents'], 'nmse')):
    with pytest.raises(UserError, match=r'names a column twice'):
      power(points(), x=x, y=y)
  with pytest.raises(UserError, match='names a column twice'):
    fit.fit_law(points(), 'additive2', ['n_latents', 'n_latents'], bootstrap=0)


def test_a_row_that_a_holdout_says_nothing_of_is_named():
  frame = points(tokens=[1, 2, 3, 4, 5, np.nan])
  assert table.matching(frame, 'tokens!=1').tolist() == [False, True, True, True, True, False]
  with pytest.raises(UserError, match=r"'tokens>4' says nothing of row 6"):
    power(frame, holdout='tokens>4')


def test_rows_of_a_run_without_a_name_are_not_dropped_in_silence():
  curves = pd.concat([points(id=i, flops_useful=10.0 * N) for i in ('a', None)])
  with pytest.raises(UserError, match='id is missing in 6 rows, first in row 7'):
    table.finished_runs(curves, 'flops_useful', 'nmse')
  with pytest.raises(UserError, match='id holds int, str'):
    table.finished_runs(points(id=['a', 1] * 3, flops_useful=10.0 * N), 'flops_useful', 'nmse')
  with pytest.raises(UserError, match='nmse=inf in row 6'):
    table.finished_runs(points(flops_useful=10.0 * N, nmse=[*[0.5] * 5, np.inf]), 'flops_useful', 'nmse')


def test_a_budget_twice_would_count_every_point_twice():
  curves = pd.concat([points(id=i, n_latents=n, flops_useful=10.0 * N) for i, n in (('a', 1), ('b', 2))])
  with pytest.raises(UserError, match='budgets holds 2000 twice'):
    isoflop.profiles(curves, [2000.0, 2000.0])
  measured, best = isoflop.profiles(curves, [])
  assert measured.empty and best.empty and 'verdict' in best


def test_fits_to_different_points_are_not_compared():
  floored = power(points())
  assert Comparison(floored, fit.fit_law(points(), 'power_no_floor', bootstrap=0)).verdict
  with pytest.raises(UserError, match='different points'):
    Comparison(floored, fit.fit_law(points()[:5], 'power_no_floor', bootstrap=0))


def test_a_place_is_a_number_or_an_array_of_one_length():
  found = fit.fit_law(points(k=[1, 2, 3] * 2), 'joint_nk_no_floor', bootstrap=0)
  np.testing.assert_array_equal(
    found.predict({'n_latents': N, 'k': 2}), found.predict(pd.DataFrame({'n_latents': N, 'k': 2}))
  )
  for k in ([1, 2], np.ones((2, 3)), [[1], [2, 3]]):
    with pytest.raises(UserError, match='give a number or an array'):
      found.predict({'n_latents': N, 'k': k})


def test_rows_are_resampled_together_by_labels_of_any_one_type():
  for labels in (['a', 'b'], [1, 2], [0.1, 0.2]):
    assert power(points(run=labels * 3), group='run', bootstrap=2).table['run'].tolist() == labels * 3
  for labels, words in ((['a', 1], 'run holds int, str'), ([0.1, np.nan], 'run is missing in 3 rows')):
    with pytest.raises(UserError, match=words):
      power(points(run=labels * 3), group='run')


def test_near_names_nothing_where_nothing_is_near():
  assert frames.near('zzz', ['n_latents']) == '' and 'k_latents' in frames.near('n_latents', ['k_latents'])
