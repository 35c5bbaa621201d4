"""Profile-likelihood intervals: how far one constant can move while the others make up for it.

Where a law is curved in a constant, an interval from standard errors is symmetric and a bootstrap depends on luck; the
profile follows the curve, and says when nothing stops the constant on a side. It is for independent residuals.
"""

import numpy as np
from scipy import special

from analysis.fitting import solve
from analysis.fitting.uncertainty import LEVEL
from analysis.law import Array, Law

_FAR = 30.0  # change of the log of a term, beyond the level of the data, at which the search ends
_ROUNDS = 80
_CLOSE = 1e-3  # relative error of the ends
_ROUNDING = 1e-12  # scatter in log loss that is none


def ends(law: Law, u_NQ: Array, v_N: Array, theta_P: Array, covariance_PP: Array | None) -> Array:
  """Ends [2, P] of the 90 % profile intervals in fit coordinates, lower first; infinite where there is no end.

  An end is where the sum of squares, least over all other constants, has risen by s^2 F. Here s^2 is the variance of the
  residuals and F the 90 % point of F(1, N - P), which is right for a variance that is estimated too.

  There is no end where the sum stays below that until the constant's term alone would have changed by e^30 beyond the
  level of the data. All ends are searched at once. They are NaN with no more points than constants.
  """
  freedom, width = len(v_N) - len(theta_P), len(theta_P)
  if freedom < 1:
    return np.full((2, width), np.nan)
  residual_N, _ = solve.at(law, theta_P, u_NQ, v_N)
  least = residual_N @ residual_N
  scale = max(np.sqrt(least / freedom), _ROUNDING)
  bound = np.sqrt(special.fdtri(1, freedom, LEVEL))

  pick_E = np.tile(np.arange(width), 2)
  sign_E = np.repeat([-1.0, 1.0], width)
  row_E = np.arange(2 * width)
  free_EP = np.ones((2 * width, width))
  free_EP[row_E, pick_E] = 0
  limit_E, direction_EP, x_E = _first(law, u_NQ, v_N, theta_P, covariance_PP, bound, pick_E, sign_E)

  # Distances of the last point inside and the first outside, the rises there, and the other constants inside.
  inside_E, outside_E = np.zeros(2 * width), np.full(2 * width, np.inf)
  low_E, high_E = np.zeros(2 * width), np.full(2 * width, np.inf)
  known_EP = np.tile(theta_P, (2 * width, 1))
  found_E = np.full(2 * width, np.inf)
  active = row_E
  for _ in range(_ROUNDS):
    if not active.size:
      break
    x = x_E[active]
    ahead = theta_P + direction_EP[active] * x[:, None]  # along the path so far
    near = known_EP[active].copy()
    for start in (ahead, near):
      start[np.arange(len(active)), pick_E[active]] = theta_P[pick_E[active]] + sign_E[active] * x
    start_MP, free_MP = np.concatenate([ahead, near]), np.tile(free_EP[active], (2, 1))
    theta_MP, value_M = solve.constrained(law, u_NQ, v_N, start_MP, free_MP)
    value_2A = np.where(np.isfinite(value_M), value_M, np.inf).reshape(2, -1)
    best_A = value_2A.argmin(axis=0)
    rise_A = np.sqrt(np.maximum(2 * value_2A.min(axis=0) - least, 0)) / scale
    theta_AP = theta_MP.reshape(2, -1, width)[best_A, np.arange(len(active))]

    within = rise_A < bound
    yes, no = active[within], active[~within]
    inside_E[yes], low_E[yes], known_EP[yes] = x[within], rise_A[within], theta_AP[within]
    direction_EP[yes] = (theta_AP[within] - theta_P) / x[within, None]
    outside_E[no], high_E[no] = x[~within], rise_A[~within]

    done = (np.abs(rise_A - bound) < _CLOSE * bound) | (outside_E - inside_E < _CLOSE * outside_E)[active]
    found_E[active[done]] = x[done]
    done |= inside_E[active] >= limit_E[active]
    active = active[~done]
    x_E[active] = _next(*(v[active] for v in (inside_E, outside_E, low_E, high_E, limit_E)), bound)
  return (theta_P[pick_E] + sign_E * found_E).reshape(2, width)


def add(law: Law, params: dict[str, dict[str, float]], ends_2P: Array) -> list[str]:
  """Puts the published ends into `params` (NaN: none on that side); returns the open sides, such as 'e below'."""
  outside_2P = law.outside(np.where(np.isfinite(ends_2P), ends_2P, 0.0))
  outside_2P[~np.isfinite(ends_2P)] = np.nan
  unbounded = []
  for p, parameter in enumerate(law.parameters):
    # An exponent is minus the coefficient of the fit, so its ends change places.
    order = (1, 0) if parameter.kind == 'exponent' else (0, 1)
    for side, key, row in zip(('below', 'above'), ('profile_low', 'profile_high'), order, strict=True):
      params[parameter.name][key] = float(outside_2P[row, p])
      if np.isinf(ends_2P[row, p]):
        unbounded.append(f'{parameter.name} {side}')
  return unbounded


def _first(
  law: Law,
  u_NQ: Array,
  v_N: Array,
  theta_P: Array,
  covariance_PP: Array | None,
  bound: float,
  pick_E: Array,
  sign_E: Array,
) -> tuple[Array, Array, Array]:
  """Limits, directions (a unit along the constant) and first distances of all ends."""
  limit_P = np.empty(len(theta_P))
  at = 0
  level_JN = law.log_terms(theta_P[None], u_NQ)[:, 0]
  for level_N, f_NP in zip(level_JN, law.features(u_NQ), strict=True):
    spread_P = np.where(np.ptp(f_NP, axis=0) > 0, np.ptp(f_NP, axis=0), 1.0)
    # A constant at the origin of far-away logs moves a lot when an exponent moves a little.
    leverage = 1 + (np.abs(f_NP).max(axis=0) / spread_P).sum()
    limit_P[at : at + len(spread_P)] = (_FAR + np.abs(level_N - v_N.mean()).max()) * leverage / spread_P
    at += len(spread_P)
  reach_P = limit_P / 100
  along_PP = np.eye(len(theta_P))
  if covariance_PP is not None:
    variance_P = np.diagonal(covariance_PP)
    good = variance_P > 0
    reach_P = np.where(good, np.minimum(bound * np.sqrt(np.maximum(variance_P, 0)), reach_P), reach_P)
    along_PP[good] = covariance_PP[good] / variance_P[good, None]
  return limit_P[pick_E], sign_E[:, None] * along_PP[pick_E], np.maximum(reach_P, 1e-12)[pick_E]


def _next(inside: Array, outside: Array, low: Array, high: Array, limit: Array, bound: float) -> Array:
  """Distances to try: further out while no end is known, else between, by the secant but never close to a side."""
  with np.errstate(divide='ignore', invalid='ignore'):
    further = np.minimum(inside * np.clip(bound / low, 1.3, 4.0), limit)
    share = np.clip((bound - low) / (high - low), 0.1, 0.9)
    between = inside + np.where(np.isfinite(share), share, 0.5) * (outside - inside)
  return np.where(np.isfinite(outside), between, further)
