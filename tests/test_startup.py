"""The pre-bias is the geometric median and the loss constant makes predicting the mean cost 1."""

import numpy as np
import pytest

from sae_jax import sharding
from sae_jax.data.source import open_source
from sae_jax.errors import UserError
from sae_jax.evaluate import Evaluator
from sae_jax.startup import geometric_median, start_up_sample
from tests import cells


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
  _, scale, _ = start_up_sample(Rows(x_TD), 211)
  assert scale * np.mean((x_TD - x_TD.mean(axis=0)) ** 2) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
  'value, why',
  [(0.0, 'must vary'), (0.1, 'must vary'), (np.nan, 'must be finite'), (np.inf, 'must be finite')],
)
def test_rows_that_do_not_vary_are_refused(value, why):
  x_TD = np.full((7, 2), value, np.float32)
  with pytest.raises(UserError, match=f'the first 7 training rows .*{why}'), np.errstate(invalid='ignore'):
    start_up_sample(Rows(x_TD), 7)


@pytest.mark.parametrize('value', [0.0, 0.1, 1e-20, 3e4, np.nan])
def test_held_out_rows_that_do_not_vary_are_refused_before_the_first_step(value):
  c = cells.cell()
  source = open_source(c)
  source.held_out = lambda start, stop: np.full((stop - start, c.sae.d_model), value, np.float32)
  with pytest.raises(UserError, match=r'the 101 held-out rows have variance .*hold out other rows'):
    Evaluator(c, sharding.make_mesh(c.mesh), source)


@pytest.mark.parametrize('size, said', [(1, ''), (0.2, ''), (1e-3, '0.001'), (1e-5, '1e-05'), (50, '50')])
def test_norms_far_from_one_are_warned_of_with_the_number(size, said, capsys):
  x_TD = np.random.default_rng(1).standard_normal((211, 50)).astype(np.float32)
  start_up_sample(Rows(size * x_TD / np.linalg.norm(x_TD, axis=1, keepdims=True)), 211)
  warned = capsys.readouterr().err
  assert warned.count('\n') == bool(said)
  assert said in warned and ('--normalize=scale' in warned or not said)


@pytest.mark.parametrize('size', [1e-25, 1e18])
def test_rows_whose_squares_float32_does_not_hold_are_refused(size):
  x_TD = np.random.default_rng(1).standard_normal((211, 5)).astype(np.float32)
  with pytest.raises(UserError, match='--normalize=scale'):
    start_up_sample(Rows(np.float32(size) * x_TD), 211)
