"""What a table says against a fit to it is said by name; what is as it should be is not."""

import numpy as np
import pandas as pd
import pytest

from analysis import doubts, fit, table

N = 2.0 ** np.arange(8, 15)


def curve(a=3.0, b=0.2, noise=0.003, seed=0, n=N, **columns):
  """Points of a power law without a floor."""
  scatter = noise * np.random.default_rng(seed).normal(size=len(n))
  return pd.DataFrame({'n_latents': n, 'nmse': a * n**-b * np.exp(scatter), **columns})


def said(points, law='power_no_floor', **how):
  found = fit.fit_law(points, law, bootstrap=0, **how)
  codes = ('broken_count', 'equal_rows', 'pooled', 'equal_x')
  return {w['code']: w['message'] for w in found.warnings if w['code'] in codes}


def read(tmp_path, text):
  (tmp_path / 't.csv').write_text(text)
  return table.read_csv(str(tmp_path / 't.csv'))


# Of the last two any number is one, but three digits beside whole numbers are named.
@pytest.mark.parametrize('column', ['n_latents', 'k', 'tokens', 'steps', 'flops', 'anything'])
def test_counts_whole_and_broken_are_named(tmp_path, column):
  points = read(tmp_path, f'{column},nmse\n256,0.50\n512,0.45\n1.024,0.41\n2.048,0.37\n')
  (message,) = said(points, x=[column]).values()
  assert f"{column} is whole in 2 rows and broken in 2 ('1.024', read as 1.024 in line 4 of" in message
  assert '--thousands=. --decimal=,' in message


@pytest.mark.parametrize(
  ('column', 'values', 'warned'),
  [
    ('n_latents', ('256', '512', '1024.5'), True),
    ('n_latents', ('1.024', '2.048', '4.096'), True),
    ('n_latents', ('256', '512.0', '1e3'), False),
    ('k', ('31.87', '64.2', '101.53'), False),  # a measured L0
    ('flops', ('1', '2.5', '10'), False),
    ('loss', ('2.345', '2.125', '2.001'), False),
    ('fraction', ('0.125', '0.250', '1'), False),
  ],
)
def test_broken_counts_are_told_from_other_numbers(tmp_path, column, values, warned):
  rows = ''.join(f'{value},{loss}\n' for value, loss in zip(values, (0.5, 0.4, 0.3), strict=True))
  assert ('broken_count' in said(read(tmp_path, f'{column},nmse\n{rows}'), x=[column])) is warned


def test_broken_counts_of_a_data_frame_are_named():
  assert 'n_latents is whole in 6 rows' in said(curve(n=np.array([1.024, *N[1:]])))['broken_count']


def test_equal_rows_are_named(tmp_path):
  once = curve().round(6)
  twice = pd.concat([once, once], ignore_index=True)
  assert said(once) == {}
  assert '7 of 14 rows equal an earlier one in every column (row 8 is that of row 1)' in said(twice)['equal_rows']
  # Numbers are compared as numbers, and the index that pandas writes is no difference.
  text = once.to_csv() + ''.join(once.assign(nmse=once['nmse'].map('{:.9f}'.format)).to_csv(header=False))
  found = said(read(tmp_path, text.replace('\n0,', '\n7,', 1)))
  assert '(line 9 of ' in found['equal_rows'] and 'is that of line 2)' in found['equal_rows']


@pytest.mark.parametrize('column', ['seed', 'id', 'note'])
def test_rows_that_differ_in_any_column_are_no_copies(column):
  twice = pd.concat([curve(), curve()], ignore_index=True)
  assert 'equal_rows' not in said(twice.assign(**{column: range(14)}))


@pytest.mark.parametrize('law', ['power', 'power_no_floor'])
def test_two_models_in_one_table_are_named(law):
  both = pd.concat([curve(model='small'), curve(1.5, model='large', seed=1)], ignore_index=True)
  found = said(both.assign(run=range(14), who='me'), law)
  assert list(found) == ['pooled'] and found['pooled'].startswith('model tells apart rows')
  assert 'n_latents=' in found['pooled'] and found['pooled'].endswith('--by=model')
  assert said(both[both['model'] == 'small'], law) == {}


def test_models_that_cross_and_models_of_other_sizes_are_named():
  cross = pd.concat([curve(3.0, 0.1, d_model=64), curve(12.0, 0.3, d_model=128)], ignore_index=True)
  other = pd.concat([curve(d_model=64), curve(1.5, n=1.5 * N, d_model=128)], ignore_index=True)
  for points in (cross, other):
    assert '--by=d_model' in said(points)['pooled']


def test_models_of_sizes_that_do_not_overlap_are_named():
  apart = pd.concat([curve(n=N[:4], model='a'), curve(1.5, n=N[3:] * 2, model='b')], ignore_index=True)
  assert '--by=model' in said(apart)['pooled']
  # A number that goes with the size may be set by it, as a learning rate is.
  assert said(apart.assign(model=(apart['model'] == 'b') * 1e-3 + 1e-3)) == {}


def test_column_that_few_points_do_not_prove_is_suggested():
  few = pd.concat([curve(n=N[[0, 2]], model='a'), curve(1.5, n=N[[0, 2]], model='b', seed=3)], ignore_index=True)
  (message,) = said(few).values()
  assert '--by=model' in message


def test_a_variable_left_out_is_named():
  points = pd.concat([curve(a, k=k) for a, k in ((3.0, 8), (2.5, 16), (2.0, 32))], ignore_index=True)
  assert said(points)['pooled'].endswith('--by=k')
  assert said(points, 'joint_nk_no_floor') == {}


def test_models_that_no_column_tells_apart_are_named():
  both = pd.concat([curve(), curve(1.5, seed=1)], ignore_index=True)
  found = said(both)
  assert list(found) == ['equal_x'] and 'row 1' in found['equal_x'] and '--by=COL' in found['equal_x']


@pytest.mark.parametrize('noise', [0.003, 0.05])
def test_one_curve_with_seeds_is_not_doubted(noise):
  for start in range(0, 9, 3):
    points = pd.concat([curve(noise=noise, seed=start + s).assign(seed=s) for s in range(3)], ignore_index=True)
    points = points.assign(host=['a', 'b', 'c'] * 7, rate=1 / points['n_latents'], bend=points['n_latents'] // 1024)
    assert said(points) == {}


def test_chance_seldom_tells_curves_apart():
  rng = np.random.default_rng(0)
  u_NQ, law = np.log(N)[:, None].repeat(2, axis=0), fit.laws.POWER_NO_FLOOR
  points = pd.DataFrame({'n_latents': np.exp(u_NQ[:, 0]), 'nmse': 0.5})
  hits = 0
  for _ in range(100):
    frame = points.assign(host=rng.choice(['a', 'b', 'c'], 14))
    hits += any(
      w['code'] == 'pooled'
      for w in doubts.of_residuals(frame, law, ['n_latents'], 'nmse', 0.1 * rng.normal(size=14), None)
    )
  assert hits <= 2
