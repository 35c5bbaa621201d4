"""Laws planted with known constants and noise: they are recovered, and intervals hold them as often as they say.

Every rate may lie at most 5 standard deviations of a binomial below 90 %. The tables of a case are fitted once and
all intervals are judged on them.
"""

import numpy as np
import pandas as pd
import pytest

from analysis import fit, laws
from analysis.fitting import solve
from tests.planted_ledger import PLOTTED

POWER = {'e': 0.1, 'a': 3.0, 'b': 0.4}
NOISE = 0.004
CASES = {  # law, sizes, resamples, tables
  'power, standard errors': ('power', 9, 0, 100),
  'power, four points': ('power', 4, 24, 100),  # resamples alone hold the constants in 74 %
  'joint, standard errors': ('joint_nk', 6, 0, 40),
  'joint, both': ('joint_nk', 6, 30, 20),
  'huber, sandwich': ('power', 14, 0, 100),
}


def table_of(law, sizes):
  """Sizes, the log of the planted loss there, and the planted constants."""
  n = 2.0 ** np.arange(6, 6 + sizes)
  points, truth = pd.DataFrame({'n_latents': n}), POWER
  if law == 'joint_nk':
    points = pd.DataFrame([(a, b) for a in n for b in (5.0, 11.0, 23.0, 47.0)], columns=['n_latents', 'k'])
    truth = PLOTTED
  return points, clean(law, points), truth


def clean(law, points):
  """Log of the planted loss at the rows of a table."""
  theta = [np.log(0.1), np.log(3.0), -0.4] if law == 'power' else list(PLOTTED.values())
  chosen = laws.named(law)
  return chosen.log_prediction(np.array([theta]), np.log(points[list(chosen.axes)].to_numpy()))[0][0]


@pytest.fixture(scope='module', params=CASES)
def replicates(request):
  """The case, the fits to its noisy tables, and the truth."""
  law, sizes, bootstrap, count = CASES[request.param]
  points, clean_N, truth = table_of(law, sizes)
  rng = np.random.default_rng(3)
  objective = 'huber' if 'huber' in request.param else 'logls'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(solve, '_STARTS', 16)  # these tables are easy, and starts are most of the time
    fits = [
      fit.fit_law(
        points.assign(nmse=np.exp(clean_N + NOISE * rng.normal(size=len(clean_N)))),
        law,
        bootstrap=bootstrap,
        objective=objective,
      )
      for _ in range(count)
    ]
  return request.param, fits, truth


def least(count):
  return count * 0.9 - 5 * np.sqrt(count * 0.9 * 0.1)


def test_constants_are_recovered_and_their_intervals_hold_them_at_the_nominal_rate(replicates):
  case, fits, truth = replicates
  for name, value in truth.items():
    found = [f.params[name] for f in fits]
    assert sum(p['low'] <= value <= p['high'] for p in found) >= least(len(fits)), (case, name)
    if case != 'power, four points' and name in ('b', 'gamma'):
      assert np.mean([p['estimate'] for p in found]) == pytest.approx(value, rel=0.05)


def test_profiles_hold_the_planted_constants_at_the_nominal_rate(replicates):
  case, fits, truth = replicates
  if 'huber' in case:
    assert all(f.diagnostics['profile'] is None for f in fits)
    return
  for name, value in truth.items():
    # A side without a bound is NaN, and no value is beyond it.
    out = [value < f.params[name]['profile_low'] or value > f.params[name]['profile_high'] for f in fits]
    assert len(fits) - sum(out) >= least(len(fits)), (case, name)
  assert case == 'power, four points' or any(out)


def test_bands_hold_the_law_and_wider_intervals_a_new_cell_at_the_nominal_rate(replicates):
  case, fits, _ = replicates
  law = fits[0].law.name
  last = fits[0].table['n_latents'].max()
  at = pd.DataFrame({'n_latents': [last / 8, last, 4 * last], 'k': 11.0})
  truth_M = clean(law, at)
  rng, held, new = np.random.default_rng(7), 0, 0
  for f in fits:
    (low, high), (lower, higher) = f.band(at), f.interval(at)
    assert (lower <= low).all() and (high <= higher).all()
    held += (low <= np.exp(truth_M)) & (np.exp(truth_M) <= high)
    fresh_M = np.exp(truth_M + NOISE * rng.normal(size=3))
    new += (lower <= fresh_M) & (fresh_M <= higher)
  assert min(held) >= least(len(fits)) and min(new) >= least(len(fits)), (case, held, new)
  assert max(held) <= len(fits) and max(new[:2]) < len(fits)


def test_huber_holds_where_least_squares_moves():
  points, clean_N, truth = table_of('power', 12)
  rng = np.random.default_rng(4)
  spoiled_N = clean_N + 0.002 * rng.normal(size=12)
  spoiled_N[[3, 9]] += (0.4, 0.3)  # two runs that diverged
  found = {
    objective: fit.fit_law(points.assign(nmse=np.exp(spoiled_N)), 'power', objective=objective, bootstrap=0)
    for objective in ('huber', 'logls')
  }
  error = {key: abs(f.params['b']['estimate'] / truth['b'] - 1) for key, f in found.items()}
  assert error['huber'] < 0.03 < 0.06 < error['logls']
  far = {'n_latents': 2.0**20}
  clean_far = truth['e'] + truth['a'] * far['n_latents'] ** -truth['b']
  assert found['huber'].predict(far)[0] == pytest.approx(clean_far, rel=0.05)
  p, wide = (found[key].params['b'] for key in ('huber', 'logls'))
  assert p['low'] <= truth['b'] <= p['high'] and p['high'] - p['low'] < 0.3 * (wide['high'] - wide['low'])


def test_huber_and_least_squares_agree_without_outliers():
  points, clean_N, _ = table_of('joint_nk', 6)
  noisy = points.assign(nmse=np.exp(clean_N + 0.002 * np.random.default_rng(5).normal(size=len(clean_N))))
  at = {'n_latents': 2.0**13, 'k': 11.0}
  one, two = (fit.fit_law(noisy, objective=o, delta=1e-3, bootstrap=0).predict(at)[0] for o in ('huber', 'logls'))
  assert one == pytest.approx(two, rel=0.01)
  far, least_squares = (
    fit.fit_law(noisy, objective=o, delta=1.0, bootstrap=0).params['gamma'] for o in ('huber', 'logls')
  )
  assert far['standard_error'] == pytest.approx(least_squares['standard_error'], rel=1e-4)
