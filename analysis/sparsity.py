"""What sparsity was asked of a cell: its k or, lacking one, the coefficient of its penalty. What came of it is its L0.

A law over n is of the cells of one family of autoencoders (column `activation`) and one target.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis import frames, read_table
from sae_jax.errors import UserError

TARGETS = ('k', 'sparsity')  # columns; of a row, the first that is not missing counts
KEYS = ('activation', *TARGETS)  # whose rows belong together where all are equal
MEASURED = 'l0'  # no two cells share it exactly
ALIKE = 1.1  # factor within which one L0 is like another


def keys(rows: pd.DataFrame) -> list[str]:
  """Those of `KEYS` that a table has. Group by them with `dropna=False`: what has a k has no coefficient."""
  return [key for key in KEYS if key in rows]


def check(rows: pd.DataFrame) -> None:
  """Raises `UserError` for a row without a target above 0."""
  asked_N = frames.measured(frames.frame('table', rows, ['k']), 'k')
  if 'sparsity' in rows:
    asked_N = np.where(np.isnan(asked_N), frames.measured(rows, 'sparsity'), asked_N)
  bad = np.flatnonzero(~(asked_N > 0))
  if bad.size:
    raise UserError(
      f'k={rows["k"].iloc[bad[0]]} in {read_table.place(rows, bad[0])} is no number of latents above 0, nor is there a '
      'coefficient above 0 in a column sparsity; correct that row or leave it out'
    )


def target(row: Mapping[str, Any]) -> dict[str, float]:
  """What was asked of a row, as {'k': 8} or {'sparsity': 0.05}; empty where that is not known."""
  for name in TARGETS:
    if pd.notna(value := row.get(name)):
      return {name: int(value) if value == int(value) else float(value)}
  return {}


def targets(rows: pd.DataFrame) -> list[dict[str, float]]:
  """The targets of the rows, each once: rising k, then rising coefficients."""
  names = [key for key in TARGETS if key in rows]
  found = rows[names].drop_duplicates()
  return [target(row) for row in found.sort_values(names).to_dict('records')] if names else []


def at(rows: pd.DataFrame, where: Mapping[str, float | str]) -> pd.DataFrame:
  """The rows of a target, or of a family, or of whatever else they must have."""
  for key, value in where.items():
    rows = rows[rows[key] == value]
  return rows


def said(where: Mapping[str, float | str]) -> str:
  """Such as 'k=8', or 'relu, sparsity=0.05': a family is said by its name alone."""
  return ', '.join(f'{key}={v:g}' if key in TARGETS else str(v) for key, v in where.items())


def gathered(places: Iterable[Mapping[str, float | str]]) -> dict[str, str]:
  """The values by their keys, as a list in words: {'k': '3, 7'}."""
  found: dict[str, list[str]] = {}
  for key, value in (pair for place in places for pair in place.items()):
    found.setdefault(key, []).append(value if isinstance(value, str) else f'{value:g}')
  return {key: ', '.join(values) for key, values in found.items()}


def named(rows: pd.DataFrame, row: Mapping[str, Any]) -> str:
  """A row's target in words, with its family where the table has several."""
  several = 'activation' in rows and rows['activation'].nunique() > 1
  return said(({'activation': row['activation']} if several else {}) | target(row))
