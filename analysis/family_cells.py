"""The cells of a table that families are compared by, and those that one should look at before one believes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import frames, sparsity, table
from sae_jax import checks
from sae_jax.errors import UserError

_NAMED = 6  # cells named in a warning


def readable(cells: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, str]]]:
  """The cells that have a family, a size, an L0 and an NMSE below 1, with what was left out."""
  rows = frames.frame('cells', cells, ('activation', 'n_latents', 'l0', 'nmse')).reset_index(drop=True)
  if 'id' in rows and rows['id'].duplicated().any():
    twice = rows['id'][rows['id'].duplicated()].iloc[0]
    raise UserError(f'id {checks.shown(twice)} is in the table twice; drop the copies')
  if len(rows):
    frames.labels(rows, 'activation')
  for column in ('l0', 'nmse', 'tokens', *sparsity.TARGETS):
    if column in rows:
      rows[column] = frames.measured(rows, column)
  rows['n_latents'] = table.positive(rows, ['n_latents'])[:, 0]
  rows = table.useful(rows.astype({'activation': str}))
  warnings = suspects(rows)
  same = [key for key in ('activation', 'n_latents', *sparsity.TARGETS, 'tokens', 'l0', 'nmse') if key in rows]
  if count := int((copies := rows.duplicated(same) & rows['nmse'].notna()).sum()):
    text = (
      f'{count} rows have the L0 and NMSE of an earlier one of their setting: copies are no evidence, and are left out'
    )
    warnings, rows = [*warnings, table.warning('equal_rows', text)], rows[~copies]
  rows = rows[(rows['l0'] > 0) & (rows['nmse'] > 0) & (rows['nmse'] < 1)].reset_index(drop=True)
  asked = [sparsity.said(sparsity.target(row)) for row in rows.to_dict('records')]
  keys = zip(rows['activation'], rows['n_latents'], asked, rows['l0'], strict=True)
  # Where nothing says what was asked for, cells of one L0 are repeats.
  return rows.assign(setting=[f'{a} {n:g} {target or l0}' for a, n, target, l0 in keys]), warnings


def budget(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
  """The cells with the tokens that most cells of their size had, and the others."""
  if 'tokens' not in rows:
    return rows, rows[:0]
  usual = rows.groupby('n_latents')['tokens'].transform(lambda tokens: tokens.mode().max())
  on = rows['tokens'].isna() | (rows['tokens'] == usual)
  return rows[on].reset_index(drop=True), rows[~on].reset_index(drop=True)


def other_budgets(others: pd.DataFrame) -> list[dict[str, str]]:
  """A warning that names cells of another number of tokens; none when there are none."""
  if others.empty:
    return []
  said = [f'{_named(others, row)}: {row["tokens"]:,.0f}' for row in others.to_dict('records')]
  text = f'{len(others)} cells had another number of tokens than most of their size and are left out'
  return [table.warning('other_tokens', f'{text} ({listed(said)})')]


def listed(said: Sequence[str]) -> str:
  """The first few in words, and how many more there are."""
  return '; '.join(said[:_NAMED]) + (f' and {len(said) - _NAMED} more' if len(said) > _NAMED else '')


def suspects(cells: pd.DataFrame) -> list[dict[str, str]]:
  """A warning a kind that names the cells one should look at before one believes them."""
  nothing = pd.Series(np.nan, cells.index)
  k, l0, dead = (cells.get(name, nothing) for name in ('k', 'l0', 'dead_fraction'))
  kinds = (
    ('not_measured', cells['nmse'].isna() | ~(l0 > 0), 'l0', 'cells have no L0 or no NMSE and are left out'),
    (table.USELESS, cells['nmse'] >= 1, 'nmse', 'cells reconstruct no better than the mean does and are left out'),
    ('missed_target', (l0 / k - 1).abs() > 0.2, 'l0', 'cells missed the L0 that was asked for by more than 20 %'),
    ('many_dead', dead > 0.05, 'dead_fraction', 'cells have more than 5 % of dead latents'),
  )
  out = []
  for code, hit, column, what in kinds:
    rows = cells[hit].to_dict('records')
    if rows:
      said = listed([f'{_named(cells, row)}: {row.get(column, np.nan):.3g}' for row in rows])
      out.append(table.warning(code, f'{len(rows)} of {len(cells)} {what} ({said})'))
  return out


def _named(cells: pd.DataFrame, row: dict[str, Any]) -> str:
  """A cell in words: its id, family, size and target."""
  parts = [str(row.get('id', '')), f'n={row["n_latents"]:g}', sparsity.named(cells, row)]
  return ' '.join(part for part in parts if part)
