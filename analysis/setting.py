"""Which cells are of one setting: everything that decides a cell but learning rate and seeds."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from analysis import frames, sparsity

# Columns that, where there are any, are equal in cells of one setting; for the tokens see `keys`.
_COLUMNS = ('n_latents', *sparsity.KEYS, 'd_model', 'batch_tokens', 'tokens', 'setting')


def keys(cells: pd.DataFrame) -> pd.DataFrame:
  """What says of which setting a cell is, by the number of its row: columns of the table, and equal rows are one setting.

  Where convergence ends runs, those of one setting see different numbers of tokens. So `tokens` are those that were asked
  for, in whole batches.
  """
  of = frames.frame('cells', cells)[[key for key in _COLUMNS if key in cells]].reset_index(drop=True)
  if {'tokens', 'tokens_asked', 'batch_tokens'} <= {*cells}:
    seen_N, asked_N, batch_N = (frames.measured(cells, column) for column in ('tokens', 'tokens_asked', 'batch_tokens'))
    # No run sees the last partial batch, so that budgets which differ in it alone are one.
    whole_N = asked_N - np.mod(asked_N, np.where(batch_N > 0, batch_N, np.nan))
    if (ended_N := seen_N < whole_N).any():
      of['tokens'] = np.where(ended_N, whole_N, seen_N)
  return of


def groups(cells: pd.DataFrame) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
  """What the cells of each setting have in common, as from `keys`, and these cells."""
  of = keys(cells)
  for _, rows in of.groupby([*of], sort=True, dropna=False):
    yield rows.iloc[:1].to_dict('records')[0], cells.iloc[rows.index]


def longest_run(cells: pd.DataFrame) -> pd.Series:
  """For every cell, the most tokens that one of its setting saw: the same for all of them, wherever they converged."""
  of = keys(cells)
  seen = cells['tokens'].reset_index(drop=True)
  return seen.groupby([of[key] for key in of], dropna=False).transform('max').set_axis(cells.index)


def longest(cells: pd.DataFrame) -> pd.DataFrame:
  """Of every size and target, the cells of the setting whose longest run saw the most tokens."""
  of = [key for key in ('subject', 'n_latents', *sparsity.KEYS) if key in cells]
  run = longest_run(cells)
  most = cells.assign(tokens=run).groupby(of, dropna=False)['tokens'].transform('max')
  return cells[run == most].reset_index(drop=True)
