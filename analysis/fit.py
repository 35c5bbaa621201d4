"""Fits a law to a table: many starts, bootstrap intervals, a held-out error, and warnings as data.

Residuals are of the log loss, in float64; the objective is the sum over points (of squares / 2, or Huber).
All starts and all resamples are solved together by one batched Levenberg-Marquardt.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import laws, solve, table, uncertainty
from sae_jax import files
from sae_jax.errors import UserError, one_line_errors

Array = np.ndarray

_MOST_RESAMPLES = 100_000


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
  """A law with estimates, intervals, diagnostics and the points it was fitted to."""

  law: laws.Law
  x: tuple[str, ...]
  y: str
  objective: str
  params: dict[str, dict[str, float]]  # name -> estimate, low, high, standard_error (NaN when unknown)
  start_agreement: float  # share of starts within 1 % of the best objective
  diagnostics: dict[str, Any]
  holdout: dict[str, Any] | None  # rule, mean_rel_err, max_rel_err, … of a refit without the held-out points
  warnings: list[dict[str, str]]
  table: pd.DataFrame  # the points
  theta_P: Array  # estimates in fit coordinates
  draws_BP: Array  # the same for every resample; empty without bootstrap
  where: dict[str, float] = dataclasses.field(default_factory=dict)  # common to all points, e.g. {'k': 32}

  @property
  def label(self) -> str:
    """Such as 'L(n), k = 8'."""
    symbols = ', '.join(laws.SYMBOLS.get(column, column) for column in self.x)
    return f'L({symbols})' + ''.join(f', {key} = {value:g}' for key, value in self.where.items())

  def predict(self, at: pd.DataFrame | Mapping[str, Any]) -> Array:
    """Loss [N] at the rows of a table, or at scalars or arrays by column name."""
    return np.exp(self.law.log_prediction(self.theta_P[None], self._logs(at))[0][0])

  def band(self, at: pd.DataFrame | Mapping[str, Any]) -> tuple[Array, Array]:
    """Bounds [N] of the 90 % interval of the law itself; NaN without bootstrap. It widens away from the data."""
    u_NQ = self._logs(at)
    if not len(self.draws_BP):
      return np.full(len(u_NQ), np.nan), np.full(len(u_NQ), np.nan)
    low, high = np.quantile(self.law.log_prediction(self.draws_BP, u_NQ)[0], uncertainty.TAILS, axis=0)
    return np.exp(low), np.exp(high)

  def warned(self, *more: dict[str, str]) -> 'Fit':
    """The same fit with more warnings."""
    return dataclasses.replace(self, warnings=[*self.warnings, *more])

  def residuals(self) -> Array:
    """ln predicted - ln observed [N] at the points of the fit."""
    return np.log(self.predict(self.table)) - np.log(table.positive(self.table, [self.y])[:, 0])

  def to_json(self) -> dict[str, Any]:
    """An entry of laws.json: strict JSON, null where a number is unknown."""
    record = {
      'law': self.law.name, 'formula': self.law.formula, 'x': list(self.x), 'y': self.y, 'where': self.where,
      'params': self.params, 'meaning': {p.name: p.meaning for p in self.law.parameters},
      'objective': self.objective, 'n_points': len(self.table), 'start_agreement': self.start_agreement,
      'holdout': self.holdout, 'warnings': self.warnings,
    }  # fmt: skip
    return _strict(record | self.diagnostics)

  def summary(self) -> str:
    """Lines for a terminal: the law, every constant with its interval, the checks; not the warnings."""
    over = f'{self.law.name}: {self.y} over {", ".join(self.x)}, {len(self.table)} points'
    lines = [f'{self.label}   ({over})', f'  {self.law.formula}']
    for name, p in self.params.items():
      estimate, low, high = (p[key] if not abs(p[key]) < 1e-6 else 0.0 for key in ('estimate', 'low', 'high'))
      lines.append(f'  {name:7s} {estimate:12.5g}   90 % interval {low:.5g} to {high:.5g}')
    lines.append(
      f'  rms log residual {self.diagnostics["rms_log_residual"]:.5f}; {self.objective}; '
      f'{self.start_agreement:.0%} of starts agree; interval by {self.diagnostics["interval"]["method"]}'
    )
    if self.holdout:
      lines.append('  held out: ' + self.holdout_text())
    return '\n'.join(lines)

  def holdout_text(self) -> str:
    """The held-out error in a sentence; empty when nothing was held out."""
    if not self.holdout:
      return ''
    h = self.holdout
    return (
      f'{h["n_held_out"]} with {h["rule"]} predicted from the other {h["n_fitted"]}, '
      f'error {h["mean_rel_err"]:.2%} on average, {h["max_rel_err"]:.2%} at most'
    )

  def _logs(self, at: pd.DataFrame | Mapping[str, Any]) -> Array:
    if not isinstance(at, pd.DataFrame):
      at = pd.DataFrame({key: np.ravel(value) for key, value in at.items()})
    return np.log(table.positive(at, self.x))


def warning_lines(fits: Sequence[Fit]) -> list[str]:
  """One line a kind of warning: its code, the first message, and the fits it holds for when there are several."""
  lines = []
  for code in dict.fromkeys(w['code'] for fit in fits for w in fit.warnings):
    hits = [(fit.label, w['message']) for fit in fits for w in fit.warnings if w['code'] == code]
    labels = '; '.join(dict.fromkeys(label for label, _ in hits))
    lines.append(f'{code}: {hits[0][1]}' + (f' [{labels}]' if len(fits) > 1 else ''))
  return lines


def with_holdout(fit: Callable[[str | None], Fit], holdout: str | None) -> Fit:
  """`fit(holdout)`, or `fit(None)` with a warning where the rows left after holding out cannot carry the law.

  Raises `UserError` when not even all rows can.
  """
  if holdout is None:
    return fit(None).warned(table.warning('no_holdout', 'no held-out error: there is one size'))
  try:
    return fit(holdout)
  except UserError as error:
    reason = str(error)
  return fit(None).warned(table.warning('no_holdout', f'no held-out error: {reason}'))


def fit_law(
  points: pd.DataFrame,
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
) -> Fit:
  """Fits a law to all rows of a table.

  Args:
    points: the table; other columns are carried along.
    law: a name in `laws.LAWS`.
    x: columns in the order of the law's axes; by default those the law is named after. Any columns do: the loss of a
      language model against NMSE is law='growth', x=['nmse'].
    y: column of the loss.
    objective: 'logls' (least squares) or 'huber' on the log of the loss.
    delta: where Huber turns from squares to absolute values, in log loss.
    bootstrap: number of resamples behind the intervals; 0 takes them from standard errors.
    holdout: one comparison, e.g. 'n_latents>65536'. Those rows are predicted by a second fit to the other rows;
      the constants reported are always those of all rows.
    group: resample by the values of this column, for rows that are not independent (one run's checkpoints).
    seed: of starts and resamples.

  Raises:
    UserError: the table cannot carry this fit.
  """
  chosen = laws.named(law)
  if not 0 <= bootstrap <= _MOST_RESAMPLES:
    raise UserError(
      f'bootstrap={bootstrap} is not in 0..{_MOST_RESAMPLES}; some hundreds do, 0 uses standard errors'
    )
  columns = tuple(x or chosen.axes)
  if sorted(columns) == sorted(chosen.axes):
    columns = chosen.axes  # these names say which axis they are, so their order cannot go wrong
  rng = np.random.default_rng(seed)
  label_N = solve.labels(points, group)
  setting_N = solve.settings(chosen, table.positive(points, columns), columns)
  weight_BN = solve.resamples(label_N, setting_N, len(chosen.names), bootstrap, rng)
  held = None
  if holdout:
    test_N = table.matching(points, holdout)
    held = (holdout, (~test_N).astype(float), test_N)
  by = group or 'row'
  fit = fit_weighted(
    points, chosen, columns, y, weight_BN, objective=objective, delta=delta, holdout=held, by=by, rng=rng
  )  # fmt: skip
  share = np.bincount(label_N).max() / len(label_N)
  if group and share > 0.5:
    return fit.warned(table.warning('one_run_dominates', f'one {group} holds {share:.0%} of the points'))
  return fit


def fit_weighted(
  points: pd.DataFrame,
  law: laws.Law,
  x: tuple[str, ...],
  y: str,
  weight_BN: Array,
  *,
  objective: str,
  delta: float,
  holdout: tuple[str, Array, Array] | None,
  by: str,
  rng: np.random.Generator,
) -> Fit:
  """The fit behind `fit_law`, with the data and its resamples given as weights of the rows.

  Args:
    weight_BN: row 0 selects the points; every other row is a resample of them.
    holdout: a rule in words, weights [N] to fit with and a mask [N] of the points to predict.
    by: what was resampled, in words.
  """
  if objective not in ('logls', 'huber'):
    raise UserError(f'objective {objective!r} is not known; use logls or huber')
  if objective == 'huber' and not (np.isfinite(delta) and delta > 0):
    raise UserError(f'delta={delta} is not a positive number; the usual choice is 1e-3')
  delta = delta if objective == 'huber' else np.inf
  xy = table.positive(points, [*x, y])
  u_NQ, v_N = np.log(xy[:, :-1]), np.log(xy[:, -1])
  used = weight_BN[0] > 0
  settings = len(np.unique(solve.settings(law, xy[used, :-1], x)))

  theta_P, value, agreement, spread_P = solve.estimate(law, u_NQ, v_N, weight_BN[0], delta, rng)
  draws_BP = solve.refit(law, u_NQ, v_N, weight_BN[1:], theta_P, delta, rng)
  residual_N, jacobian_NP = solve.at(law, theta_P, u_NQ[used], v_N[used])
  covariance_PP = uncertainty.covariance(residual_N, jacobian_NP) if objective == 'logls' else None
  count, width = len(residual_N), len(law.names)
  params, method = uncertainty.params(law, theta_P, draws_BP, covariance_PP, count - width)

  found = list(points.attrs.get('warnings', []))
  found += [w for w in table.version_warnings(points[used]) if w not in found]
  found += uncertainty.interval_warnings(params, method)
  found += uncertainty.floor_warnings(law, u_NQ[used], theta_P, draws_BP, covariance_PP)
  found += uncertainty.data_warnings(
    dict(zip(x, np.ptp(u_NQ[used], axis=0), strict=True)), settings, width, agreement
  )
  held = _held_out(law, x, u_NQ, v_N, holdout, delta, rng) if holdout else None
  diagnostics = {
    'delta': delta if objective == 'huber' else None,
    'objective_value': value,
    'rms_log_residual': float(np.sqrt(np.mean(residual_N**2))),
    'max_log_residual': float(np.abs(residual_N).max()),
    'aicc': uncertainty.aicc(2 * value, count, width) if objective == 'logls' else None,
    'interval': {'level': uncertainty.LEVEL, 'method': method, 'resamples': len(draws_BP), 'by': by},
    'start_spread': dict(zip(law.names, spread_P.tolist(), strict=True)),
    'condition_number': float(np.linalg.cond(jacobian_NP)),
    'correlation': uncertainty.correlation(jacobian_NP),
  }
  return Fit(
    law, x, y, objective, params, agreement, diagnostics, held, found, points[used].reset_index(drop=True), theta_P, draws_BP
  )  # fmt: skip


def _held_out(law, x, u_NQ, v_N, holdout, delta, rng) -> dict[str, Any]:
  rule, weight_N, test_N = holdout
  on = weight_N > 0
  if not test_N.any():
    raise UserError(f'holdout {rule!r} holds nothing out; choose a bound inside the data')
  if not on.any():
    raise UserError(f'holdout {rule!r} leaves no point to fit; choose a bound inside the data')
  try:
    solve.settings(law, np.exp(u_NQ[on]), x)
  except UserError as error:
    raise UserError(f'after holding out {rule!r}: {error}') from None
  theta_P, *_ = solve.estimate(law, u_NQ, v_N, weight_N, delta, rng)
  error_N = np.expm1(solve.at(law, theta_P, u_NQ[test_N], v_N[test_N])[0])
  covariance_PP = uncertainty.covariance(*solve.at(law, theta_P, u_NQ[on], v_N[on]))
  return {
    'rule': rule,
    'mean_rel_err': float(np.abs(error_N).mean()),
    'max_rel_err': float(np.abs(error_N).max()),
    'mean_signed_rel_err': float(error_N.mean()),
    'n_fitted': int(on.sum()),
    'n_held_out': int(test_N.sum()),
    'params': dict(zip(law.names, law.outside(theta_P[None])[0].tolist(), strict=True)),
    'warnings': uncertainty.floor_warnings(
      law, u_NQ[on], theta_P, np.empty((0, len(theta_P))), covariance_PP
    ),
  }


def _strict(value: Any) -> Any:
  """The value with every number that JSON does not know replaced by None."""
  if isinstance(value, dict):
    return {key: _strict(v) for key, v in value.items()}
  if isinstance(value, list):
    return [_strict(v) for v in value]
  if isinstance(value, float | np.floating):
    return float(value) if np.isfinite(value) else None
  return value


def write_json(path: str, record: Any) -> None:
  """Strict JSON with a final newline. Raises `UserError` when `path` cannot be written."""
  try:
    files.replace(path, json.dumps(record, indent=1, allow_nan=False).encode() + b'\n')
  except OSError as error:
    raise UserError(f'cannot write {path} ({error.strerror}); choose another path') from None


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m analysis.fit', description=__doc__.splitlines()[0])
  parser.add_argument('table', metavar='TABLE.csv', help='a CSV file with a header; a path or an fsspec URL')
  parser.add_argument('--law', default='joint_nk', help='one of ' + ', '.join(laws.LAWS))
  parser.add_argument('--x', metavar='COLS', help='columns of the variables, separated by commas')
  parser.add_argument('--y', metavar='COL', default='nmse', help='column of the loss (default: nmse)')
  parser.add_argument('--objective', default='logls', help='logls (log least squares, the default) or huber')
  parser.add_argument('--delta', type=float, default=1e-3, help='of Huber, in log loss (default: 1e-3)')
  parser.add_argument(
    '--bootstrap', type=int, default=500, metavar='N', help='resamples (default: 500; 0: none)'
  )
  parser.add_argument(
    '--holdout', metavar='RULE', help='predict these rows from a fit to the others: "n_latents>65536"'
  )
  parser.add_argument(
    '--group', metavar='COL', help='resample by this column: rows of one run are not independent'
  )
  parser.add_argument('--json', metavar='OUT', help='write the fit there, as an entry of laws.json')
  args = parser.parse_args(argv)
  fit = fit_law(
    table.read_csv(args.table), args.law, args.x.split(',') if args.x else None, args.y,
    objective=args.objective, delta=args.delta, bootstrap=args.bootstrap, holdout=args.holdout, group=args.group,
  )  # fmt: skip
  print('\n'.join([fit.summary(), *(f'  warning: {line}' for line in warning_lines([fit]))]))
  if args.json:
    write_json(args.json, fit.to_json())
  return 0


if __name__ == '__main__':
  main()
