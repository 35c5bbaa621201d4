"""Ledgers and CSV files as tidy tables: one row a cell, or one row an evaluation.

Missing never becomes zero: a cell without a sound result is listed with its state and reason, never filled in.
"""

import hashlib
import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from sae_jax import files
from sae_jax.errors import UserError

# Without these, finite and positive, a result cannot be used; the others may be missing.
_POSITIVE = (
  'n_latents', 'k', 'd_model', 'learning_rate', 'batch_tokens', 'steps', 'tokens', 'flops_useful', 'flops_dense', 'nmse',
)  # fmt: skip
_NUMBERS = ('seed', 'flops_subject', 'nmse_raw', 'nmse_ema', 'mse', 'l0', 'dead_fraction', 'wall_s')
# Facts that only the configuration holds.
_CONFIG_COLUMNS = {
  'data.source': 'source', 'data.subject': 'subject', 'data.site': 'site', 'data.text': 'text', 'data.seed': 'data_seed',
  'data.epochs': 'epochs', 'optim.ema_decay': 'ema_decay', 'loss.aux_coefficient': 'aux_coefficient',
}  # fmt: skip
# Not part of a setting: replicates, the learning rate itself, what the recipe derived it from, where it ran.
_NOT_SETTING = (
  'schema', 'id', 'recipe', 'mesh', 'optim.learning_rate', 'train.seed', 'data.seed', 'data.path', 'train.checkpoint_every',
)  # fmt: skip
_CURVES = {
  'step': 'step', 'tokens': 'tokens', 'flops_useful': 'flops_useful', 'flops_dense': 'flops_dense', 'wall_s': 'wall_s',
  'train/nmse': 'train_nmse', 'eval/nmse': 'nmse', 'eval/nmse_raw': 'nmse_raw', 'eval/nmse_ema': 'nmse_ema',
  'eval/l0': 'l0', 'sae/dead_fraction': 'dead_fraction',
}  # fmt: skip
_FACTS = ('n_latents', 'k', 'learning_rate', 'seed', 'batch_tokens')  # of the cell, repeated on its curve
_NAMED = 6  # cells named in a warning
_RULE = re.compile(r'\s*([A-Za-z_][\w./-]*)\s*(>=|<=|==|!=|>|<)\s*([-+0-9.eE_]+)\s*')


def load_cells(path: str) -> pd.DataFrame:
  """Every cell of a ledger, one row each, with `state` and `reason`.

  States: done, failed (has a failure.json), unfinished, invalid (a file that cannot be believed). Only done rows
  have results; elsewhere those columns are missing. Raises `UserError` when there is no ledger at `path`.
  """
  folder = files.join(path, 'cells')
  names = [name for name in files.listdir(folder) if not name.startswith('.')]
  if not names and not files.exists(folder):
    raise UserError(
      f'no ledger at {str(path)!r} (no folder "cells" in it); give --ledger the folder a sweep wrote'
    )
  rows = [_cell(folder, name) for name in names]
  columns = ['id', 'state', 'reason', *_POSITIVE, *_NUMBERS, 'setting']
  rest = list(dict.fromkeys(key for row in rows for key in row if key not in columns))
  return pd.DataFrame(rows, columns=pd.Index(columns + rest))


def load_ledger(path: str, cells: pd.DataFrame | None = None) -> pd.DataFrame:
  """The finished cells of a ledger, one row each: all of result.json and the configuration's facts.

  `attrs['not_done']` lists the others (id, state, reason) and `attrs['warnings']` says so. `cells` saves reading
  them again when `load_cells` has.
  """
  cells = load_cells(path) if cells is None else cells
  done = cells['state'] == 'done'
  table = cells[done].drop(columns=['state', 'reason']).reset_index(drop=True)
  for column in table.columns.intersection([*_POSITIVE, *_NUMBERS]):
    table[column] = pd.to_numeric(table[column])
  others = cells.loc[~done, ['id', 'state', 'reason']].to_dict('records')
  table.attrs = {'not_done': others, 'warnings': version_warnings(table) + _not_done_warnings(others)}
  return table


def load_curves(path: str, cells: pd.DataFrame | None = None) -> pd.DataFrame:
  """Every measurement of every cell in long form, with the cell's state and sizes.

  One row a (id, step); a later line for a step replaces an earlier one. Lines cut short by a crash are left out.
  `cells` saves reading them again when `load_cells` has.
  """
  cells = load_cells(path) if cells is None else cells
  frames = []
  for cell in cells.to_dict('records'):
    by_step: dict[int, dict[str, Any]] = {}
    folder = files.join(path, 'cells', cell['id'])
    for name in sorted(
      (n for n in files.listdir(folder) if re.fullmatch(r'metrics.*\.jsonl', n)), key=_attempt
    ):
      for line in files.read(files.join(folder, name)).split(b'\n'):
        record = _object(line)
        if record is not None and isinstance(record.get('step'), int):
          by_step[record['step']] = record
    rows = [
      {new: _number(by_step[step].get(old)) for old, new in _CURVES.items()} for step in sorted(by_step)
    ]
    facts = {'id': cell['id'], 'state': cell['state']} | {key: _number(cell[key]) for key in _FACTS}
    frames += [facts | row for row in rows]
  return pd.DataFrame(frames, columns=pd.Index(['id', 'state', *_FACTS, *_CURVES.values()]))


