"""Ledgers and CSV files as tidy tables: one row a cell, or one row an evaluation.

Missing never becomes zero: a cell without a sound result is listed with its state and reason, never filled in.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import frames, notation, read_table
from sae_jax import cell, cell_state, checks, files, metrics, schema
from sae_jax.errors import UserError

_MUST = [field.name for field in schema.RESULTS if field.must]
_NUMBERS = [field.name for field in schema.RESULTS if field.kind in (int, float) and not (field.must or field.may)]
# Not part of a setting: replicates, the learning rate itself, what the recipe derived it from, where it ran.
_NOT_SETTING = (
  'schema',
  'id',
  'digest',
  'recipe',
  'mesh',
  'optim.learning_rate',
  'train.seed',
  'data.seed',
  'data.path',
  'train.checkpoint_every',
)
_CURVES = {field.line: field.name for field in schema.CURVES if field.kind in (int, float) and not field.may}
_CURVES_MAY = {field.line: field.name for field in schema.CURVES if field.may}
_FACTS = ('n_latents', 'k', 'learning_rate', 'seed', 'batch_tokens')  # of the cell, repeated on its curve
USELESS = 'no_better_than_mean'  # column of what no law is fitted to, and code of the warning
_NAMED = 6  # cells named in a warning
_RULE = re.compile(r'\s*("[^"]+"|[A-Za-z_][\w./-]*)\s*(>=|<=|==|!=|>|<)\s*([-+0-9.eE_]+)\s*')


def load_cells(path: str) -> pd.DataFrame:
  """Every cell of a ledger, one row each, with `state` and `reason`.

  The states are those of `sae_jax.schema.STATES`. Only done rows have results; elsewhere those columns are missing.
  `verified` says whether a digest covered the result. Raises `UserError` when there is no ledger at `path`.
  """
  folder = files.join(checks.path('path', path), schema.CELLS)
  names = [name for name in files.listdir(folder) if not name.startswith('.')]
  if not names and not files.exists(folder):
    raise UserError(f'no ledger at {str(path)!r} (no folder "cells" in it); give --ledger the folder a sweep wrote')
  rows = [_cell(folder, name) for name in names]
  columns = ['id', 'state', 'reason', 'verified', *_MUST, *_NUMBERS, 'setting']
  rest = list(dict.fromkeys(key for row in rows for key in row if key not in columns))
  return pd.DataFrame(rows, columns=pd.Index(columns + rest))


def load_ledger(path: str, cells: pd.DataFrame | None = None) -> pd.DataFrame:
  """The finished cells of a ledger, one row each: all of result.json and the configuration's facts.

  `attrs['not_done']` lists the others (id, state, reason) and `attrs['warnings']` says so. The column
  `no_better_than_mean` marks autoencoders that reconstruct no better than the mean does, NMSE 1 or more; no law is
  fitted to them. `cells` saves reading them again when `load_cells` has.
  """
  cells = load_cells(path) if cells is None else _cells(path, cells)
  done = cells['state'] == schema.DONE
  table = cells[done].drop(columns=['state', 'reason']).reset_index(drop=True)
  for column in table.columns.intersection([*_MUST, *_NUMBERS]):
    frames.floats(table, column)
    table[column] = pd.to_numeric(table[column])
  table[USELESS] = table['nmse'] >= 1
  others = cells.loc[~done, ['id', 'state', 'reason']].to_dict('records')
  table.attrs = {
    'not_done': others,
    'warnings': version_warnings(table) + _unverified(table) + useless_warnings(table) + _not_done_warnings(others),
  }
  return table


def load_curves(path: str, cells: pd.DataFrame | None = None) -> pd.DataFrame:
  """Every measurement of every cell in long form, with the cell's state and sizes.

  One row a (id, step); a later line for a step replaces an earlier one. Lines cut short by a crash are left out.
  `attrs['warnings']` names the finished cells whose curves lack evaluations that were planned. `cells` saves reading
  them again when `load_cells` has.
  """
  cells = load_cells(path) if cells is None else _cells(path, cells)
  rows, holes = [], {}
  for row in cells.to_dict('records'):
    lines = metrics.read_metrics(files.join(path, schema.CELLS, row['id']), row['id'])
    measured = [
      {new: _number(line.get(old)) for old, new in _CURVES.items()}
      | {new: _number(line[old]) for old, new in _CURVES_MAY.items() if old in line}
      for line in lines
    ]
    facts = {'id': row['id'], 'state': row['state'], USELESS: _number(row['nmse']) >= 1}
    facts |= {key: _number(row[key]) for key in _FACTS}
    rows += [facts | line for line in measured]
    if row['state'] == schema.DONE and (planned := _planned(row)):
      if lacking := planned - {line['step'] for line in lines}:
        holes[row['id']] = (len(lacking), len(planned))
  also = [new for new in _CURVES_MAY.values() if any(new in row for row in rows)]
  curves = pd.DataFrame(rows, columns=pd.Index(['id', 'state', USELESS, *_FACTS, *_CURVES.values(), *also]))
  curves[USELESS] = curves[USELESS].astype(bool)
  number = curves.columns.difference(['id', 'state', USELESS])
  curves[number] = curves[number].astype(float)  # also where there are no rows
  curves.attrs = {'warnings': _holes_warnings(holes)}
  return curves


def best_learning_rate(table: pd.DataFrame) -> pd.DataFrame:
  """Keeps, for each setting, the cells of the learning rate with the lowest mean NMSE over its seeds.

  A setting is everything that decides a cell but learning rate and seeds. Cells that are no better than the mean are
  left out. `attrs['warnings']` says where the best
  rate is the lowest or highest of those tried, so that a better one may lie outside.
  """
  attrs = frames.frame('table', table).attrs
  table = useful(table)
  positive(table, ['n_latents', 'k', 'learning_rate', 'nmse'])
  keys = [key for key in ('n_latents', 'k', 'd_model', 'batch_tokens', 'tokens', 'setting') if key in table]
  kept, edges = [], []
  for _, cells in table.groupby(keys, sort=True, dropna=False):
    means = cells.groupby('learning_rate')['nmse'].mean()
    best = means.idxmin()
    kept.append(cells[cells['learning_rate'] == best])
    if len(means) > 1 and best in (means.index.min(), means.index.max()):
      first = cells.iloc[0]
      side = 'lowest' if best == means.index.min() else 'highest'
      edges.append(f'n={first["n_latents"]:g}, k={first["k"]:g}: {best:.3g} is the {side} of {len(means)}')
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


def _cells(path: str, cells: pd.DataFrame) -> pd.DataFrame:
  """Cells that a caller read before, as from `load_cells`."""
  checks.path('path', path)
  frames.frame('cells', cells, ['id', 'state', 'reason', 'verified', *_FACTS, *_MUST])
  for column in ('id', 'state', 'reason'):
    frames.labels(cells, column)
  return cells


def _cell(folder: str, name: str) -> dict[str, Any]:
  found = cell_state.read(files.join(folder, name), name, copied=True)
  row: dict[str, Any] = {'id': name, 'state': found.state, 'reason': found.reason}
  if found.config:
    flat = cell.flatten(found.config)
    row |= {column: flat.get(key) for key, column in schema.FROM_CONFIG.items()}
    row['setting'] = _setting(flat)
  if found.result is None:
    return row
  plain = {
    k: v if isinstance(v, str | int | float | None) else json.dumps(v, sort_keys=True) for k, v in found.result.items()
  }
  numbers = {key: _number(found.result.get(key)) for key in _NUMBERS}
  return row | plain | numbers | {'id': name, 'verified': found.verified}


def _unverified(table: pd.DataFrame) -> list[dict[str, str]]:
  count = int((~table['verified'].astype(bool)).sum())
  if not count:
    return []
  text = f'{count} results are from before results had digests; a changed digit in them would not be noticed'
  return [warning('unverified', text)]


def _not_done_warnings(others: list[dict[str, str]]) -> list[dict[str, str]]:
  states = [state for state in schema.STATES if any(o['state'] == state for o in others)]
  counts = ', '.join(f'{sum(o["state"] == state for o in others)} {state}' for state in states)
  names = ', '.join(str(o['id']) for o in others[:_NAMED])
  more = f' and {len(others) - _NAMED} more' if len(others) > _NAMED else ''
  return [warning('cells_missing', f'{counts} cells are left out: {names}{more}')] if states else []


def _planned(row: dict[str, Any]) -> set[int]:
  """The steps at which a finished cell was to be evaluated; none where its configuration is not known."""
  steps, per_decade = _number(row['steps']), _number(row.get('per_decade'))
  return cell.log_spaced(int(steps), int(per_decade)) if steps > 0 and per_decade > 0 else set()


def _holes_warnings(holes: dict[str, tuple[int, int]]) -> list[dict[str, str]]:
  """One warning for cells with (lacking, planned) evaluations; none when there are none."""
  if not holes:
    return []
  named = [f'{name} ({lacking} of {planned})' for name, (lacking, planned) in list(holes.items())[:_NAMED]]
  more = f' and {len(holes) - _NAMED} more' if len(holes) > _NAMED else ''
  text = (
    f'{sum(lacking for lacking, _ in holes.values())} planned evaluations are missing from the curves of {len(holes)} '
    f'finished cells: {", ".join(named)}{more}; laws over compute and tokens see the rest'
  )
  return [warning('holes', text)]


def _setting(flat: dict[str, Any]) -> str:
  kept = {k: v for k, v in flat.items() if not any(k == out or k.startswith(f'{out}.') for out in _NOT_SETTING)}
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _number(value: Any) -> float:
  """A JSON number as float, anything else as NaN."""
  if isinstance(value, bool) or not isinstance(value, int | float | np.number):
    return math.nan
  try:
    return float(value)
  except OverflowError:
    return math.inf
