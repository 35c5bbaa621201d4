"""Numbers read off a law: they are those of the planted law, and their intervals hold them."""

import numpy as np
import pandas as pd
import pytest

from analysis import derived, fit
from sae_jax.errors import UserError

FLOOR, LEVEL, B, C, GAMMA = 0.05, 0.9, 0.2, 0.35, -0.03


def loss(n, k, floor=FLOOR):
  return LEVEL * n ** (-B + GAMMA * np.log(k)) * k**C + floor


def table(noise=1e-4, floor=FLOOR):
  rng = np.random.default_rng(0)
  rows = [{'n_latents': n, 'k': k} for n in 2 ** np.arange(8, 15) for k in (4, 8, 16, 32)]
  out = pd.DataFrame(rows)
  return out.assign(nmse=loss(out['n_latents'], out['k'], floor) * np.exp(noise * rng.normal(size=len(out))))


@pytest.fixture(scope='module')
def joint():
  return fit.fit_law(table(), 'joint_nk', bootstrap=40)


AT = {'n_latents': 4096.0, 'k': 16.0}


def test_exponent_and_doublings_are_those_of_the_law(joint):
  share = 1 - FLOOR / loss(**{'n': 4096, 'k': 16})
  wanted = {
    derived.exponent(joint, AT): (B - GAMMA * np.log(16)) * share,
    derived.doubling(joint, AT, 'n_latents'): loss(8192, 16) / loss(4096, 16) - 1,
    derived.doubling(joint, AT, 'k'): loss(4096, 32) / loss(4096, 16) - 1,
  }
  for found, number in wanted.items():
    assert found.value == pytest.approx(number, rel=0.02)
    assert found.low < number < found.high and found.high - found.low < 0.2 * abs(number)


def test_the_n_that_a_loss_takes(joint):
  found = derived.reach(joint, float(loss(30_000, 16)), {'k': 16})
  assert found.value == pytest.approx(30_000, rel=0.02) and found.low < 30_000 < found.high
  bare = fit.fit_law(table(floor=0.0), 'joint_nk_no_floor', bootstrap=0)
  assert derived.reach(bare, float(loss(30_000, 16, 0.0)), {'k': 16}).value == pytest.approx(30_000, rel=0.02)
  one = table().query('k == 8')
  power = fit.fit_law(one, 'power', bootstrap=0)
  assert derived.reach(power, float(loss(9_000, 8)), {}).value == pytest.approx(9_000, rel=0.02)


def test_an_interval_ends_nowhere_where_the_loss_may_never_be_reached():
  loose = fit.fit_law(table(noise=0.02), 'joint_nk', bootstrap=40)
  found = derived.reach(loose, 1.5 * FLOOR, {'k': 16})
  assert found.low < found.value and found.high == np.inf and 'unbounded' in str(found)


def test_a_loss_below_the_irreducible_one_is_refused(joint):
  with pytest.raises(
    UserError, match=r'nmse=0.04 cannot be reached at k = 16: the irreducible loss of the law is 0\.0'
  ) as e:
    derived.reach(joint, 0.04, {'k': 16})
  assert '\n' not in str(e.value)
  rising = fit.fit_law(table().assign(n_latents=lambda t: 1 / t['n_latents']), 'joint_nk_no_floor', bootstrap=0)
  with pytest.raises(UserError, match='the loss does not fall with n there'):
    derived.reach(rising, 0.04, {'k': 16})
