"""What a fit does not know: standard errors, correlations, intervals, and whether the irreducible loss is a guess."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import special

from analysis import table
from analysis.law import Array, Law

LEVEL = 0.9  # of every interval
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
_WINDOW = 1.0  # half-width, in standard deviations, within which small residuals of Huber are counted
_VAGUE = np.log(4)  # reach of the log of an irreducible loss beyond which it may as well be none


class Estimate(NamedTuple):
  """A number with its 90 % interval, NaN where that is not known."""

  value: float
  low: float
  high: float

  @classmethod
  def of(cls, value: Array, draws_B: Array) -> 'Estimate':
    """The interval is from the percentiles of draws. It is not known where one of them is not."""
    ends = (np.nan, np.nan) if np.isnan(draws_B).any() else np.quantile(draws_B, TAILS, method='nearest')
    return cls(float(value), float(ends[0]), float(ends[1]))

  @property
  def known(self) -> bool:
    return not np.isnan([*self]).any()

  def __str__(self) -> str:
    """As many digits as the interval deserves."""
    width = self.high - self.low
    plain = 1e-5 < width < 1e6 and abs(self.value) < 1e6
    form = f',.{max(0, 1 - int(np.floor(np.log10(width))))}f' if plain else '.3g'
    ends = f' [{self.low:{form}}, {self.high:{form}}]' if self.known else ''
    return f'{self.value:{form}}{ends}'.replace('inf', 'unbounded')


def covariance(residual_N: Array, jacobian_NP: Array, delta: float = np.inf) -> Array | None:
  """Covariance of the estimates in fit coordinates; None when the points do not determine it.

  Least squares has s^2 (J^T J)^-1.

  Huber has the sandwich A^-1 B A^-1 of an M-estimate (Huber 1973) with slope psi = min(|r|, delta) sign r. In it,
  B = sum psi^2 / (N - P) J^T J and A = m J^T J, where m is the mean of psi': the share of residuals within delta. Where
  delta is below the noise few residuals are, and the constants draw P of them there. So m is counted within a wider
  window, less those P, and scaled by delta over the half-width of the window.

  With delta beyond all residuals both are the same. Both assume independent residuals of one distribution, of which
  outliers may be part.
  """
  count, width = jacobian_NP.shape
  if count <= width or np.linalg.cond(jacobian_NP) > 1e10:
    return None
  slope, size_N = 1.0, np.abs(residual_N)
  if (size_N > delta).any():
    spread = np.median(size_N) / special.ndtri(0.75) * np.sqrt(count / (count - width))  # no outlier moves it
    window = max(delta, _WINDOW * spread)
    slope = ((size_N <= window).sum() - width) / (count - width) * delta / window
    if slope <= 0:
      return None
  squares = np.sum(np.minimum(size_N, delta) ** 2) / slope**2
  return squares / (count - width) * np.linalg.inv(jacobian_NP.T @ jacobian_NP)


def band(
  law: Law,
  theta_P: Array,
  draws_BP: Array,
  covariance_PP: Array | None,
  freedom: int,
  u_MQ: Array,
  residual_N: Array | None = None,
) -> tuple[Array, Array]:
  """Ends [M] of the 90 % interval of the log loss at points: of the law, or of one new observation with `residual_N`.

  It is the wider, at each end, of two. One is from resampled laws. For a new observation, resampled residuals are added
  to them, scaled for the constants that were fitted. Alone it is too narrow on few points, where resamples leave out
  whole sizes. The other is from standard errors with Student's t. Alone it knows nothing of a curved law far away. The
  ends are NaN where there is neither.
  """
  f_MM, gradient_MMP, _ = law.log_prediction(theta_P[None], u_MQ)
  center_M, gradient_MP = f_MM[0], gradient_MMP[0]
  nothing_M = np.full(len(u_MQ), np.nan)
  lows, highs = [nothing_M], [nothing_M]
  if freedom > 0 and covariance_PP is not None:
    scatter = 0.0 if residual_N is None else residual_N @ residual_N / freedom
    variance_M = scatter + np.einsum('mp,pq,mq->m', gradient_MP, covariance_PP, gradient_MP)
    reach_M = special.stdtrit(freedom, TAILS[1]) * np.sqrt(np.maximum(variance_M, 0))
    lows.append(center_M - reach_M)
    highs.append(center_M + reach_M)
  if len(draws_BP) and (residual_N is None or freedom > 0):
    drawn_BM = law.log_prediction(draws_BP, u_MQ)[0]
    if residual_N is not None:
      noise_N = residual_N * np.sqrt(len(residual_N) / freedom)
      drawn_BM = (drawn_BM[:, None] - noise_N[:, None]).reshape(-1, len(u_MQ))
    low_M, high_M = np.quantile(drawn_BM, TAILS, axis=0)
    # The law itself is among what is possible, which the percentiles of few resamples may miss.
    lows.append(np.minimum(low_M, center_M))
    highs.append(np.maximum(high_M, center_M))
  return np.fmin.reduce(lows), np.fmax.reduce(highs)


def derived(
  value: Callable[[Array], Array], theta_P: Array, draws_BP: Array, covariance_PP: Array | None, freedom: int
) -> Estimate:
  """A number made of the constants [M, P] in fit coordinates; its interval is the wider, at each end, as of `band`."""
  center = float(value(theta_P[None])[0])
  lows, highs = [np.nan], [np.nan]
  if freedom > 0 and covariance_PP is not None:
    step_P = 1e-3 * np.sqrt(np.diagonal(covariance_PP)) + 1e-12
    ahead_P, behind_P = (value(theta_P + sign * np.diag(step_P)) for sign in (1, -1))
    with np.errstate(invalid='ignore'):  # where the number itself is infinite
      gradient_P = (ahead_P - behind_P) / (2 * step_P)
      reach = special.stdtrit(freedom, TAILS[1]) * np.sqrt(gradient_P @ covariance_PP @ gradient_P)
    lows.append(center - reach)
    highs.append(center + reach)
  if len(draws_BP):
    low, high = np.quantile(value(draws_BP), TAILS, method='nearest')
    lows.append(min(low, center))
    highs.append(max(high, center))
  return Estimate(center, float(np.fmin.reduce(lows)), float(np.fmax.reduce(highs)))


def correlation(jacobian_NP: Array) -> list[list[float]] | None:
  if len(jacobian_NP) < jacobian_NP.shape[1] or np.linalg.cond(jacobian_NP) > 1e10:
    return None
  inverse = np.linalg.inv(jacobian_NP.T @ jacobian_NP)
  scale = np.sqrt(np.diagonal(inverse))
  return (inverse / scale / scale[:, None]).tolist()


def params(
  law: Law, theta_P: Array, draws_BP: Array, covariance_PP: Array | None, freedom: int, profile_2P: Array | None = None
) -> tuple[dict[str, dict[str, float]], str]:
  """Every constant's estimate with the interval to quote, and how the intervals were made.

  The interval reaches from `low` to `high`. It is the wider, at each end, of two. One is from the percentiles of
  resamples. Alone it is too narrow on the few points that a sweep has (LOG.md has the coverage). The other is from
  standard errors. Without resamples it is from standard errors alone.

  In two cases the profile stands in for standard errors. There are none: the points do not determine the covariance. Or
  the constant is an irreducible loss that is not identified: its standard error is so large that its end would lie
  above the data, and its resamples may all end at nothing, or all at the estimate.

  This interval exists for every objective, and it holds where points are not independent, for whole runs or settings
  are resampled. The profile beside it needs independent residuals and least squares. It shows curvature, and which side
  of a constant nothing bounds.

  Args:
    theta_P: the estimates in fit coordinates.
    draws_BP: the same of every resample; none may have been made.
    covariance_PP: of the estimates; None where the points do not determine it.
    freedom: points beyond the constants.
    profile_2P: as from `likelihood_profile.ends`.

  Returns:
    By name of the constant its estimate, low, high and standard_error; and the method in words, 'none' where there are
    no intervals.
  """
  estimate_P = law.outside(theta_P[None])[0]
  deviation_P = np.full(len(theta_P), np.nan) if covariance_PP is None else np.sqrt(np.diagonal(covariance_PP))
  slope_P = np.array([p.slope(t) for p, t in zip(law.parameters, theta_P, strict=True)])
  reach_P = special.stdtrit(freedom, TAILS[1]) * deviation_P if freedom > 0 else deviation_P
  errors_2P = law.outside(np.stack([theta_P - reach_P, theta_P + reach_P]))
  if not len(draws_BP):
    ends_2P = np.sort(errors_2P, axis=0)
    method = 'none' if covariance_PP is None else 'standard errors'
  else:
    # The estimate is among them because the percentiles of few resamples may miss it.
    candidates = [np.quantile(law.outside(draws_BP), TAILS, axis=0), estimate_P[None]]
    method = 'bootstrap'
    if freedom > 0:
      floor_P = np.array([j == law.floor and p.kind == 'amplitude' for j, term in enumerate(law.terms) for p in term])
      instead_P = np.isnan(reach_P) | (floor_P & (reach_P > _VAGUE))
      candidates.append(np.where(instead_P, _profiled(law, profile_2P, estimate_P), errors_2P))
      if covariance_PP is not None:
        method = 'bootstrap or standard errors, the wider'
      elif profile_2P is not None and np.isfinite(profile_2P).any():
        method = 'bootstrap or profile, the wider'
    ends_2P = np.sort(np.concatenate(candidates), axis=0)[[0, -1]]
  columns = (estimate_P, ends_2P[0], ends_2P[1], np.abs(slope_P) * deviation_P)
  keys = ('estimate', 'low', 'high', 'standard_error')
  return {
    name: dict(zip(keys, values, strict=True))
    for name, *values in zip(law.names, *(c.tolist() for c in columns), strict=True)
  }, method


def _profiled(law: Law, profile_2P: Array | None, estimate_P: Array) -> Array:
  """Ends [2, P] of the profile as published constants; the estimate where there is none, 0 where an amplitude may vanish."""
  if profile_2P is None:
    return np.stack([estimate_P, estimate_P])
  amplitude_P = np.array([p.kind == 'amplitude' for p in law.parameters])
  known_2P = np.isfinite(profile_2P) | (np.isneginf(profile_2P) & amplitude_P)
  return np.where(known_2P, law.outside(np.where(known_2P, profile_2P, 0.0)), estimate_P)


def interval_warnings(params: dict[str, dict[str, float]], method: str) -> list[dict[str, str]]:
  """Says when intervals are missing or unbounded."""
  if method == 'none':
    return [table.warning('no_interval', 'no resamples and no standard errors: intervals are unknown')]
  ends = [value for p in params.values() for value in (p['low'], p['high'])]
  if not np.isfinite(ends).all():
    return [table.warning('not_finite', 'an interval is unbounded: the data do not determine that constant')]
  return []


def data_warnings(log_range: dict[str, float], settings: int, width: int, agreement: float) -> list[dict[str, str]]:
  """Says when a variable spans less than a decade, when points are few, and when starts end in different places."""
  out = []
  for column, log_factor in log_range.items():
    if log_factor < np.log(10):
      text = f'{column} spans a factor of {np.exp(log_factor):.3g}, less than a decade'
      out.append(table.warning('short_range', text))
  if settings < 2 * width:
    text = f'{settings} different points for {width} constants: the intervals rest on little'
    out.append(table.warning('few_points', text))
  if agreement < 0.5:
    out.append(table.warning('starts_disagree', f'only {agreement:.0%} of starts reach the best objective'))
  return out


def floor_is_loose(law: Law, low_P: Array) -> bool:
  """Whether the profile of the irreducible loss has no lower end: the points do not exclude that there is none."""
  if law.floor is None:
    return False
  first = sum(len(term) for term in law.terms[: law.floor])
  constant = [p.factors for p in law.terms[law.floor]].index(())
  return bool(np.isneginf(low_P[first + constant]))


def floor_warnings(
  law: Law, u_NQ: Array, theta_P: Array, draws_BP: Array, covariance_PP: Array | None, loose: bool = False
) -> list[dict[str, str]]:
  """Says when the irreducible loss is a guess: at the largest point, its interval spans a factor of four, or its
  profile has no lower end (`loose`)."""
  if law.floor is None:
    return []
  corner_1Q = u_NQ.max(axis=0, keepdims=True)
  level = law.log_terms(theta_P[None], corner_1Q)[law.floor, 0, 0]
  share = np.exp(level - law.log_prediction(theta_P[None], corner_1Q)[0][0, 0])
  first = sum(len(term) for term in law.terms[: law.floor])
  gradient = law.features(corner_1Q)[law.floor][0]
  part = slice(first, first + len(gradient))
  if len(draws_BP):
    width = np.ptp(np.quantile(law.log_terms(draws_BP, corner_1Q)[law.floor, :, 0], TAILS))
  elif covariance_PP is not None:
    width = 2 * special.ndtri(TAILS[1]) * np.sqrt(gradient @ covariance_PP[part, part] @ gradient)
  else:
    width = np.inf
  if width < _VAGUE and share > 0.01 and not loose:
    return []
  if share <= 0.01:
    text = 'the fit leaves no irreducible loss, which does not show that there is none'
  else:
    text = f'the irreducible loss is {share:.0%} of the loss at the largest point and its 90 % interval '
    if not np.isfinite(width):
      text += 'is unknown'
    else:
      text += f'spans a factor of {np.exp(width):.3g}' if width < np.log(1000) else 'reaches down to nothing'
    text += '; do not read it as a limit'
  if loose:
    text += '; its profile is unbounded below: the points do not exclude that there is none'
  return [table.warning('asymptote_not_identified', text)]


def nested(small: float, large: float, more: int, freedom: int) -> float:
  """Probability (F test) of a gain at least this large when the smaller of two nested laws is right.

  Args:
    small, large: sums of squared residuals under the law with fewer and with `more` more constants.
    freedom: points beyond the constants of the larger; NaN is returned below 1.
  """
  if freedom < 1:
    return float('nan')
  gain = max(small - large, 0.0) / more / (max(large, 1e-300) / freedom)
  return float(special.fdtrc(more, freedom, gain))


NO_AICC = 'AICc is of a likelihood, which the Huber objective with a chosen delta is not'


def aicc(squares: float, count: int, width: int) -> float | None:
  """Akaike's criterion with its small-sample correction, of least squares; None when points are too few.

  The variance counts as one more parameter. Fits by Huber have none (`NO_AICC` says why).
  """
  p = width + 1
  return (
    count * np.log(squares / count) + 2 * p + 2 * p * (p + 1) / (count - p - 1)
    if count > p + 1 and squares > 0
    else None
  )
