"""Logistic probes of one dimension, one for each of many columns, by Newton's method.

Each column z has its own probe p(y) = sigmoid(w z + b). Columns are standardised first. The mean cross-entropy is minimised
with a ridge on the standardised weight: without it the weight of a column that separates the classes grows for ever.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_COLUMNS = 128  # that go through the iterations together: their numbers stay in the caches of a CPU
_STEPS = 60
_CLOSE = 1e-6  # nats that the objective may be above its minimum
_ACCEPTED = 1e-6  # nats that rounding may raise it


class Probe(NamedTuple):
  """The probe of one column.

  Attributes:
    column: which.
    weight, bias: of the column as it is, not standardised.
    loss: the mean cross-entropy on the examples that it was fitted to, in nats, without the ridge.
  """

  column: int
  weight: float
  bias: float
  loss: float


def best(z_BF: np.ndarray | jax.Array, y_B: np.ndarray, ridge: float) -> Probe:
  """The probe of lowest cross-entropy over all columns; the first of equal ones."""
  weight_F, bias_F, loss_F = (np.asarray(a, np.float64) for a in fitted(z_BF, y_B, ridge))
  column = int(np.argmin(loss_F))
  return Probe(column, float(weight_F[column]), float(bias_F[column]), float(loss_F[column]))


def cross_entropy(weight: float, bias: float, z_B: np.ndarray, y_B: np.ndarray) -> float:
  """The mean cross-entropy of a probe on examples, in nats."""
  logit_B = weight * np.asarray(z_B, np.float64) + bias
  return float(np.mean(np.logaddexp(0, logit_B) - np.asarray(y_B) * logit_B))


def fitted(z_BF: np.ndarray | jax.Array, y_B: np.ndarray, ridge: float) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Weight, bias and mean cross-entropy of the probe of each column, each [F].

  Args:
    z_BF: examples. Rows beyond the labels fill up and do not count: all tasks then share a compiled program.
    y_B: 0 or 1.
    ridge: half of it times the squared standardised weight is added to what is minimised.
  """
  columns = z_BF.shape[1]
  # Filled up with constants, for which nothing is to be found, so that a block has one size.
  padded_BF = jnp.pad(jnp.asarray(z_BF, jnp.float32), ((0, 0), (0, -columns % _COLUMNS)))
  share_B, labels_B = np.zeros((2, len(z_BF)), np.float32)
  share_B[: len(y_B)], labels_B[: len(y_B)] = 1 / len(y_B), y_B
  return tuple(a_F[:columns] for a_F in _fitted(padded_BF, labels_B, share_B, np.float32(ridge)))


@jax.jit
def _fitted(z_BF: jax.Array, y_B: jax.Array, share_B: jax.Array, ridge: jax.Array) -> tuple[jax.Array, ...]:
  n, columns = z_BF.shape
  blocks_NBC = z_BF.reshape(n, -1, _COLUMNS).swapaxes(0, 1)
  found = jax.lax.map(functools.partial(_block, y_B=y_B, share_B=share_B, ridge=ridge), blocks_NBC)
  return tuple(a_NC.reshape(columns) for a_NC in found)


class _State(NamedTuple):
  """Of each column: the standardised weight and bias, the objective and cross-entropy there, where to go and how far."""

  w_C: jax.Array
  b_C: jax.Array
  objective_C: jax.Array
  loss_C: jax.Array
  dw_C: jax.Array
  db_C: jax.Array
  step_C: jax.Array
  busy_C: jax.Array


def _block(
  z_BC: jax.Array, y_B: jax.Array, share_B: jax.Array, ridge: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`share_B`: the weight of each example in a mean."""

  def mean(a_BC: jax.Array) -> jax.Array:
    return jnp.sum(share_B[:, None] * a_BC, axis=0)

  mean_C = mean(z_BC)
  sd_C = jnp.sqrt(mean((z_BC - mean_C[None]) ** 2))
  # Rounding makes the deviation of a constant as large as this.
  varies_C = sd_C > 1e-5 * jnp.max(jnp.abs(z_BC), axis=0)
  sd_C = jnp.where(varies_C, sd_C, 1)
  u_BC = jnp.where(varies_C[None], (z_BC - mean_C[None]) / sd_C[None], 0)

  def iterate(carry: tuple[jax.Array, _State]) -> tuple[jax.Array, _State]:
    i, s = carry
    w_C, b_C = s.w_C + s.step_C * s.dw_C, s.b_C + s.step_C * s.db_C
    logit_BC = w_C[None] * u_BC + b_C[None]
    small_BC = jnp.exp(-jnp.abs(logit_BC))
    part_BC = 1 / (1 + small_BC)
    p_BC = jnp.where(logit_BC >= 0, part_BC, small_BC * part_BC)
    loss_C = mean(jnp.maximum(logit_BC, 0) + jnp.log1p(small_BC) - y_B[:, None] * logit_BC)
    objective_C = loss_C + ridge / 2 * w_C**2
    rest_BC, h_BC = p_BC - y_B[:, None], small_BC * part_BC**2
    hu_BC = h_BC * u_BC
    g_b_C, g_w_C = mean(rest_BC), mean(rest_BC * u_BC) + ridge * w_C
    h_bb_C = mean(h_BC) + 1e-12
    h_bw_C, h_ww_C = mean(hu_BC), mean(hu_BC * u_BC) + ridge
    # What is left of the weight's curvature once the bias follows it is at least the ridge.
    left_C = jnp.maximum(h_ww_C - h_bw_C**2 / h_bb_C, ridge)
    dw_C = -(g_w_C - h_bw_C / h_bb_C * g_b_C) / left_C
    db_C = -(g_b_C + h_bw_C * dw_C) / h_bb_C
    # Half of this is how far the quadratic model says the objective can still fall.
    fall_C = -(g_w_C * dw_C + g_b_C * db_C)
    better_C = s.busy_C & (objective_C <= s.objective_C + _ACCEPTED)
    moved = _State(w_C, b_C, objective_C, loss_C, dw_C, db_C, jnp.ones_like(w_C), fall_C > 2 * _CLOSE)
    stayed = s._replace(step_C=s.step_C / 4, busy_C=s.busy_C & (s.step_C > 1e-4))
    return i + 1, _State(*(jnp.where(better_C, new_C, old_C) for new_C, old_C in zip(moved, stayed, strict=True)))

  zero_C, share = jnp.zeros_like(mean_C), jnp.clip(jnp.sum(share_B * y_B), 1e-6, 1 - 1e-6)
  start = _State(
    zero_C, zero_C + jnp.log(share / (1 - share)), zero_C + jnp.inf, zero_C, zero_C, zero_C, zero_C + 1, zero_C == 0
  )
  _, s = jax.lax.while_loop(lambda c: (c[0] < _STEPS) & jnp.any(c[1].busy_C), iterate, (jnp.int32(0), start))
  weight_C = s.w_C / sd_C
  return weight_C, s.b_C - weight_C * mean_C, s.loss_C
