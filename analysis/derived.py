"""Numbers that people use, read off a law of the loss over n and, where it has it, a sparsity: each with its interval.

The exponent of n at a place, what one more doubling does to the loss there, and the n that a target needs.
"""

from collections.abc import Mapping

import numpy as np

from analysis.fit_result import Fit, where_words
from analysis.fitting.uncertainty import Estimate
from analysis.law import Array
from analysis.laws import SYMBOLS
from sae_jax.errors import UserError

_STEP = 1e-4  # in ln n, of the slope


def exponent(fit: Fit, at: Mapping[str, float]) -> Estimate:
  """The exponent of n at a place: the loss falls there as n to the power of minus this."""
  n = at['n_latents'] * np.exp([-_STEP, _STEP])
  u_2Q = fit.logs({**at, 'n_latents': n})
  return fit.derived(lambda theta_MP: -np.diff(fit.law.log_prediction(theta_MP, u_2Q)[0])[:, 0] / (2 * _STEP))


def doubling(fit: Fit, at: Mapping[str, float], column: str) -> Estimate:
  """The relative change of the loss from a place to twice its value of a column; -0.1 is 10 % less."""
  u_2Q = fit.logs({**at, column: at[column] * np.array([1.0, 2.0])})
  found = fit.derived(lambda theta_MP: np.diff(fit.law.log_prediction(theta_MP, u_2Q)[0])[:, 0])
  return Estimate(*np.expm1(found).tolist())


def reach(fit: Fit, target: float, at: Mapping[str, float]) -> Estimate:
  """The n at which the law comes down to a loss; an end of the interval is infinite where it may never.

  Raises:
    UserError: the target is not above the irreducible loss, or the loss does not fall with n there.
  """
  u_2Q = fit.logs({**at, 'n_latents': np.array([1.0, np.e])})
  law = fit.law

  def size(theta_MP: Array) -> Array:
    t_JM2 = law.log_terms(theta_MP, u_2Q)
    falling_M2 = t_JM2[1 - law.floor if law.floor is not None else 0]
    left_M = target - (np.exp(t_JM2[law.floor, :, 0]) if law.floor is not None else 0.0)
    slope_M = falling_M2[:, 1] - falling_M2[:, 0]
    can = (left_M > 0) & (slope_M < 0)
    found = (np.log(np.where(can, left_M, 1.0)) - falling_M2[:, 0]) / np.where(can, slope_M, -1.0)
    return np.where(can, found, np.inf)

  found = fit.derived(size)
  if not np.isfinite(found.value):
    where = ', '.join(where_words({SYMBOLS.get(key, key): value for key, value in at.items()})) or 'any n'
    reason = 'the loss does not fall with n'
    if (
      law.floor is not None
      and (left := float(np.exp(law.log_terms(fit.theta_P[None], u_2Q)[law.floor, 0, 0]))) >= target
    ):
      reason = f'the irreducible loss of the law is {left:.3g}'
    raise UserError(
      f'nmse={target:g} cannot be reached at {where}: {reason} there; allow a larger loss or more active latents'
    )
  with np.errstate(over='ignore'):
    return Estimate(*np.exp(found).tolist())
