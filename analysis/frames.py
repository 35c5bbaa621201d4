"""Tables that a caller hands over, checked before anything is read from them.

pandas answers where it should ask: a name that two columns share gives a table, a date is a number of nanoseconds, a
complex number loses a part, a group with a missing label vanishes. Each is a `UserError` of one line instead.
"""

import difflib
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from analysis import notation, read_table
from sae_jax.checks import shown
from sae_jax.errors import UserError


def frame(name: str, value: Any, columns: Iterable[str] = ()) -> pd.DataFrame:
  """A DataFrame whose columns have names of their own, these among them."""
  if not isinstance(value, pd.DataFrame):
    raise UserError(f'{name}={shown(value)} is not a table; give a pandas.DataFrame, as analysis.load_ledger returns')
  if not value.columns.is_unique:
    twice = value.columns[value.columns.duplicated()][0]
    raise UserError(f'{name} has two columns {shown(twice)}; rename or drop one')
  for column in columns:
    if column not in value.columns:
      raise UserError(f'no column {shown(column)} in {name}; {known(column, value)}')
  return value


def known(column: Any, table: pd.DataFrame) -> str:
  """What a table has instead of a column, and the nearest to it."""
  names = [str(c) for c in table.columns]
  return f'it has {", ".join(names)[:400] or "none"}{near(column, names)}'


def near(word: Any, names: Iterable[str]) -> str:
  """The question whether another name was meant; empty where none is near."""
  found = difflib.get_close_matches(str(word), list(names), n=1)
  return f' (did you mean {found[0]}?)' if found else ''


def floats(table: pd.DataFrame, column: str) -> np.ndarray:
  """A column as float64 [N], NaN where it is missing. Raises `UserError` for what is no number, naming the row."""
  series = table[column]
  if series.dtype.kind in 'cmM':
    raise UserError(f'{column} holds {series.dtype}, which are no plain numbers; convert the column to floats')
  read, form = series, table.attrs.get(read_table.NOTATION)
  if form is not None:  # pandas would take 1.024 for a number in a file of decimal commas
    read = series.map(lambda value: form.number(value) if isinstance(value, str) else value)
  numbers = pd.to_numeric(read, errors='coerce')
  bad = np.flatnonzero((numbers.isna() & series.notna()) | series.map(_no_number))
  if bad.size:
    value = series.iloc[bad[0]]
    what = 'remove or correct that row' if form is None else notation.remedy(value)
    raise UserError(f'{column}={shown(value, 42)} in {read_table.place(table, bad[0])} is not a number; {what}')
  return numbers.to_numpy(dtype=np.float64, na_value=np.nan)


def measured(table: pd.DataFrame, column: str) -> np.ndarray:
  """As `floats`, where a missing value means that nothing was measured, and an infinite one is refused."""
  values = floats(table, column)
  bad = np.flatnonzero(np.isinf(values))
  if bad.size:
    raise UserError(
      f'{column}={values[bad[0]]} in {read_table.place(table, bad[0])} is not finite; remove or correct that row'
    )
  return values


def labels(table: pd.DataFrame, column: str) -> None:
  """Raises `UserError` unless every row has a label of one type there, so that rows can be put together by it."""
  series = table[column]
  if series.isna().any():
    rows = np.flatnonzero(series.isna()) + 1
    raise UserError(f'{column} is missing in {len(rows)} rows, first in row {rows[0]}; fill it in or leave them out')
  kinds = {type(value) for value in series}
  if len(kinds) > 1 or not all(issubclass(kind, str | int | float | np.number) for kind in kinds):
    names = ', '.join(sorted(kind.__name__ for kind in kinds))
    raise UserError(f'{column} holds {names}, and labels are texts or numbers, all of one type; convert the column')


def _no_number(value: Any) -> bool:
  return isinstance(value, bool | np.bool_ | complex | np.complexfloating)
