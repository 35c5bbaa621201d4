"""What every reader of a table asks: which rows count, which have logarithms, which a rule names, and warnings as data.

A table has one row a cell or one row an evaluation, and comes from a ledger (`read_ledger`) or a file (`read_table`).
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import frames, notation, read_table, setting, sparsity
from sae_jax import checks, schema
from sae_jax.errors import UserError

USELESS = 'no_better_than_mean'  # column of what no law is fitted to, and code of the warning
_NAMED = 6  # cells named in a warning
_RULE = re.compile(r'\s*("[^"]+"|[A-Za-z_][\w./-]*)\s*(>=|<=|==|!=|>|<)\s*([-+0-9.eE_]+)\s*')


def best_learning_rate(table: pd.DataFrame) -> pd.DataFrame:
  """Keeps, for each setting, the cells of the learning rate with the lowest mean NMSE over its seeds.

  A setting is everything that decides a cell but learning rate and seeds. Cells that are no better than the mean are
  left out. `attrs['warnings']` says where the best rate is the lowest or highest of those tried, so that a better one
  may lie outside.
  """
  attrs = frames.frame('table', table).attrs
  table = useful(table)
  positive(table, ['n_latents', 'learning_rate', 'nmse'])
  sparsity.check(table)
  kept, edges = [], []
  for first, cells in setting.groups(table):
    means = cells.groupby('learning_rate')['nmse'].mean()
    best = means.idxmin()
    kept.append(cells[cells['learning_rate'] == best])
    if len(means) > 1 and best in (means.index.min(), means.index.max()):
      side = 'lowest' if best == means.index.min() else 'highest'
      named = f'n={first["n_latents"]:g}, {sparsity.named(table, first)}'
      edges.append(f'{named}: {best:.3g} is the {side} of {len(means)}')
  out = pd.concat(kept).reset_index(drop=True) if kept else table.copy()
  warnings = list(attrs.get('warnings', []))
  if edges:
    what = 'the best learning rate is at the edge of those tried, so a better one may lie outside'
    warnings.append(warning('edge_minimum', f'{what} ({"; ".join(edges)})'))
  out.attrs = attrs | {'warnings': warnings}
  return out


def finished_runs(curves: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
  """The measurements of finished runs that have both x and y, both positive; not of those no better than the mean.

  Raises `UserError` when none has.
  """
  checks.text('x', x, 'give a column of the curves, e.g. flops_useful')
  checks.text('y', y, 'give a column of the curves, e.g. nmse')
  frames.frame('curves', curves, ('id', 'n_latents', x, y))
  if len({'id', 'n_latents', x, y}) < 4:
    raise UserError(f'x={x!r} and y={y!r} are not two measurements of a run; give e.g. flops_useful and nmse')
  done = useful(curves[curves['state'] == schema.DONE] if 'state' in curves else curves)
  frames.labels(done, 'id')
  done = done[~(np.isnan(frames.measured(done, x)) | np.isnan(frames.measured(done, y)))]
  if done.empty:
    raise UserError(
      f'there are no curves: no finished run has both {x} and {y} in its metrics; evaluate more often or finish some cells'
    )
  positive(done, ['n_latents', x, y])
  return done


def warning(code: str, message: str) -> dict[str, str]:
  """A finding that a reader must see beside a number; codes are stable, messages are for people."""
  return {'code': code, 'message': message}


def useful(rows: pd.DataFrame) -> pd.DataFrame:
  """Cells, or measurements of cells, that are better than the mean as far as the table says.

  Raises `UserError` where the column says neither true nor false.
  """
  return rows[~_useless(rows)]


def useless_warnings(table: pd.DataFrame) -> list[dict[str, str]]:
  """One warning that names the cells no better than the mean; none when there are none."""
  found = table[_useless(table)].to_dict('records')
  if not found:
    return []
  named = [
    f'{row["id"]} (NMSE {row["nmse"]:.3g}'
    + (f' at learning rate {row["learning_rate"]:.3g})' if 'learning_rate' in row else ')')
    for row in found[:_NAMED]
    if 'id' in row and 'nmse' in row
  ]
  more = f' and {len(found) - _NAMED} more' if len(found) > _NAMED else ''
  text = (
    f'{len(found)} finished cells reconstruct no better than the mean does and are in no law: {", ".join(named)}{more}'
  )
  return [warning(USELESS, text)]


def version_warnings(table: pd.DataFrame) -> list[dict[str, str]]:
  """A warning when cells were trained by different code or libraries."""
  frames.frame('table', table)
  counts = {c: table[c].nunique(dropna=False) for c in ('git_commit', 'versions') if c in table}
  mixed = ', '.join(f'{count} different {column}' for column, count in counts.items() if count > 1)
  return [warning('mixed_versions', f'cells of {mixed} are in one table')] if mixed else []


def read_csv(
  path: str, *, sep: str = ',', decimal: str = '.', thousands: str = '', encoding: str = 'utf-8'
) -> pd.DataFrame:
  """A table from a CSV, JSONL or Parquet file, as `read_table.read` gives it. Raises `UserError`."""
  checks.path('path', path)
  return read_table.read(path, notation.Notation(sep, decimal, thousands, encoding))


def positive(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
  """The named columns as float64 [N, columns]. Raises `UserError` for what has no logarithm, naming the row."""
  frames.frame('table', table, columns)
  out = np.empty((len(table), len(columns)))
  for j, column in enumerate(columns):
    out[:, j] = frames.floats(table, column)
    bad = np.flatnonzero(~(np.isfinite(out[:, j]) & (out[:, j] > 0)))
    if bad.size:
      value = table[column].iloc[bad[0]]
      raise UserError(
        f'{column}={value} in {read_table.place(table, bad[0])} is not a finite positive number; laws are fitted to '
        'logs: correct that row or leave it out'
      )
  return out


def matching(table: pd.DataFrame, rule: str) -> np.ndarray:
  """Rows [N] bool that satisfy one comparison, e.g. 'n_latents>65536'; none where the value is missing.

  Raises `UserError` for anything else.
  """
  column, operator, bound = _parsed(table, rule)
  values = frames.floats(table, column)
  compare = {
    '>': values > bound,
    '>=': values >= bound,
    '<': values < bound,
    '<=': values <= bound,
    '==': values == bound,
    '!=': (values != bound) & ~np.isnan(values),
  }
  return compare[operator]


def held_out(table: pd.DataFrame, rule: str) -> np.ndarray:
  """As `matching`, for a rule that must put every row on one side: a missing value is a `UserError`."""
  column, *_ = _parsed(table, rule)
  missing = np.flatnonzero(np.isnan(frames.floats(table, column)))
  if missing.size:
    raise UserError(
      f'holdout {rule!r} says nothing of {read_table.place(table, missing[0])}, where {column} is missing; fill it in or leave that row out'
    )
  return matching(table, rule)


def _parsed(table: pd.DataFrame, rule: Any) -> tuple[str, str, float]:
  """Column, operator and number of a comparison."""
  frames.frame('table', table)
  found = _RULE.fullmatch(rule) if isinstance(rule, str) else None
  try:
    column, operator, number = found.groups() if found else ('', '', '')
    column = column.strip('"')
    bound = float(number)
  except ValueError:
    raise UserError(
      f'{checks.shown(rule)} is not a rule; write one comparison of a column (in double quotes where it holds more than '
      'letters and digits) and a number: n_latents>65536'
    ) from None
  if column not in table.columns:
    raise UserError(f'{rule!r} names no column of the table; {frames.known(column, table)}')
  return column, operator, bound


def _useless(table: pd.DataFrame) -> pd.Series:
  """Which rows `no_better_than_mean` marks. Raises `UserError` for a mark that is neither true, false nor missing."""
  if USELESS not in frames.frame('table', table):
    return pd.Series(False, table.index)
  said = table[USELESS].map(lambda value: '' if pd.isna(value) else str(value).strip().lower())
  bad = np.flatnonzero(~said.isin(['true', 'false', '1', '0', '1.0', '0.0', '']))
  if bad.size:
    raise UserError(
      f'{USELESS}={checks.shown(table[USELESS].iloc[bad[0]])} in {read_table.place(table, bad[0])} is neither true nor '
      'false; write true or false in every row'
    )
  return said.isin(['true', '1', '1.0'])
