import json

import numpy as np
import pandas as pd
import pytest
from scipy import optimize, special

from analysis import fit, table
from analysis.fitting import solve


def planted(e, sizes=9, noise=0.01, seed=0):
  rng = np.random.default_rng(seed)
  n = 2.0 ** np.arange(6, 6 + sizes)
  return pd.DataFrame({'n_latents': n, 'nmse': (e + 3 * n**-0.4) * np.exp(noise * rng.normal(size=sizes))})


def test_profile_of_a_linear_law_is_the_interval_of_its_standard_errors():
  """a x^-b is linear in fit coordinates, where the profile is exactly quadratic."""
  found = fit.fit_law(planted(0.0), 'power_no_floor', bootstrap=0)
  for p in found.params.values():
    np.testing.assert_allclose((p['profile_low'], p['profile_high']), (p['low'], p['high']), rtol=1e-3)


def test_profile_ends_where_the_refitted_sum_of_squares_reaches_the_threshold():
  points = planted(0.1)
  found = fit.fit_law(points, 'power', bootstrap=0)
  u_NQ, v_N = np.log(table.positive(points, ['n_latents'])), np.log(points['nmse'].to_numpy())
  least = np.sum(found.residuals() ** 2)
  bound = least * (1 + special.fdtri(1, 6, 0.9) / 6)
  for j, (name, sign) in enumerate({'e': 1, 'a': 1, 'b': -1}.items()):
    for key in ('profile_low', 'profile_high'):
      value = found.params[name][key]
      inside = np.log(value) if name != 'b' else sign * value
      others = [i for i in range(3) if i != j]

      def residual_N(free_2, j=j, inside=inside, others=others):
        theta_P = np.empty(3)
        theta_P[j], theta_P[others] = inside, free_2
        return solve.at(found.law, theta_P, u_NQ, v_N)[0]

      best = optimize.least_squares(residual_N, found.theta_P[others], xtol=1e-14, ftol=1e-14, gtol=1e-14)
      assert 2 * best.cost == pytest.approx(bound, rel=2e-3), (name, key)


def test_profile_of_a_loss_that_is_not_there_is_unbounded_below():
  found = fit.fit_law(planted(0.0, noise=0.02), 'power', bootstrap=20)
  assert np.isnan(found.params['e']['profile_low']) and found.params['e']['profile_high'] < 0.2
  assert 'e below' in found.diagnostics['profile']['unbounded']
  record = json.loads(json.dumps(found.to_json(), allow_nan=False))
  assert record['params']['e']['profile_low'] is None
  (doubt,) = (w for w in found.warnings if w['code'] == 'asymptote_not_identified')
  assert 'profile is unbounded below' in doubt['message']
  assert 'profile unbounded to' in found.summary()


@pytest.mark.parametrize('seed', [1, 4])  # a loss the fit is vague about, and one it has driven to nothing
def test_interval_of_a_loss_that_is_not_identified_reaches_as_far_as_its_profile(seed):
  """Resamples of it may all end at nothing, or all at the estimate."""
  found = fit.fit_law(planted(0.0, sizes=5, noise=0.03, seed=seed), 'power', bootstrap=50)
  p = found.params['e']
  assert np.isnan(p['profile_low']) and p['low'] < 1e-6
  assert p['low'] <= p['estimate'] < p['profile_high'] <= p['high']


def test_profile_of_a_loss_that_is_there_is_bounded_and_follows_the_curve():
  found = fit.fit_law(planted(0.1, noise=0.05), 'power', bootstrap=0)
  assert found.diagnostics['profile'] == {'level': 0.9, 'unbounded': []}
  assert 'unbounded' not in found.summary()
  p = found.params['e']
  # The loss above is bounded by the data, the loss below by how an exponent can make up for it.
  assert p['high'] / p['estimate'] == pytest.approx(p['estimate'] / p['low'])
  assert 1 < p['profile_high'] / p['estimate'] < 0.9 * p['estimate'] / p['profile_low']


@pytest.mark.parametrize(('sizes', 'objective'), [(3, 'logls'), (9, 'huber')])
def test_profile_is_null_where_there_is_none(sizes, objective):
  found = fit.fit_law(planted(0.1, sizes=sizes), 'power', bootstrap=0, objective=objective)
  assert found.to_json()['profile'] is None and found.to_json()['params']['b']['profile_low'] is None
  assert 'profile' not in found.summary()


def test_profile_of_an_exact_fit_closes_on_the_estimate():
  p = fit.fit_law(planted(0.1, noise=0.0), 'power', bootstrap=0).params['b']
  assert p['profile_low'] <= p['estimate'] <= p['profile_high']
  assert p['profile_high'] - p['profile_low'] < 1e-6
