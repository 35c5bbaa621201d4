"""Several curves in one table: a fit to each of them, and one law that they have in common.

In the common law, exponents are shared and levels are not. An exponent is a constant that multiplies the log of a
variable. A level multiplies none: e, a, alpha, zeta. So every curve has a level of its own.

The common law is solved like any other. A column for each curve is e in its own rows and 1 in the others: its log, 1 or
0, switches the level of that curve on or off.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import frames, laws, table
from analysis.fit import fit_law, fit_weighted, resamples, with_holdout
from analysis.fit_result import Fit
from analysis.fitting import solve, uncertainty
from analysis.law import Law
from sae_jax import checks
from sae_jax.errors import UserError

Array = np.ndarray

_MOST = 20  # curves; more is a column that names rows
_CLEAR = 0.05  # probability under common exponents below which they are called different


@dataclasses.dataclass(frozen=True, eq=False)
class Grouped:
  """A fit to each curve, in `where[by]` the value that it has of the column, and the common law."""

  by: str
  fits: tuple[Fit, ...]
  common: Fit
  p_common: float  # of a gain at least this large from exponents of their own were all the same; NaN when not known

  def to_json(self) -> list[dict[str, Any]]:
    """An entry of laws.json for each curve, then one for the common law."""
    return [fit.to_json() for fit in (*self.fits, self.common)]

  def summary(self) -> str:
    """Lines for a terminal, without the warnings."""
    same = f'p = {self.p_common:.2g}' if np.isfinite(self.p_common) else 'not tested'
    head = f'common exponents of {len(self.fits)} values of {self.by} (equal exponents: {same})'
    return '\n'.join([*(fit.summary() for fit in self.fits), head, self.common.summary()])


def fit_by(
  points: pd.DataFrame,
  by: str,
  law: str = 'joint_nk',
  x: Sequence[str] | None = None,
  y: str = 'nmse',
  *,
  objective: str = 'logls',
  delta: float = 1e-3,
  bootstrap: int = 500,
  holdout: str | None = None,
  group: str | None = None,
  seed: int = 0,
) -> Grouped:
  """Fits a law to the rows of each value of a column, and one with common exponents to all of them.

  The other arguments are those of `fit_law`. Resamples of the common law are drawn inside each value. Its constants
  are named after theirs: 'a[small]', 'a[large]', 'b'.

  Raises:
    UserError: the column does not tell 2 to 20 curves apart, or one of them cannot carry the law.
  """
  chosen = laws.named(law)
  checks.text('by', by, 'give the column that tells curves apart')
  checks.text('y', y, 'give the column of the loss')
  columns = chosen.axes if x is None else checks.texts('x', x, "x=['n_latents', 'k']")
  values = _values(frames.frame('points', points), by, (*columns, y))
  points = table.useful(points)
  held_N = None if holdout is None else table.held_out(points, holdout)
  if held_N is not None and (held_N.all() or not held_N.any()):
    what = 'every row' if held_N.any() else 'nothing'
    raise UserError(f'holdout {holdout!r} holds {what} out; choose a bound inside the data')
  curve_N = points[by].astype(str).to_numpy()
  fits, weights = [], []
  rng = np.random.default_rng(checks.seed(seed))
  for value in values:
    mine = points[curve_N == value]

    def own(rule: str | None, mine: pd.DataFrame = mine) -> Fit:
      return fit_law(
        mine, law, x, y, objective=objective, delta=delta, bootstrap=bootstrap, holdout=rule, group=group, seed=seed
      )

    try:
      fit = with_holdout(own, holdout) if holdout is not None else own(None)
      weights.append(resamples(mine, chosen, fit.x, group, bootstrap, rng)[0])
    except UserError as error:
      raise UserError(f'{by}={value}: {error}') from None
    one = mine[by].iloc[0]
    fits.append(dataclasses.replace(fit, where={by: one.item() if isinstance(one, np.generic) else str(one)}))
  columns = fits[0].x

  def all_of(rule: str | None) -> Fit:
    return _common(points, chosen, columns, y, by, values, weights, objective, delta, rule, rng)

  common = with_holdout(all_of, holdout) if holdout is not None else all_of(None)
  p = float('nan')
  if objective == 'logls':
    small, large = (float(sum(np.sum(fit.residuals() ** 2) for fit in some)) for some in ((common,), fits))
    constants = sum(len(fit.theta_P) for fit in fits)
    p = uncertainty.nested(small, large, constants - len(common.theta_P), len(points) - constants)
  if p < _CLEAR:
    text = f'the exponents of the values of {by} differ (p = {p:.1g}): read those of each fit, not the common ones'
    common = common.warned(table.warning('exponents_differ', text))
  common = dataclasses.replace(common, diagnostics=common.diagnostics | {'p_common': p})
  return Grouped(by, tuple(fits), common, p)


def _values(points: pd.DataFrame, by: str, used: tuple[str, ...]) -> tuple[str, ...]:
  if by not in points.columns:
    raise UserError(f'no column {by!r} in the table; it has {", ".join(map(str, points.columns))}')
  if by in used:
    raise UserError(f'--by={by} is a variable of the fit; group by another column, or leave it out of --x and --y')
  if points[by].isna().any():
    raise UserError(f'{by} is missing in {int(points[by].isna().sum())} rows; fill it in or leave them out')
  values = tuple(dict.fromkeys(table.useful(points)[by].astype(str)))
  if not 2 <= len(values) <= _MOST:
    raise UserError(f'--by={by} has {len(values)} values, not 2 to {_MOST}; name the column that tells curves apart')
  return values


def _common(
  points: pd.DataFrame,
  law: Law,
  x: tuple[str, ...],
  y: str,
  by: str,
  values: tuple[str, ...],
  weights: list[Array],
  objective: str,
  delta: float,
  holdout: str | None,
  rng: np.random.Generator,
) -> Fit:
  curve_N = points[by].astype(str).to_numpy()
  inside = [f'{by}={value}' for value in values]
  frame = points.assign(
    **{name: np.where(curve_N == value, np.e, 1.0) for name, value in zip(inside, values, strict=True)}
  )
  weight_BN = np.ones((min(map(len, weights)), len(points)))
  for value, own_BN in zip(values, weights, strict=True):
    weight_BN[:, curve_N == value] = own_BN[: len(weight_BN)]
  held = None
  if holdout is not None:
    test_N = table.held_out(points, holdout)
    if missing := [value for value in values if not (~test_N & (curve_N == value)).any()]:
      raise UserError(f'{holdout!r} holds out every row of {by}={missing[0]}')
    held = (holdout, (~test_N).astype(float), test_N)
  solved, shown, parts = _laws(law, by, values, inside)
  fit = fit_weighted(
    frame,
    solved,
    (*x, *inside[1:]),
    y,
    weight_BN,
    objective=objective,
    delta=delta,
    holdout=held,
    by=f'row within {by}',
    rng=rng,
  )
  shown_fit = _by_curve(fit, shown, parts, (*x, *inside), delta if objective == 'huber' else np.inf)
  return dataclasses.replace(shown_fit, diagnostics=shown_fit.diagnostics | {'by': by, 'values': list(values)})


def _laws(law: Law, by: str, values: tuple[str, ...], inside: list[str]) -> tuple[Law, Law, dict[str, tuple[str, ...]]]:
  """The common law twice, and of every constant of the second the constants of the first whose sum it is.

  The first has the constants of the first curve and differences to it, and is solved for. The second has those of
  every curve, and is read.
  """
  solved, read = ([[] for _ in law.terms] for _ in range(2))
  parts = {}
  for j, p in ((j, p) for j, term in enumerate(law.terms) for p in term):
    solved[j].append(p)
    if p.factors:
      read[j].append(p)
      parts[p.name] = (p.name,)
      continue
    for s, value in enumerate(values):
      own = dataclasses.replace(
        p, name=f'{p.name}[{value}]', factors=(len(law.axes) + s,), meaning=f'{p.meaning}; of {by} = {value}'
      )
      read[j].append(own)
      parts[own.name] = (p.name, own.name) if s else (p.name,)
      if s:
        solved[j].append(dataclasses.replace(own, factors=(len(law.axes) + s - 1,)))
  formula = f'{law.formula}, with {", ".join(p.name for p in law.parameters if not p.factors)} of each {by}'
  both = [
    # No floor is named: whether one is identified is a question to each curve's own fit.
    Law(law.name, formula, law.latex, (*law.axes, *columns), tuple(map(tuple, terms)), None, len(columns))
    for terms, columns in ((solved, inside[1:]), (read, inside))
  ]
  return both[0], both[1], parts


def _by_curve(fit: Fit, shown: Law, parts: dict[str, tuple[str, ...]], x: tuple[str, ...], delta: float) -> Fit:
  """The same fit with the constants of every curve in place of differences to the first."""
  change_PP = np.array([[float(name in parts[p.name]) for name in fit.law.names] for p in shown.parameters])
  theta_P, draws_BP = change_PP @ fit.theta_P, fit.draws_BP @ change_PP.T
  u_NQ, v_N = np.log(table.positive(fit.table, x)), np.log(table.positive(fit.table, [fit.y])[:, 0])
  residual_N, jacobian_NP = solve.at(shown, theta_P, u_NQ, v_N)
  covariance_PP = uncertainty.covariance(residual_N, jacobian_NP, delta)
  params, method = uncertainty.params(shown, theta_P, draws_BP, covariance_PP, fit.freedom)
  spread = fit.diagnostics['start_spread']
  diagnostics = fit.diagnostics | {
    'profile': None,
    'interval': fit.diagnostics['interval'] | {'method': method},
    'start_spread': {p.name: spread[p.name] for p in shown.parameters if parts[p.name] == (p.name,)},
    'condition_number': float(np.linalg.cond(jacobian_NP)),
    'correlation': uncertainty.correlation(jacobian_NP),
  }
  # The columns of the curves are no variables, whose range would mean something.
  ranges = tuple(f'{column} spans' for column in x[len(x) - shown.inner :])
  kept = [
    w for w in fit.warnings if w['code'] not in ('no_interval', 'not_finite') and not w['message'].startswith(ranges)
  ]
  held = fit.holdout and {k: v for k, v in fit.holdout.items() if k != 'params'}
  return dataclasses.replace(
    fit,
    law=shown,
    x=x,
    params=params,
    diagnostics=diagnostics,
    holdout=held,
    theta_P=theta_P,
    draws_BP=draws_BP,
    covariance_PP=covariance_PP,
    warnings=[*kept, *uncertainty.interval_warnings(params, method)],
  )
