"""Laws planted with known constants and noise: they are recovered, and intervals hold them as often as they say."""

import numpy as np
import pandas as pd
import pytest

from analysis import fit, laws, solve
from tests.planted_ledger import PLOTTED

POWER = {'e': 0.1, 'a': 3.0, 'b': 0.4}


def table_of(law, sizes):
  """Sizes, the log of the planted loss there, and the planted constants."""
  n = 2.0 ** np.arange(6, 6 + sizes)
  if law == 'power':
    return pd.DataFrame({'n_latents': n}), np.log(0.1 + 3.0 * n**-0.4), POWER
  points = pd.DataFrame([(a, b) for a in n for b in (5.0, 11.0, 23.0, 47.0)], columns=['n_latents', 'k'])
  theta_1P = np.array([[PLOTTED[name] for name in laws.JOINT_NK.names]])
  return points, laws.JOINT_NK.log_prediction(theta_1P, np.log(points.to_numpy()))[0][0], PLOTTED


@pytest.mark.parametrize(
  ('law', 'sizes', 'bootstrap', 'count'),
  [
    ('power', 9, 0, 200),
    ('power', 4, 40, 200),  # resamples alone hold the truth in 74 %, which is below the bound
    ('joint_nk', 6, 0, 150),
    ('joint_nk', 6, 40, 40),
  ],
)
def test_intervals_hold_the_planted_constants_at_the_nominal_rate(law, sizes, bootstrap, count, monkeypatch):
  """At most 5 standard deviations of a binomial below 90 %."""
  monkeypatch.setattr(solve, '_STARTS', 16)  # these tables are easy, and starts are most of the time
  points, clean_N, truth = table_of(law, sizes)
  rng, hits, mean = np.random.default_rng(3), dict.fromkeys(truth, 0), dict.fromkeys(truth, 0.0)
  for _ in range(count):
    noisy = points.assign(nmse=np.exp(clean_N + 0.004 * rng.normal(size=len(clean_N))))
    found = fit.fit_law(noisy, law, bootstrap=bootstrap)
    for name, value in truth.items():
      hits[name] += found.params[name]['low'] <= value <= found.params[name]['high']
      mean[name] += found.params[name]['estimate'] / count
  least = count * 0.9 - 5 * np.sqrt(count * 0.9 * 0.1)
  assert min(hits.values()) >= least, hits
  if sizes > 4:
    for name in ('b', 'gamma'):
      if name in truth:
        assert mean[name] == pytest.approx(truth[name], rel=0.05)


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
  clean = truth['e'] + truth['a'] * far['n_latents'] ** -truth['b']
  assert found['huber'].predict(far)[0] == pytest.approx(clean, rel=0.05)


def test_huber_and_least_squares_agree_without_outliers():
  points, clean_N, _ = table_of('joint_nk', 6)
  noisy = points.assign(nmse=np.exp(clean_N + 0.002 * np.random.default_rng(5).normal(size=len(clean_N))))
  at = {'n_latents': 2.0**13, 'k': 11.0}
  one, two = (
    fit.fit_law(noisy, objective=o, delta=1e-3, bootstrap=0).predict(at)[0] for o in ('huber', 'logls')
  )
  assert one == pytest.approx(two, rel=0.01)
