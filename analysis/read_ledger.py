"""A ledger as tidy tables: one row a cell, or one row an evaluation.

Missing never becomes zero: a cell without a sound result is listed with its state and reason, never filled in.
"""

import hashlib
import json
import math
from typing import Any

import numpy as np
import pandas as pd

from analysis import frames, measured, sparsity
from analysis.table import USELESS, useless_warnings, version_warnings, warning
from sae_jax import cell, cell_state, checks, files, metrics, records, schema
from sae_jax.errors import UserError

_MUST = [field.name for field in schema.RESULTS if field.must]
_NUMBERS = [field.name for field in schema.RESULTS if field.kind in (int, float) and not (field.must or field.may)]
# Of a cell's identity, what is no part of its setting: replicates, the learning rate, and what the recipe derived it from.
_NOT_SETTING = ('recipe', 'optim.learning_rate', 'train.seed', 'data.seed')
_CURVES = {field.line: field.name for field in schema.CURVES if field.kind in (int, float) and not field.may}
_CURVES_MAY = {field.line: field.name for field in schema.CURVES if field.may}
# Of the cell, repeated on its curve.
_FACTS = ('n_latents', 'k', 'sparsity', 'learning_rate', 'seed', 'batch_tokens')
_NAMED = 6  # cells named in a warning


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
  found = [*(key for row in rows for key in row), 'activation', 'sparsity']
  rest = list(dict.fromkeys(key for key in found if key not in columns))
  return pd.DataFrame(rows, columns=pd.Index(columns + rest))


def load_ledger(path: str, cells: pd.DataFrame | None = None) -> pd.DataFrame:
  """The finished cells of a ledger, one row each: all of result.json and the configuration's facts.

  `attrs['not_done']` lists the others (id, state, reason) and `attrs['warnings']` says so. The column
  `no_better_than_mean` marks autoencoders that reconstruct no better than the mean does, NMSE 1 or more; no law is
  fitted to them. `cells` saves reading them again when `load_cells` has.

  What sparsity was asked for is in `k` or, where that is missing, in `sparsity`: the coefficient of a penalty.
  `target` says it in words, such as 'k=8'. What came of it is `l0`. `activation` is the family.

  What was measured beyond the NMSE is in columns such as `downstream/kl`, with its standard error in `downstream/kl_se`.
  """
  cells = load_cells(path) if cells is None else _cells(path, cells)
  done = cells['state'] == schema.DONE
  table = cells[done].drop(columns=['state', 'reason']).reset_index(drop=True)
  for column in table.columns.intersection([*_MUST, *_NUMBERS, 'sparsity']):
    frames.floats(table, column)
    table[column] = pd.to_numeric(table[column])
  table['target'] = [sparsity.said(sparsity.target(row)) for row in table[[*sparsity.TARGETS]].to_dict('records')]
  table[USELESS] = table['nmse'] >= 1
  table, doubts = measured.joined(path, table)
  others = cells.loc[~done, ['id', 'state', 'reason']].to_dict('records')
  warnings = [*version_warnings(table), *_unverified(table), *useless_warnings(table), *doubts]
  table.attrs |= {'not_done': others, 'warnings': warnings + _not_done_warnings(others)}
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
    facts = {'id': row['id'], 'state': row['state'], 'activation': row['activation']}
    facts[USELESS] = _number(row['nmse']) >= 1
    facts |= {key: _number(row[key]) for key in _FACTS}
    rows += [facts | line for line in measured]
    if row['state'] == schema.DONE and (planned := _planned(row)):
      if lacking := planned - {line['step'] for line in lines}:
        holes[row['id']] = (len(lacking), len(planned))
  also = [new for new in _CURVES_MAY.values() if any(new in row for row in rows)]
  number = [*_FACTS, *_CURVES.values(), *also]
  curves = pd.DataFrame(rows, columns=pd.Index(['id', 'state', 'activation', USELESS, *number]))
  curves[USELESS] = curves[USELESS].astype(bool)
  curves[number] = curves[number].astype(float)  # also where there are no rows
  curves.attrs = {'warnings': _holes_warnings(holes)}
  return curves


def _cells(path: str, cells: pd.DataFrame) -> pd.DataFrame:
  """Cells that a caller read before, as from `load_cells`."""
  checks.path('path', path)
  frames.frame('cells', cells, ['id', 'state', 'reason', 'verified', 'activation', *_FACTS, *_MUST])
  for column in ('id', 'state', 'reason'):
    frames.labels(cells, column)
  return cells


def _cell(folder: str, name: str) -> dict[str, Any]:
  found = cell_state.read(files.join(folder, name), name, copied=True)
  row: dict[str, Any] = {'id': name, 'state': found.state, 'reason': found.reason}
  if found.config:
    flat = records.flatten(found.config)
    row |= {column: flat.get(key) for key, column in schema.FROM_CONFIG.items()}
    row['setting'] = _setting(found.config)
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


def _setting(config: dict[str, Any]) -> str:
  """Equal for cells that differ in nothing but learning rate and seeds, wherever they ran and whatever they went on from."""
  identity = cell.identity_of(config)
  kept = {k: v for k, v in identity.items() if not any(k == out or k.startswith(f'{out}.') for out in _NOT_SETTING)}
  return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def _number(value: Any) -> float:
  """A JSON number as float, anything else as NaN."""
  if isinstance(value, bool) or not isinstance(value, int | float | np.number):
    return math.nan
  try:
    return float(value)
  except OverflowError:
    return math.inf
