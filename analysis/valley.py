"""The bottom of a valley: a parabola of the log loss in the log of what was varied, and when there is no bottom.

A least value at the edge of what was tried is no minimum. A parabola that opens downwards has none. A valley flatter
than its scatter has no best value. Each is refused by name, never passed on as a number.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

from analysis.fitting.uncertainty import TAILS
from analysis.law import Array

FLAT = 0.003  # relative rise over the whole valley below which no choice is better than another
_NAMED = 6  # reasons given in a message


@dataclasses.dataclass(frozen=True)
class Valley:
  """Where the loss is least. All numbers but `curvature` are NaN unless `verdict` is 'minimum'.

  The 90 % interval is Fieller's, exact for a ratio of two coefficients; NaN when points are too few for one or the
  data allow any value.
  """

  verdict: str  # 'minimum', 'edge', 'maximum', 'flat', 'few'
  reason: str  # empty for a minimum
  x: float
  low: float
  high: float
  y: float  # loss at the minimum
  curvature: float  # of ln y over ln x, NaN with fewer than three values


def fit_valley(x_N: Array, y_N: Array, flat: float = FLAT) -> Valley:
  """The minimum of y over x, both positive; repeats of one x (seeds) are welcome.

  The parabola is through the logs of all points. Far from its bottom a valley is no parabola, so try values within a
  factor of ten or so.
  """
  u_N, v_N = np.log(np.asarray(x_N, float)), np.log(np.asarray(y_N, float))
  tried_S, where_N = np.unique(u_N, return_inverse=True)
  if len(tried_S) < 3:
    return _none('few', f'{len(tried_S)} values, a parabola needs 3', np.nan)
  mean_S = np.bincount(where_N, v_N) / np.bincount(where_N)
  center = tried_S.mean()  # keeps the columns of the parabola apart
  a_N3 = np.stack([np.ones_like(u_N), u_N - center, (u_N - center) ** 2], axis=1)
  coefficient_3 = np.linalg.lstsq(a_N3, v_N, rcond=None)[0]
  _, slope, curvature = coefficient_3
  squares, freedom = float(np.sum((v_N - a_N3 @ coefficient_3) ** 2)), len(v_N) - 3
  if np.ptp(mean_S) < flat:
    return _none('flat', f'the loss varies by {np.expm1(np.ptp(mean_S)):.2%} over all values', curvature)
  if freedom > 1 and squares > 0:  # one degree of freedom would refuse everything
    shape = (np.sum((v_N - v_N.mean()) ** 2) - squares) / 2 / (squares / freedom)
    if special.fdtr(2, freedom, shape) < 1 - 2 * TAILS[0]:
      return _none('flat', 'no valley stands out of the scatter', curvature)
  lowest = int(mean_S.argmin())
  if lowest in (0, len(tried_S) - 1):
    side = 'lowest' if lowest == 0 else 'highest'
    return _none('edge', f'the best value, {np.exp(tried_S[lowest]):.5g}, is the {side} tried', curvature)
  if curvature <= 0:
    return _none('maximum', 'the parabola opens downwards', curvature)
  bottom = center - slope / (2 * curvature)
  if not tried_S[0] < bottom < tried_S[-1]:
    return _none('edge', f'the parabola has its bottom at {np.exp(bottom):.5g}, outside the values tried', curvature)
  low, high = _fieller(slope, curvature, a_N3, squares, freedom)
  y = float(np.exp(coefficient_3[0] - slope**2 / (4 * curvature)))
  ends = (float(np.exp(end + center)) for end in (low, high))
  return Valley('minimum', '', float(np.exp(bottom)), *ends, y, float(curvature))


def refusals(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
  """What was refused and why, in a line: (its name, a row with `verdict` and `reason`); those alike are said once."""
  names: dict[str, list[str]] = {}
  for name, row in rows:
    names.setdefault(f'{row["verdict"]} ({row["reason"]})', []).append(name)
  said = [f'{", ".join(these)}: {why}' for why, these in names.items()]
  return '; '.join(said[:_NAMED]) + (f'; and {len(said) - _NAMED} other reasons' if len(said) > _NAMED else '')


def bottoms(u_N: Array, v_N: Array, weight_BN: Array) -> Array:
  """Log of the place of the minimum for every weighting of the points [B], NaN where it is an edge, hill or too few.

  The rules of `fit_valley` but for flatness, which is a property of the valley and not of a resample of it.
  """
  tried_S, where_N = np.unique(u_N, return_inverse=True)
  if len(tried_S) < 3:
    return np.full(len(weight_BN), np.nan)
  share_BS = np.stack([weight_BN[:, where_N == s].sum(axis=1) for s in range(len(tried_S))], axis=1)
  sum_BS = np.stack([weight_BN[:, where_N == s] @ v_N[where_N == s] for s in range(len(tried_S))], axis=1)
  on_BS = share_BS > 0
  mean_BS = np.where(on_BS, sum_BS / np.maximum(share_BS, 1), np.inf)
  first_B, last_B = on_BS.argmax(axis=1), len(tried_S) - 1 - on_BS[:, ::-1].argmax(axis=1)
  lowest_B = mean_BS.argmin(axis=1)
  enough_B = on_BS.sum(axis=1) >= 3
  center = tried_S.mean()
  a_N3 = np.stack([np.ones_like(u_N), u_N - center, (u_N - center) ** 2], axis=1)
  normal_B33 = np.einsum('bn,ni,nj->bij', weight_BN, a_N3, a_N3)
  normal_B33[~enough_B] = np.eye(3)
  right_B3 = weight_BN @ (a_N3 * v_N[:, None])
  coefficient_B3 = np.linalg.solve(normal_B33, right_B3[:, :, None])[:, :, 0]
  with np.errstate(divide='ignore', invalid='ignore'):
    bottom_B = center - coefficient_B3[:, 1] / (2 * coefficient_B3[:, 2])
  good_B = enough_B & (coefficient_B3[:, 2] > 0) & (lowest_B != first_B) & (lowest_B != last_B)
  good_B[good_B] &= (tried_S[first_B] < bottom_B)[good_B] & (bottom_B < tried_S[last_B])[good_B]
  return np.where(good_B, bottom_B, np.nan)


def _none(verdict: str, reason: str, curvature: float) -> Valley:
  return Valley(verdict, reason, np.nan, np.nan, np.nan, np.nan, float(curvature))


def _fieller(slope: float, curvature: float, a_N3: Array, squares: float, freedom: int) -> tuple[float, float]:
  """The values t with |slope + 2 t curvature| within its own 90 % reach: an interval, or NaN when unbounded."""
  if freedom < 1:
    return np.nan, np.nan
  cov = squares / freedom * np.linalg.inv(a_N3.T @ a_N3)
  reach = special.stdtrit(freedom, TAILS[1]) ** 2
  square = 4 * (curvature**2 - reach * cov[2, 2])
  linear = 4 * (slope * curvature - reach * cov[1, 2])
  constant = slope**2 - reach * cov[1, 1]
  inside = linear**2 - 4 * square * constant
  if square <= 0 or inside < 0:
    return np.nan, np.nan
  root = np.sqrt(inside)
  return (-linear - root) / (2 * square), (-linear + root) / (2 * square)
