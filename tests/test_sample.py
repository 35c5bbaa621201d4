"""The pre-bias is the geometric median and the loss constant makes predicting the mean cost 1."""

import numpy as np
import pytest

from sae_jax.errors import UserError
from sae_jax.sample import geometric_median, start_up_sample


class Rows:
  """A source of given rows."""

  def __init__(self, x_TD):
    self.rows = lambda start, stop: x_TD[start:stop]


def test_geometric_median_is_where_no_step_helps_and_outliers_do_not():
  x_TD = np.random.default_rng(0).standard_normal((101, 3))
  x_TD[0] = 1e6
  median_D = geometric_median(x_TD, iterations=500)
  cost = lambda p: np.linalg.norm(x_TD - p, axis=1).sum()  # noqa: E731
  for direction_D in np.vstack([np.eye(3), -np.eye(3)]):
    assert cost(median_D) <= cost(median_D + 1e-2 * direction_D)
  assert np.abs(median_D).max() < 1 < np.abs(x_TD.mean(axis=0)).max()


def test_loss_scale_makes_the_mean_cost_one():
  x_TD = np.random.default_rng(1).standard_normal((211, 5)).astype(np.float32) * 3 + 1
  _, scale = start_up_sample(Rows(x_TD), 211)
  assert scale * np.mean((x_TD - x_TD.mean(axis=0)) ** 2) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize('value', [0.0, np.nan, np.inf])
def test_tokens_that_do_not_vary_are_refused(value):
  with pytest.raises(UserError, match='must vary and be finite'), np.errstate(invalid='ignore'):
    start_up_sample(Rows(np.full((7, 2), value, np.float32)), 7)
