import dataclasses
import json
import pathlib

import numpy as np
import pandas as pd
import pytest

from analysis import fit, fit_result, laws, table
from sae_jax.errors import UserError

GAO = str(pathlib.Path(laws.__file__).parent / 'data' / 'gao2024_gpt4_L_n_k.csv')
PLOTTED = dict(
  alpha=-0.42271827, beta_k=0.2397685, beta_n=-0.02708159, gamma=-0.03828648, zeta=-1.31862432, eta=-0.0964778
)


@pytest.fixture(scope='module')
def gao():
  return table.read_csv(GAO)


@pytest.fixture(scope='module')
def gao_fit(gao):
  return fit.fit_law(gao, 'joint_nk', ['n_latents', 'k'], 'normalized_mse', bootstrap=100, holdout='n_latents>65536')


def grid(law='joint_nk', noise=0.0, **constants):
  """Points of a planted law."""
  rng = np.random.default_rng(0)
  if law.startswith('joint_nk'):
    n, k = np.array([(n, k) for n in 2.0 ** np.arange(8, 15) for k in (4.0, 11.0, 41.0)]).T
    frame = pd.DataFrame({'n_latents': n, 'k': k})
  else:
    frame = pd.DataFrame({'n_latents': 2.0 ** np.arange(6, 18), 'tokens': rng.permutation(3.0 ** np.arange(5, 17))})
  theta = [
    np.log(constants[p.name])
    if p.kind == 'amplitude'
    else -constants[p.name]
    if p.kind == 'exponent'
    else constants[p.name]
    for p in laws.LAWS[law].parameters
  ]
  u_NQ = np.log(frame[list(laws.LAWS[law].axes)].to_numpy())
  f_N = laws.LAWS[law].log_prediction(np.array([theta]), u_NQ)[0][0]
  return frame.assign(nmse=np.exp(f_N + noise * rng.normal(size=len(f_N))))


def test_fit_recovers_the_constants_behind_the_published_figure(gao_fit):
  for name, value in PLOTTED.items():
    assert gao_fit.params[name]['estimate'] == pytest.approx(value, rel=5e-3)
  assert gao_fit.diagnostics['rms_log_residual'] == pytest.approx(0.00958, abs=1e-5)
  assert gao_fit.diagnostics['max_log_residual'] == pytest.approx(0.0184, abs=1e-4)
  errors = [p['standard_error'] for p in gao_fit.params.values()]
  np.testing.assert_allclose(errors, [0.144, 0.031, 0.027, 0.0053, 0.21, 0.036], rtol=0.05)
  assert gao_fit.start_agreement > 0.8
  assert max(gao_fit.diagnostics['start_spread'].values()) < 1e-3


def test_fit_predicts_the_held_out_sizes_as_well_as_known(gao_fit):
  assert 100 * gao_fit.holdout['mean_rel_err'] == pytest.approx(1.90, abs=0.02)
  assert 100 * gao_fit.holdout['max_rel_err'] == pytest.approx(6.77, abs=0.02)
  assert gao_fit.holdout['n_fitted'] == 30 and gao_fit.holdout['n_held_out'] == 15
  # With all points the irreducible loss is pinned; without the large sizes it is not, and the fit must say so.
  assert 'asymptote_not_identified' not in {w['code'] for w in gao_fit.warnings}
  assert [w['code'] for w in gao_fit.holdout['warnings']] == ['asymptote_not_identified']


def test_fit_with_huber_recovers_its_own_constants(gao):
  found = fit.fit_law(gao, 'joint_nk', None, 'normalized_mse', objective='huber', delta=1e-3, bootstrap=0)
  expected = (-0.313, 0.201, -0.040, -0.0326, -1.337, -0.1145)
  np.testing.assert_allclose([p['estimate'] for p in found.params.values()], expected, atol=6e-4)


def test_fit_without_the_floor_is_worse_by_the_known_factor(gao):
  found = fit.fit_law(gao, 'joint_nk_no_floor', None, 'normalized_mse', bootstrap=0)
  assert found.diagnostics['rms_log_residual'] == pytest.approx(0.01945, abs=1e-5)
  floored = fit.fit_law(gao, 'joint_nk', None, 'normalized_mse', bootstrap=0)
  assert floored.diagnostics['aicc'] < found.diagnostics['aicc'] - 10


