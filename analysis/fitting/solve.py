"""Fits a law many times at once: hundreds of starts and resamples in one batched Levenberg-Marquardt.

Ours, because scipy solves one problem at a time. The objective is the sum over points of r^2 / 2, or of Huber(r), where
r is ln predicted - ln observed. Least squares is Huber with delta = inf. Everything is float64 and in fit coordinates.

A law with a floor has narrow curved valleys, so every step follows their bend (see `_solve_chunk`). Amplitudes are not
projected out: on logs a sum of terms is not linear in them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from analysis.law import Array, Law
from sae_jax.errors import UserError

_STARTS = 200
_STEPS = 300
_REACH = 4.0  # largest change of the log of a term in one step
_TURN = 0.375  # how far a step may turn, as a share of its length; beyond, its second order says nothing
_CHUNK = 2_000_000  # numbers in one batch of Jacobians


def estimate(
  law: Law, u_NQ: Array, v_N: Array, weight_N: Array, delta: float, rng: np.random.Generator
) -> tuple[Array, float, float, Array]:
  """The best fit of many starts.

  Args:
    weight_N: of every row; a row of weight 0 is not fitted.
    delta: where Huber turns from squares to absolute values; inf for least squares.

  Returns:
    The parameters, in fit coordinates, and their objective.
    The share of starts that agree: those that end within 1 % of the best objective.
    The range of every published constant over the starts that agree. Where it is wide, the points do not determine the
    constant.
  """
  on = weight_N > 0
  u, v = u_NQ[on], v_N[on]
  every = np.zeros(_STARTS, int)
  theta_MP, value_M = _solve(law, u, v, weight_N[None, on], every, law.starts(u, v, _STARTS, rng), delta)
  best = np.nanargmin(value_M)
  # An exact fit ends in rounding noise, where 1 % of the objective means nothing. So an rms of 1e-6 agrees, too.
  agree_M = value_M <= 1.01 * value_M[best] + 0.5e-12 * weight_N.sum()
  spread_P = np.ptp(law.outside(theta_MP[agree_M]), axis=0)
  return theta_MP[best], float(value_M[best]), float(agree_M.mean()), spread_P


def refit(
  law: Law,
  u_NQ: Array,
  v_N: Array,
  weight_BN: Array,
  theta_P: Array,
  delta: float,
  rng: np.random.Generator,
  fresh: int = 1,
) -> Array:
  """Best parameters [B, P] for every weighting, from the estimate and fresh starts.

  The estimate alone is not enough where a resample has its optimum elsewhere. One fresh start is: see LOG.md.
  """
  count, width = len(weight_BN), len(theta_P)
  start_MP = np.concatenate([np.tile(theta_P, (count, 1)), law.starts(u_NQ, v_N, fresh * count, rng)])
  which_M = np.tile(np.arange(count), fresh + 1)
  theta_MP, value_M = _solve(law, u_NQ, v_N, weight_BN, which_M, start_MP, delta)
  value_SB = value_M.reshape(fresh + 1, count)
  best_B = np.where(np.isfinite(value_SB), value_SB, np.inf).argmin(axis=0)
  return theta_MP.reshape(fresh + 1, count, width)[best_B, np.arange(count)]


def constrained(law: Law, u_NQ: Array, v_N: Array, start_MP: Array, free_MP: Array) -> tuple[Array, Array]:
  """Least squares over the parameters that are free (1), the others (0) as in the start: [M, P], objectives [M]."""
  one_1N, every = np.ones((1, len(v_N))), np.zeros(len(start_MP), int)
  return _solve(law, u_NQ, v_N, one_1N, every, start_MP, np.inf, free_MP)


def settings(law: Law, x_NQ: Array, columns: Sequence[str]) -> Array:
  """Index [N] of the distinct point each row lies on. Raises `UserError` when they cannot carry the law."""
  if len(columns) != len(law.axes):
    raise UserError(f'{law.name} is over {len(law.axes)} variable(s), not {", ".join(columns)}: {law.formula}')
  if not len(x_NQ):
    raise UserError(f'no points to fit {law.name} to; finish some cells first')
  for column, values in zip(columns, x_NQ.T, strict=True):
    if len(np.unique(values)) < 2:
      raise UserError(f'{column} has one value ({values[0]:g}); {law.name} needs at least two, or use a law without it')
  index_N = np.unique(x_NQ, axis=0, return_inverse=True)[1].ravel()
  count, width = len(np.unique(index_N)), len(law.names)
  if count < width:
    raise UserError(
      f'{count} different points in {", ".join(columns)} for the {width} constants of {law.name}; add sizes'
    )
  return index_N


def at(law: Law, theta_P: Array, u_NQ: Array, v_N: Array) -> tuple[Array, Array]:
  """Log residuals [N] and their Jacobian [N, P]."""
  f_MN, jacobian_MNP, _ = law.log_prediction(theta_P[None], u_NQ)
  return f_MN[0] - v_N, jacobian_MNP[0]


def _solve(
  law: Law,
  u_NQ: Array,
  v_N: Array,
  weight_BN: Array,
  which_M: Array,
  theta_MP: Array,
  delta: float,
  free_MP: Array | None = None,
) -> tuple[Array, Array]:
  """Levenberg-Marquardt on M problems at once: parameters [M, P] and objectives [M] of local optima.

  Problem m has the weights `weight_BN[which_M[m]]`, starts at `theta_MP[m]` and keeps what is 0 in `free_MP[m]`.
  Huber enters through weights min(1, delta/|r|), whose quadratic lies above it: a step that lowers the quadratic
  lowers the objective.
  """
  theta_MP, value_M = theta_MP.copy(), np.empty(len(theta_MP))
  size = max(1, _CHUNK // (len(v_N) * theta_MP.shape[1]))
  for i in range(0, len(theta_MP), size):
    part = slice(i, i + size)
    free = np.ones_like(theta_MP[part]) if free_MP is None else free_MP[part]
    theta_MP[part], value_M[part] = _solve_chunk(law, u_NQ, v_N, weight_BN[which_M[part]], theta_MP[part], delta, free)
  return theta_MP, value_M


def _solve_chunk(
  law: Law, u_NQ: Array, v_N: Array, weight_MN: Array, theta_MP: Array, delta: float, free_MP: Array
) -> tuple[Array, Array]:
  found_MP, least_M = theta_MP.copy(), np.full(len(theta_MP), np.nan)
  eye_PP, features = np.eye(theta_MP.shape[1]), law.features(u_NQ)
  now = _quadratic(law, u_NQ, v_N, weight_MN, theta_MP, delta, free_MP, features)
  damping_M, active = np.full(len(theta_MP), 1e-2), np.arange(len(theta_MP))
  going = np.isfinite(now.value_M)
  for _ in range(_STEPS):
    if not going.all():  # what is finished leaves the arrays: most steps are taken by few problems
      found_MP[active], least_M[active] = theta_MP, now.value_M
      active, theta_MP, damping_M = active[going], theta_MP[going], damping_M[going]
      weight_MN, free_MP, now = weight_MN[going], free_MP[going], now.of(going)
    if not active.size:
      break
    scale = np.diagonal(now.normal_MPP, axis1=1, axis2=2)
    # The second term keeps the matrix regular when a term of the law has vanished from all points.
    ridge = damping_M[:, None] * scale + 1e-15 * scale.sum(axis=1, keepdims=True) + 1e-300
    matrix = now.normal_MPP + ridge[:, :, None] * eye_PP
    step = np.linalg.solve(matrix, -now.gradient_MP[:, :, None])[:, :, 0]
    # Terms are linear in the parameters, so this is the change of the log of every term at every point.
    change_JMN = law.log_terms(step, u_NQ, features)
    # Along the step ln L bends by the variance of these changes. Following the bend is what makes narrow curved
    # valleys short (geodesic acceleration, Transtrum and Sethna 2012).
    bend_MN = (now.share_JMN * change_JMN**2).sum(axis=0) - (now.share_JMN * change_JMN).sum(axis=0) ** 2
    turn = np.linalg.solve(matrix, -0.5 * now.weighted_MPN @ bend_MN[:, :, None])[:, :, 0]
    turned_JMN = law.log_terms(turn, u_NQ, features)
    far_M, aside_M = (np.abs(t_JMN).max(axis=(0, 2)) for t_JMN in (change_JMN, turned_JMN))
    trusted_M = aside_M <= _TURN * far_M
    step[trusted_M] += turn[trusted_M]
    change_JMN[:, trusted_M] += turned_JMN[:, trusted_M]
    # Without a cap a vanishing term runs away to exp(-hundreds).
    far_M = np.abs(change_JMN).max(axis=(0, 2))
    trial = theta_MP + step * np.minimum(1, _REACH / np.maximum(far_M, 1e-300))[:, None]
    then = _quadratic(law, u_NQ, v_N, weight_MN, trial, delta, free_MP, features)
    better = then.value_M < now.value_M  # False for NaN
    gain_M = (now.value_M - then.value_M) / np.maximum(now.value_M, 1e-300)
    theta_MP = np.where(better[:, None], trial, theta_MP)
    now.take(then, better)
    # A small gain under heavy damping is a short step, not a minimum.
    going = ~((better & (gain_M < 1e-10) & (damping_M <= 1e-3)) | (damping_M > 1e10))
    damping_M = np.where(better, np.maximum(0.3 * damping_M, 1e-12), 3 * damping_M)
  found_MP[active], least_M[active] = theta_MP, now.value_M
  return found_MP, least_M


@dataclasses.dataclass
class _Quadratic:
  """Of M problems: the objective, its quadratic in the parameters that are free, and what turning a step needs."""

  value_M: Array
  gradient_MP: Array
  normal_MPP: Array
  weighted_MPN: Array
  share_JMN: Array

  def of(self, some: Array) -> '_Quadratic':
    return _Quadratic(
      self.value_M[some],
      self.gradient_MP[some],
      self.normal_MPP[some],
      self.weighted_MPN[some],
      self.share_JMN[:, some],
    )

  def take(self, other: '_Quadratic', some: Array) -> None:
    self.value_M[some], self.gradient_MP[some] = other.value_M[some], other.gradient_MP[some]
    self.normal_MPP[some], self.weighted_MPN[some] = other.normal_MPP[some], other.weighted_MPN[some]
    self.share_JMN[:, some] = other.share_JMN[:, some]


def _quadratic(
  law: Law,
  u_NQ: Array,
  v_N: Array,
  weight_MN: Array,
  theta_MP: Array,
  delta: float,
  free_MP: Array,
  features: list[Array],
) -> _Quadratic:
  with np.errstate(over='ignore', invalid='ignore'):  # a wild trial step becomes NaN and is refused
    f_MN, jacobian_MNP, share_JMN = law.log_prediction(theta_MP, u_NQ, features)
    jacobian_MNP *= free_MP[:, None, :]  # a parameter without a gradient takes no step
    residual_MN = f_MN - v_N
    size_MN = np.abs(residual_MN)
    curvature_MN = weight_MN * np.minimum(1, delta / np.maximum(size_MN, 1e-300))
    loss_MN = np.where(size_MN <= delta, size_MN**2 / 2, delta * (size_MN - delta / 2))
    weighted_MPN = (jacobian_MNP * curvature_MN[:, :, None]).swapaxes(1, 2)
    gradient_MP = (weighted_MPN @ residual_MN[:, :, None])[:, :, 0]
    value_M = (weight_MN * loss_MN).sum(axis=1)
    return _Quadratic(value_M, gradient_MP, weighted_MPN @ jacobian_MNP, weighted_MPN, share_JMN)