def best_learning_rate(table: pd.DataFrame) -> pd.DataFrame:
  """Keeps, for each setting, the cells of the learning rate with the lowest mean NMSE over its seeds.

  A setting is everything that decides a cell but learning rate and seeds. `attrs['warnings']` says where the best
  rate is the lowest or highest of those tried, so that a better one may lie outside.
  """
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
  warnings = list(table.attrs.get('warnings', []))
  if edges:
    what = 'the best learning rate is at the edge of those tried, so a better one may lie outside'
    warnings.append(warning('edge_minimum', f'{what} ({"; ".join(edges)})'))
  out.attrs = table.attrs | {'warnings': warnings}
  return out


def finished_runs(curves: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
  """The measurements of finished runs that have both x and y, both positive. Raises `UserError` when none has."""
  for column in ('id', 'n_latents', x, y):
    if column not in curves.columns:
      raise UserError(f'no column {column!r} in the curves; they have {", ".join(map(str, curves.columns))}')
  done = curves[curves['state'] == 'done'] if 'state' in curves else curves
  done = done[np.isfinite(done[x]) & np.isfinite(done[y])]
  if done.empty:
    raise UserError(
      f'no finished run has both {x} and {y} in its metrics; evaluate more often or finish some cells'
    )
  positive(done, ['n_latents', x, y])
  return done


def warning(code: str, message: str) -> dict[str, str]:
  """A finding that a reader must see beside a number; codes are stable, messages are for people."""
  return {'code': code, 'message': message}


def version_warnings(table: pd.DataFrame) -> list[dict[str, str]]:
  """A warning when cells were trained by different code or libraries."""
  counts = {c: table[c].nunique(dropna=False) for c in ('git_commit', 'versions') if c in table}
  mixed = ', '.join(f'{count} different {column}' for column, count in counts.items() if count > 1)
  return [warning('mixed_versions', f'cells of {mixed} are in one table')] if mixed else []


def read_csv(path: str) -> pd.DataFrame:
  """A CSV file, local or an fsspec URL. Raises `UserError` when it cannot be read as a table with rows."""
  try:
    table = pd.read_csv(io.BytesIO(files.read(path)))
  except (OSError, ValueError) as error:  # pandas' own errors and bad encodings are ValueErrors
    raise UserError(
      f'cannot read {str(path)!r} as a CSV table ({type(error).__name__}); check the path and file'
    ) from None
  if table.empty:
    raise UserError(f'{str(path)!r} has no rows; give a table with a header and one row a point')
  return table


def positive(table: pd.DataFrame, columns: Sequence[str]) -> np.ndarray:
  """The named columns as float64 [N, columns]. Raises `UserError` for what has no logarithm, naming the row."""
  missing = [c for c in columns if c not in table.columns]
  if missing:
    raise UserError(f'no column {missing[0]!r} in the table; it has {", ".join(map(str, table.columns))}')
  out = np.empty((len(table), len(columns)))
  for j, column in enumerate(columns):
    out[:, j] = _floats(table, column)
    bad = np.flatnonzero(~(np.isfinite(out[:, j]) & (out[:, j] > 0)))
    if bad.size:
      value = table[column].iloc[bad[0]]
      raise UserError(
        f'{column}={value} in row {bad[0] + 1} is not a finite positive number; laws are fitted to logs'
      )
  return out


def matching(table: pd.DataFrame, rule: str) -> np.ndarray:
  """Rows [N] bool that satisfy one comparison, e.g. 'n_latents>65536'. Raises `UserError` for anything else."""
  found = _RULE.fullmatch(rule)
  try:
    column, operator, number = found.groups() if found else ('', '', '')
    bound = float(number)
  except ValueError:
    raise UserError(
      f'{rule!r} is not a rule; write one comparison of a column and a number: n_latents>65536'
    ) from None
  if column not in table.columns:
    raise UserError(f'{rule!r} names no column of the table; it has {", ".join(map(str, table.columns))}')
  values = _floats(table, column)
  compare = {
    '>': values > bound, '>=': values >= bound, '<': values < bound,
    '<=': values <= bound, '==': values == bound, '!=': values != bound,
  }  # fmt: skip
  return compare[operator]


def _floats(table: pd.DataFrame, column: str) -> np.ndarray:
  series = table[column]
  numbers = pd.to_numeric(series, errors='coerce')
  bad = np.flatnonzero(
    (numbers.isna() & series.notna()) | series.map(lambda value: isinstance(value, bool | np.bool_))
  )
  if bad.size:
    raise UserError(
      f'{column}={str(series.iloc[bad[0]])[:40]!r} in row {bad[0] + 1} is not a number; remove or correct that row'
    )
  return numbers.to_numpy(dtype=np.float64, na_value=np.nan)


def _cell(folder: str, name: str) -> dict[str, Any]:
  row: dict[str, Any] = {'id': name}
  config, result = (_read_object(files.join(folder, name, f)) for f in ('config.json', 'result.json'))
  if config:
    flat = _flatten(config)
    row |= {
      'n_latents': flat.get('sae.n_latents'),
      'k': flat.get('sae.k'),
      'd_model': flat.get('sae.d_model'),
    }
    row |= {'learning_rate': flat.get('optim.learning_rate'), 'seed': flat.get('train.seed')}
    row |= {'batch_tokens': flat.get('train.batch_tokens')}
    row |= {column: flat[key] for key, column in _CONFIG_COLUMNS.items() if key in flat}
    row['setting'] = _setting(flat)
  if result is None:
    failure = _read_object(files.join(folder, name, 'failure.json'))
    if failure is None:
      return row | {'state': 'unfinished', 'reason': 'no result.json'}
    reason = (
      str(failure.get('error', failure.get('reason', failure))) if failure else 'failure.json is broken'
    )
    return row | {'state': 'failed', 'reason': reason}
  reason = _disbelief(name, config, result)
  if reason:
    return row | {'state': 'invalid', 'reason': reason}
  plain = {
    k: v if isinstance(v, str | int | float | None) else json.dumps(v, sort_keys=True)
    for k, v in result.items()
  }
  numbers = {key: _number(result.get(key)) for key in _NUMBERS}
  return row | plain | numbers | {'id': name, 'state': 'done', 'reason': ''}


def _disbelief(name: str, config: dict[str, Any] | None, result: dict[str, Any]) -> str:
  """Why a result cannot be used; empty when it can."""
  if not result or config == {}:
    return f'{"config" if result else "result"}.json is not a JSON object'
  if result.get('id') != name:
    return f'result.json is of cell {str(result.get("id"))[:40]}'
  bad = [
    key for key in _POSITIVE if not (math.isfinite(_number(result.get(key))) and _number(result.get(key)) > 0)
  ]
  if bad:
    return f'{bad[0]}={str(result.get(bad[0]))[:40]} in result.json'
  flat = _flatten(config or {})
  for key in ('n_latents', 'k', 'd_model'):
    planned = flat.get(f'sae.{key}', result[key])
    if _number(planned) != _number(result[key]):
      return f'{key}={str(result[key])[:40]} in result.json, {str(planned)[:40]} in config.json'
  return ''


def _not_done_warnings(others: list[dict[str, str]]) -> list[dict[str, str]]:
  states = [
    state for state in ('failed', 'unfinished', 'invalid') if any(o['state'] == state for o in others)
  ]
  counts = ', '.join(f'{sum(o["state"] == state for o in others)} {state}' for state in states)
  names = ', '.join(str(o['id']) for o in others[:_NAMED])
  more = f' and {len(others) - _NAMED} more' if len(others) > _NAMED else ''
  return [warning('cells_missing', f'{counts} cells are left out: {names}{more}')] if states else []


def _setting(flat: dict[str, Any]) -> str:
  kept = {
    k: v for k, v in flat.items() if not any(k == out or k.startswith(f'{out}.') for out in _NOT_SETTING)
  }
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _read_object(path: str) -> dict[str, Any] | None:
  """A JSON object; None when there is no file, {} when it is broken."""
  try:
    return _object(files.read(path)) or {}
  except (FileNotFoundError, NotADirectoryError):
    return None


def _object(data: bytes) -> dict[str, Any] | None:
  try:
    record = json.loads(data)
    if b'\\' in data or not data.isascii():
      json.dumps(
        record, ensure_ascii=False
      ).encode()  # half a surrogate pair can be read but never written again
  except (ValueError, RecursionError):
    return None
  return record if isinstance(record, dict) else None


def _number(value: Any) -> float:
  """A JSON number as float, anything else as NaN."""
  if isinstance(value, bool) or not isinstance(value, int | float | np.number):
    return math.nan
  try:
    return float(value)
  except OverflowError:
    return math.inf


def _attempt(name: str) -> tuple[int, str]:
  digits = re.findall(r'\d+', name)
  return (int(digits[-1]) if digits else -1, name)


def _flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for key, value in tree.items():
    flat |= _flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return flat