@pytest.mark.parametrize(
  ('law', 'constants'),
  [
    ('power', dict(e=0.2, a=3.0, b=0.4)),
    ('power_no_floor', dict(a=3.0, b=0.2)),
    ('joint_nk', PLOTTED),
    ('joint_nk_no_floor', dict(alpha=0.5, beta_k=0.1, beta_n=-0.1, gamma=-0.03)),
    ('additive2', dict(e=0.3, a=5.0, alpha=0.5, b=9.0, beta=0.4)),
  ],
)
def test_fit_recovers_a_planted_law_exactly(law, constants):
  found = fit.fit_law(grid(law, **constants), law, bootstrap=0)
  for name, value in constants.items():
    assert found.params[name]['estimate'] == pytest.approx(value, rel=1e-5)


def test_fit_minimises_the_sum_of_huber_losses():
  points = grid('power', noise=0.02, e=0.2, a=3.0, b=0.4)
  found = fit.fit_law(points, 'power', objective='huber', delta=5e-3, bootstrap=0)

  def objective(theta_P):
    size = np.abs(
      found.law.log_prediction(theta_P[None], np.log(points[['n_latents']].to_numpy()))[0][0] - np.log(points['nmse'])
    )
    return np.where(size <= 5e-3, size**2 / 2, 5e-3 * (size - 2.5e-3)).sum()

  assert found.diagnostics['objective_value'] == pytest.approx(objective(found.theta_P), rel=1e-9)
  rng = np.random.default_rng(1)
  nearby = [objective(found.theta_P + 1e-3 * rng.normal(size=3)) for _ in range(200)]
  assert min(nearby) >= objective(found.theta_P)


def test_fit_intervals_hold_the_truth_and_repeat():
  points = grid('joint_nk', noise=0.003, **PLOTTED)
  one, two = (fit.fit_law(points, bootstrap=60, seed=3) for _ in range(2))
  assert one.params == two.params
  inside = [one.params[name]['low'] <= value <= one.params[name]['high'] for name, value in PLOTTED.items()]
  assert sum(inside) >= 5
  for p in one.params.values():
    assert p['low'] <= p['estimate'] <= p['high']


def test_fit_by_group_does_not_count_copies_as_evidence():
  points = grid('power', noise=0.02, e=0.2, a=3.0, b=0.4).assign(run=range(12))
  copies = pd.concat([points] * 9, ignore_index=True)
  width = {group: fit.fit_law(copies, 'power', bootstrap=150, group=group).params['b'] for group in (None, 'run')}
  spread = {group: p['high'] - p['low'] for group, p in width.items()}
  assert spread['run'] > 1.7 * spread[None]


def test_fit_band_widens_away_from_the_data():
  found = fit.fit_law(grid('power', noise=0.01, e=0.2, a=3.0, b=0.4), 'power', bootstrap=100)
  low, high = found.band({'n_latents': [2.0**17, 2.0**22, 2.0**30]})
  width = np.log(high / low)
  assert width[0] < width[1] < width[2]
  assert found.predict({'n_latents': 2.0**17}).shape == (1,)
  assert (low <= found.predict({'n_latents': [2.0**17, 2.0**22, 2.0**30]})).all()


def test_fit_band_without_resamples_is_that_of_standard_errors():
  """Linear in fit coordinates: the textbook interval of a straight line."""
  points = grid('power_no_floor', noise=0.05, a=3.0, b=0.2)
  found = fit.fit_law(points, 'power_no_floor', bootstrap=0)
  at = 2.0**20
  u_N, v_N = np.log(points['n_latents']), np.log(points['nmse'])
  slope, level = np.polyfit(u_N, v_N, 1)
  spread = np.sum((v_N - level - slope * u_N) ** 2) / 10
  deviation = np.sqrt(spread * (1 / 12 + (np.log(at) - u_N.mean()) ** 2 / np.sum((u_N - u_N.mean()) ** 2)))
  low, high = found.band({'n_latents': at})
  center = level + slope * np.log(at)
  reach = 1.812461 * deviation  # Student's t, 10 degrees of freedom
  np.testing.assert_allclose((np.log(low[0]), np.log(high[0])), (center - reach, center + reach), rtol=1e-4)
  assert np.isnan(fit.fit_law(points.head(2), 'power_no_floor', bootstrap=0).band({'n_latents': at})).all()


