"""L_s(n), the law of the loss of several subjects s.

The question: does a larger subject need more latents for the same loss, or does its loss also fall with another
exponent? So the same points are fitted twice. In one fit all subjects share one exponent. In the other each has its
own. The level of the loss is each subject's own in both.

Either fit is one law over all points. What tells the subjects apart is a column for each of them, which is e in its own
rows and 1 in the others: its log, 1 or 0, switches a constant of that subject on or off.
"""

import dataclasses

import numpy as np
import pandas as pd
from scipy import special

from analysis import frames, table
from analysis.fit import Fit, fit_weighted
from analysis.fitting import solve, uncertainty
from analysis.law import Law, Parameter
from sae_jax import checks
from sae_jax.errors import UserError

_CLEAR = 0.05  # probability under a common exponent below which exponents are called different


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
  """Two fits to the same points: a common exponent, and separate ones."""

  subjects: tuple[str, ...]
  common: Fit
  separate: Fit

  @property
  def p_common(self) -> float:
    """Probability (F test) of a gain at least this large from separate exponents when all are the same."""
    small, large = (float(np.sum(fit.residuals() ** 2)) for fit in (self.common, self.separate))
    more = len(self.separate.theta_P) - len(self.common.theta_P)
    return uncertainty.nested(small, large, more, len(self.separate.table) - len(self.separate.theta_P))

  @property
  def verdict(self) -> str:
    """'separate', 'common' (nothing speaks against it) or 'undecided'."""
    if not np.isfinite(self.p_common):
      return 'undecided: as many constants as points'
    return 'separate' if self.p_common < _CLEAR else 'common'

  def exponents(self) -> pd.DataFrame:
    """One row a subject: exponent of n in the separate fit, and its 90 % interval from standard errors."""
    fit = self.separate
    u_NQ, v_N = np.log(table.positive(fit.table, fit.x)), np.log(table.positive(fit.table, [fit.y])[:, 0])
    residual_N, jacobian_NP = solve.at(fit.law, fit.theta_P, u_NQ, v_N)
    covariance_PP = uncertainty.covariance(residual_N, jacobian_NP)
    freedom = len(residual_N) - len(fit.theta_P)
    rows = []
    for s, subject in enumerate(self.subjects):
      pick_P = np.array([float(p.factors == (0,) or p.factors == (0, s)) for p in fit.law.parameters])
      value, reach = -float(pick_P @ fit.theta_P), np.nan
      if covariance_PP is not None:
        reach = special.stdtrit(freedom, uncertainty.TAILS[1]) * np.sqrt(pick_P @ covariance_PP @ pick_P)
      rows.append({'subject': subject, 'exponent': value, 'low': value - reach, 'high': value + reach})
    return pd.DataFrame(rows)


def fit_family(
  points: pd.DataFrame,
  by: str = 'subject',
  x: str = 'n_latents',
  y: str = 'nmse',
  *,
  floor: bool = False,
  seed: int = 0,
) -> Family:
  """Fits L_s(n) = a_s n^-b and L_s(n) = a_s n^-b_s, or with an irreducible loss e_s of each subject when `floor`.

  Points of one target (and one recipe) belong together. Intervals are from standard errors.

  Raises:
    UserError: fewer than two subjects, or a subject with fewer sizes than it has constants.
  """
  for name, column in (('by', by), ('x', x), ('y', y)):
    checks.text(name, column, 'give a column of the table')
  checks.truth('floor', floor)
  checks.seed(seed)
  frames.labels(frames.frame('points', points, [by]), by)
  table.positive(points, [x, y])
  subjects = tuple(sorted(points[by].astype(str).unique()))
  if len(subjects) < 2:
    raise UserError(f'{by} has {len(subjects)} value; a family needs at least two')
  least = 3 if floor else 2
  for subject, mine in points.groupby(points[by].astype(str)):
    if mine[x].nunique() < least:
      raise UserError(f'{by} {subject!r} has {mine[x].nunique()} sizes for its {least} constants; add sizes')
  inside = {f'is_{i}': np.where(points[by].astype(str) == s, np.e, 1.0) for i, s in enumerate(subjects) if i}
  frame = points.assign(**inside)
  columns = (x, *inside)
  fits = []
  for separate in (False, True):
    chosen = _law(subjects, separate, floor)
    fit = fit_weighted(
      frame,
      chosen,
      columns,
      y,
      np.ones((1, len(frame))),
      objective='logls',
      delta=np.inf,
      holdout=None,
      by='row',
      rng=np.random.default_rng(seed),
    )
    # The columns of the subjects are no variables, whose range would mean something.
    kept = [w for w in fit.warnings if w['code'] != 'short_range' or w['message'].startswith(f'{x} ')]
    fits.append(dataclasses.replace(fit, warnings=kept))
  return Family(subjects, *fits)


def _law(subjects: tuple[str, ...], separate: bool, floor: bool) -> Law:
  """Constants of the first subject, and of every other its difference to the first. Axis s is that of subject s."""
  first, others = subjects[0], list(enumerate(subjects))[1:]
  power = [Parameter('ln_a', f'log of the loss at n = 1, {first}', ())]
  power += [Parameter(f'ln_a_{s}', f'the same of {name}, less that of {first}', (s,)) for s, name in others]
  power += [Parameter('b', f'exponent of n{f", {first}" if separate else ""}', (0,), 'exponent')]
  if separate:
    power += [
      Parameter(f'b_{s}', f'exponent of {name}, less that of {first}', (0, s), 'exponent') for s, name in others
    ]
  terms = [tuple(power)]
  if floor:
    terms.append(
      (
        Parameter('ln_e', f'log of the irreducible loss, {first}', ()),
        *(Parameter(f'ln_e_{s}', f'the same of {name}, less that of {first}', (s,)) for s, name in others),
      )
    )
  kind = 'b_s' if separate else 'b'
  formula = f'L_s(n) = {"e_s + " if floor else ""}a_s n^-{kind}'
  axes = ('n_latents', *(f'is_{s}' for s, _ in others))
  # No floor is named: whether one is identified is a question to each subject's own power law.
  return Law(f'family_{"separate" if separate else "common"}', formula, formula, axes, tuple(terms), None)
