"""Fits a law to a table: many starts, bootstrap intervals, a held-out error, and warnings as data.

Residuals are of the log loss, in float64; the objective is the sum over points (of squares / 2, or Huber).
All starts and all resamples are solved together by one batched Levenberg-Marquardt.
"""

import argparse
import csv
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import doubts, laws, seeds, table
from analysis.fit_result import Fit, warning_lines, write_json
from analysis.fitting import likelihood_profile, resample, solve, uncertainty
from analysis.law import Law
from sae_jax import checks
from sae_jax.errors import UserError, one_line_errors

Array = np.ndarray

_EXAMPLES = """examples:
  python -m analysis.fit points.csv --law=joint_nk --x=n_latents,k --y=nmse --holdout="n_latents>65536" --json=fit.json
  python -m analysis.fit points.csv --law=power --x=n_latents --y=loss --objective=huber --delta=1e-3 --bootstrap=1000
  python -m analysis.fit models.csv --law=power --x=n_latents --y=nmse --by=model --json=fits.json
  python -m analysis.fit german.csv --law=power --x=n_latents --sep=";" --decimal=, --thousands=.
  python -m analysis.fit excel.txt --law=power --x=n_latents --sep=tab --encoding=utf-16
  python -m analysis.fit curves.jsonl --law=additive2 --x=n_latents,tokens --group=run
"""


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

  Rows that the column `no_better_than_mean` marks are left out.

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
      Without it, where settings were run with several seeds (column `seed` or `data_seed`), settings are resampled and
      then the seeds in them; otherwise rows are.
    seed: of starts and resamples.

  Raises:
    UserError: the table cannot carry this fit.
  """
  chosen = laws.named(law)
  useless = table.useless_warnings(points)
  points = table.useful(points)
  resample.count(bootstrap)
  checks.text('y', y, 'give the column of the loss')
  checks.positive('delta', delta, 'the usual choice is 1e-3')
  columns = chosen.axes if x is None else checks.texts('x', x, "x=['n_latents', 'k']")
  if sorted(columns) == sorted(chosen.axes):
    columns = chosen.axes  # these names say which axis they are, so their order cannot go wrong
  if len({*columns, y}) < len(columns) + 1:
    raise UserError(
      f'{", ".join((*columns, y))} names a column twice; the loss and every variable are columns of their own'
    )
  if group is None and 'id' in points and points['id'].duplicated().any():
    twice = points['id'][points['id'].duplicated()].iloc[0]
    raise UserError(
      f'id {str(twice)[:40]!r} is in the table twice; drop the copies, or resample by run with group (--group=id)'
    )
  rng = np.random.default_rng(checks.seed(seed))
  weight_BN, label_N, repeat_N = resamples(points, chosen, columns, group, bootstrap, rng)
  held = None
  if holdout is not None:
    test_N = table.held_out(points, holdout)
    held = (holdout, (~test_N).astype(float), test_N)
  by = group or ('row' if repeat_N is None else 'setting, then seed')
  fit = fit_weighted(
    points, chosen, columns, y, weight_BN, objective=objective, delta=delta, holdout=held, by=by, rng=rng
  )
  residual_N = fit.residuals()
  noise, found = seeds.judge(
    repeat_N, np.log(fit.table[y].to_numpy(float)), residual_N @ residual_N, len(chosen.names), objective == 'logls'
  )
  share = np.bincount(label_N).max() / len(label_N)
  if group and share > 0.5:
    found.append(table.warning('one_run_dominates', f'one {group} holds {share:.0%} of the points'))
  return dataclasses.replace(fit, diagnostics=fit.diagnostics | {'seed_noise': noise}).warned(
    *useless,
    *found,
    *doubts.of_rows(points, columns, y),
    *doubts.of_residuals(points, chosen, columns, y, residual_N, group),
  )


def resamples(
  points: pd.DataFrame,
  law: Law,
  x: Sequence[str],
  group: str | None,
  bootstrap: int,
  rng: np.random.Generator,
) -> tuple[Array, Array, Array | None]:
  """Weights [1 + B, N] of the rows as `resample.weights` makes them, what was drawn together [N], and the settings that
  were run with several seeds [N], as from `seeds.replicates`. Raises `UserError` where the rows cannot carry the law."""
  point_N = solve.settings(law, table.positive(points, x), x)
  repeat_N = seeds.replicates(points, x)
  within = group is None and repeat_N is not None
  label_N = repeat_N if within else resample.labels(points, group)
  # With no point beyond the constants, every resample that carries the law is these points again.
  count = bootstrap if len(points) > len(law.names) else 0
  return resample.weights(label_N, point_N, len(law.names), count, rng, within=within), label_N, repeat_N


def fit_weighted(
  points: pd.DataFrame,
  law: Law,
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
  if not isinstance(objective, str) or objective not in ('logls', 'huber'):
    raise UserError(f'objective {checks.shown(objective)} is not known; use logls or huber')
  delta = delta if objective == 'huber' else np.inf
  xy = table.positive(points, [*x, y])
  u_NQ, v_N = np.log(xy[:, :-1]), np.log(xy[:, -1])
  used = weight_BN[0] > 0
  settings = len(np.unique(solve.settings(law, xy[used, :-1], x)))

  theta_P, value, agreement, spread_P = solve.estimate(law, u_NQ, v_N, weight_BN[0], delta, rng)
  draws_BP = solve.refit(law, u_NQ, v_N, weight_BN[1:], theta_P, delta, rng)
  residual_N, jacobian_NP = solve.at(law, theta_P, u_NQ[used], v_N[used])
  covariance_PP = uncertainty.covariance(residual_N, jacobian_NP, delta)
  count, width = len(residual_N), len(law.names)
  profiled = objective == 'logls' and count > width
  ends_2P = np.full((2, width), np.nan)
  if profiled:
    ends_2P = likelihood_profile.ends(law, u_NQ[used], v_N[used], theta_P, covariance_PP)
  params, method = uncertainty.params(law, theta_P, draws_BP, covariance_PP, count - width, ends_2P)
  unbounded = likelihood_profile.add(law, params, ends_2P)

  found = list(points.attrs.get('warnings', []))
  found += [w for w in table.version_warnings(points[used]) if w not in found]
  found += uncertainty.interval_warnings(params, method)
  loose = uncertainty.floor_is_loose(law, ends_2P[0])
  found += uncertainty.floor_warnings(law, u_NQ[used], theta_P, draws_BP, covariance_PP, loose)
  found += uncertainty.data_warnings(dict(zip(x, np.ptp(u_NQ[used], axis=0), strict=True)), settings, width, agreement)
  held = _held_out(law, x, u_NQ, v_N, holdout, delta, rng) if holdout else None
  diagnostics = {
    'delta': delta if objective == 'huber' else None,
    'objective_value': value,
    'rms_log_residual': float(np.sqrt(np.mean(residual_N**2))),
    'max_log_residual': float(np.abs(residual_N).max()),
    'aicc': uncertainty.aicc(2 * value, count, width) if objective == 'logls' else None,
    'profile': {'level': uncertainty.LEVEL, 'unbounded': unbounded} if profiled else None,
    'seed_noise': None,
    'interval': {'level': uncertainty.LEVEL, 'method': method, 'resamples': len(draws_BP), 'by': by},
    'start_spread': dict(zip(law.names, spread_P.tolist(), strict=True)),
    'condition_number': float(np.linalg.cond(jacobian_NP)),
    'correlation': uncertainty.correlation(jacobian_NP),
  }
  return Fit(
    law,
    x,
    y,
    objective,
    params,
    agreement,
    diagnostics,
    held,
    found,
    points[used].reset_index(drop=True),
    theta_P,
    draws_BP,
    covariance_PP,
  )


def _held_out(
  law: Law,
  x: tuple[str, ...],
  u_NQ: Array,
  v_N: Array,
  holdout: tuple[str, Array, Array],
  delta: float,
  rng: np.random.Generator,
) -> dict[str, Any]:
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
  covariance_PP = uncertainty.covariance(*solve.at(law, theta_P, u_NQ[on], v_N[on]), delta)
  return {
    'rule': rule,
    'mean_rel_err': float(np.abs(error_N).mean()),
    'max_rel_err': float(np.abs(error_N).max()),
    'mean_signed_rel_err': float(error_N.mean()),
    'n_fitted': int(on.sum()),
    'n_held_out': int(test_N.sum()),
    'params': dict(zip(law.names, law.outside(theta_P[None])[0].tolist(), strict=True)),
    'warnings': uncertainty.floor_warnings(law, u_NQ[on], theta_P, np.empty((0, len(theta_P))), covariance_PP),
  }


def _names(text: str, points: pd.DataFrame) -> list[str]:
  """Names separated by commas, quoted as in a CSV file; one name of the table may have commas without quotes."""
  if text in points.columns:
    return [text]
  try:
    return [name.strip() for name in next(csv.reader([text], strict=True, skipinitialspace=True))]
  except (csv.Error, StopIteration):
    raise UserError(f'--x={text!r} is not a list of names; separate them by commas and close every quote') from None


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog='python -m analysis.fit',
    description=__doc__.splitlines()[0],
    epilog=_EXAMPLES,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    'table', metavar='TABLE', help='a CSV file with a header, JSONL or Parquet; a path or an fsspec URL'
  )
  parser.add_argument('--law', default='joint_nk', help='one of ' + ', '.join(laws.LAWS))
  parser.add_argument(
    '--x',
    metavar='COLS',
    help='columns of the variables, separated by commas; quote a name that has one: \'"n, all",k\'',
  )
  parser.add_argument('--y', metavar='COL', default='nmse', help='column of the loss (default: nmse)')
  parser.add_argument('--objective', default='logls', help='logls (log least squares, the default) or huber')
  parser.add_argument('--delta', type=float, default=1e-3, help='of Huber, in log loss (default: 1e-3)')
  parser.add_argument('--bootstrap', type=int, default=500, metavar='N', help='resamples (default: 500; 0: none)')
  parser.add_argument(
    '--holdout', metavar='RULE', help='predict these rows from a fit to the others: "n_latents>65536"'
  )
  parser.add_argument('--group', metavar='COL', help='resample by this column: rows of one run are not independent')
  parser.add_argument(
    '--by', metavar='COL', help='fit the rows of each value of COL, and one law with common exponents to all'
  )
  parser.add_argument(
    '--json', metavar='OUT', help='write the fit there, as an entry of laws.json; with --by a list of them'
  )
  parser.add_argument('--sep', default=',', help='between the fields of a line: one character, or the word tab')
  parser.add_argument('--decimal', default='.', help='decimal sign: "." (the default) or ","')
  parser.add_argument('--thousands', default='', metavar='SIGN', help='between groups of three digits; none by default')
  parser.add_argument('--encoding', default='utf-8', help='of the text: utf-8 (the default), utf-16, latin-1, …')
  args = parser.parse_args(argv)
  points = table.read_csv(
    args.table, sep=args.sep, decimal=args.decimal, thousands=args.thousands, encoding=args.encoding
  )
  x = _names(args.x, points) if args.x else None
  how = dict(
    objective=args.objective,
    delta=args.delta,
    bootstrap=args.bootstrap,
    holdout=args.holdout,
    group=args.group,
  )
  if args.by:
    from analysis import grouped  # it fits by this module

    found = grouped.fit_by(points, args.by, args.law, x, args.y, **how)
    fits = [*found.fits, found.common]
  else:
    found = fit_law(points, args.law, x, args.y, **how)
    fits = [found]
  print('\n'.join([found.summary(), *(f'  warning: {line}' for line in warning_lines(fits))]))
  if args.json:
    write_json(args.json, found.to_json())
  return 0


if __name__ == '__main__':
  main()