def test_fit_says_how_well_its_constants_are_told_apart(gao_fit):
  matrix = np.array(gao_fit.diagnostics['correlation'])
  np.testing.assert_allclose(np.diagonal(matrix), 1)
  np.testing.assert_allclose(matrix, matrix.T)
  names = list(gao_fit.params)
  deviation_P = np.sqrt(np.diagonal(gao_fit.covariance_PP))
  np.testing.assert_allclose(matrix, gao_fit.covariance_PP / np.outer(deviation_P, deviation_P), atol=1e-6)
  assert matrix[names.index('beta_n'), names.index('gamma')] < -0.8  # as published: not told apart
  narrow = gao_fit.table[gao_fit.table['n_latents'] <= 16384]
  assert (
    fit.fit_law(narrow, y='normalized_mse', bootstrap=0).diagnostics['condition_number']
    > 3 * gao_fit.diagnostics['condition_number']
    > 0
  )


def test_fit_warns_when_starts_end_in_different_places():
  points = grid('additive2', e=0.3, a=5.0, alpha=0.5, b=9.0, beta=0.4)
  noise = points.assign(nmse=np.exp(np.random.default_rng(6).normal(size=len(points))))
  for frame, warned in ((points, False), (noise, True)):
    found = fit.fit_law(frame, 'additive2', bootstrap=0)
    assert (found.start_agreement < 0.5) is warned
    assert ('starts_disagree' in {w['code'] for w in found.warnings}) is warned


def test_fit_by_group_warns_when_one_run_dominates():
  points = grid('power', noise=0.02, e=0.2, a=3.0, b=0.4).assign(run=['a'] * 8 + ['b', 'c', 'd', 'e'])
  (warning,) = (
    w for w in fit.fit_law(points, 'power', bootstrap=5, group='run').warnings if w['code'] == 'one_run_dominates'
  )
  assert 'one run holds 67%' in warning['message']


def test_fit_refuses_a_cell_that_is_in_the_table_twice():
  points = grid('power', noise=0.02, e=0.2, a=3.0, b=0.4).assign(id=[f'c{i}' for i in range(12)])
  twice = pd.concat([points, points.tail(1)], ignore_index=True)
  with pytest.raises(UserError, match=r"id 'c11' is in the table twice.*--group=id"):
    fit.fit_law(twice, 'power', bootstrap=0)
  assert len(fit.fit_law(twice, 'power', bootstrap=5, group='id').table) == 13


@pytest.mark.parametrize('column', ['n_latents', 'nmse'])
@pytest.mark.parametrize('value', [0.0, -1.0, float('nan'), float('inf'), 'abc', None, True])
def test_fit_names_the_row_that_has_no_logarithm(column, value):
  points = grid('power', e=0.2, a=3.0, b=0.4).astype(object)
  points.loc[4, column] = value
  with pytest.raises(UserError, match=f'{column}=.* in row 5 ') as caught:
    fit.fit_law(points, 'power', bootstrap=0)
  assert '\n' not in str(caught.value)


def test_fit_flags_what_the_data_do_not_show():
  few = grid('power', noise=0.001, e=1e-6, a=3.0, b=0.2).head(4).reset_index(drop=True)
  few = pd.concat([few.assign(git_commit='a'), few.head(1).assign(git_commit='b')], ignore_index=True)
  found = fit.fit_law(few, 'power', bootstrap=50)
  assert {w['code'] for w in found.warnings} == {
    'asymptote_not_identified',
    'short_range',
    'few_points',
    'mixed_versions',
  }


def test_fit_takes_named_axes_in_any_order(gao):
  one, two = (
    fit.fit_law(gao, 'joint_nk', x, 'normalized_mse', bootstrap=0) for x in (['n_latents', 'k'], ['k', 'n_latents'])
  )
  assert one.x == two.x and one.params == two.params


@pytest.mark.parametrize('bootstrap', [0, 20])
def test_fit_exactly_as_many_points_as_constants_has_null_intervals_in_strict_json(bootstrap):
  found = fit.fit_law(grid('power', e=0.2, a=3.0, b=0.4).head(3), 'power', bootstrap=bootstrap)
  record = found.to_json()
  assert record['params']['e']['low'] is None and 'interval unknown' in found.summary()
  assert 'no_interval' in {w['code'] for w in record['warnings']}
  json.dumps(record, allow_nan=False)


def test_warnings_of_one_kind_are_not_told_of_fits_that_said_something_else():
  one, other = (fit.fit_law(grid('power_no_floor', a=3.0, b=b), 'power_no_floor', bootstrap=0) for b in (0.4, 0.5))
  first, second = ({'code': 'doubt', 'message': message} for message in ('of one', 'of two'))
  where = [dataclasses.replace(f, warnings=[], where={'k': k}) for k, f in ((1, one), (2, other), (3, one))]
  fits = [f.warned(w) for f, w in zip(where, (first, second, first), strict=True)]
  (line,) = fit_result.warning_lines(fits)
  assert line == 'doubt: of one [L(n), k = 1; L(n), k = 3]; the like for L(n), k = 2'


BAD = {
  'unknown law': (dict(law='cubic'), 'cubic'),
  'unknown column': (dict(x=['n_latents', 'kk']), 'kk'),
  'unknown loss': (dict(y='loss'), 'loss'),
  'one axis missing': (dict(x=['n_latents']), '2 variable'),
  'one axis twice': (dict(x=['k', 'k']), 'a column twice'),
  'the loss an axis': (dict(x=['n_latents', 'nmse']), 'a column twice'),
  'unknown objective': (dict(objective='l1'), 'l1'),
  'negative delta': (dict(objective='huber', delta=-1.0), 'delta'),
  'negative bootstrap': (dict(bootstrap=-1), 'bootstrap'),
  'holdout of nothing': (dict(holdout='k>9999'), 'nothing'),
  'holdout of everything': (dict(holdout='k>0'), 'no point'),
  'holdout of an axis': (dict(holdout='k>4'), 'one value'),
  'no such group': (dict(group='run'), 'run'),
}


@pytest.mark.parametrize('case', BAD)
def test_fit_refuses(case):
  arguments, words = BAD[case]
  with pytest.raises(UserError, match=words) as caught:
    fit.fit_law(grid('joint_nk', **PLOTTED), **({'bootstrap': 0} | arguments))
  assert '\n' not in str(caught.value)


def test_fit_refuses_fewer_points_than_constants():
  points = grid('joint_nk', **PLOTTED).head(5)
  with pytest.raises(UserError, match='5 different points'):
    fit.fit_law(points, bootstrap=0)
  with pytest.raises(UserError, match='5 different points'):
    fit.fit_law(pd.concat([points] * 4), bootstrap=0)  # copies are no new points


def test_fit_command_writes_an_entry_of_laws_json(tmp_path, capsys):
  out = tmp_path / 'fit.json'
  arguments = (
    f'{GAO} --law=joint_nk --x=n_latents,k --y=normalized_mse --bootstrap=20 --holdout=n_latents>65536 --json={out}'
  )
  with pytest.raises(SystemExit) as code:
    fit.main(arguments.split())
  assert code.value.code == 0
  record = json.loads(out.read_text())
  assert set(record) >= {
    'law',
    'formula',
    'x',
    'y',
    'params',
    'objective',
    'n_points',
    'start_agreement',
    'holdout',
    'warnings',
  }
  assert record['x'] == ['n_latents', 'k'] and record['n_points'] == 45
  assert set(record['holdout']) >= {'rule', 'mean_rel_err', 'max_rel_err'}
  assert '90 % interval' in capsys.readouterr().out


@pytest.mark.parametrize(
  'arguments',
  [
    'nowhere.csv --y=nmse',
    f'{GAO} --y=nmse',
    f'{GAO} --y=paper_fit --law=x',
    f'{GAO} --y=paper_fit --json=/proc/no/where',
  ],
)
def test_fit_command_ends_with_one_line(arguments, capsys):
  with pytest.raises(SystemExit) as code:
    fit.main([*arguments.split(), '--bootstrap=0'])
  assert code.value.code == 2
  assert capsys.readouterr().err.count('\n') == 1
