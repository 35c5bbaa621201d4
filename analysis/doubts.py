"""What a table says against a fit to it: broken counts, copied rows, two curves in one table. Warnings as data."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
from scipy import special

from analysis import read_table, seeds, sparsity, table
from analysis.law import Array, Law
from analysis.measured import SE, UNITS

# Columns that count something, so that a broken number in them is another unit or another notation.
COUNTS = ('n_latents', 'k', 'tokens', 'steps', 'step', 'batch_tokens', 'd_model')
_UNNAMED = 'Unnamed: 0'  # numbers the rows
_NO_CURVE = ('id', 'seed', 'data_seed', 'target', _UNNAMED)  # tell repeats apart, or repeat another column in words
_ROUGH = 0.02  # rms log residual below which nothing is looked for
_FAR = 0.05  # deviation in log loss at equal variables beyond what seeds do
_EXPLAINED = 0.75  # share of the squares that curves of their own must take away
_CLEAR = 1e-3  # probability of such a share by chance
_MOST_CURVES = 20  # as many as --by takes


def of_rows(points: pd.DataFrame, x: Sequence[str], y: str) -> list[dict[str, str]]:
  """Warnings of the rows alone, before any fit: `broken_count` and `equal_rows`."""
  return [*_broken_counts(points, x), *_equal_rows(points, [*x, y])]


def of_residuals(
  points: pd.DataFrame, law: Law, x: Sequence[str], y: str, residual_N: Array, group: str | None
) -> list[dict[str, str]]:
  """Warnings of a fit's residuals: `pooled` where a column that is not used tells curves apart, else `equal_x`.

  Args:
    residual_N: ln predicted - ln observed of every row.
    group: the column of rows that are not independent, which tells no curves apart.
  """
  if np.sqrt(np.mean(residual_N**2)) < _ROUGH:
    return []
  u_NQ = np.log(table.positive(points, x))
  shares: dict[str, float] = {}
  likely = []  # columns that could tell curves apart, whether or not so few points show it
  # What was asked for moves what is measured, and tells no curves apart.
  asked = (*sparsity.TARGETS, 'setting') if sparsity.MEASURED in x else ()
  measured = [name for column in points.attrs.get(UNITS, ()) for name in (column, column + SE)]
  for column in points.columns:
    if column not in (*x, y, *_NO_CURVE, *asked, *measured, group):
      curve_N = pd.factorize(points[column].astype(str))[0]
      if not _has_curves(curve_N, u_NQ):
        continue
      # A number that goes with the variables may be set by them (a learning rate); a name is not.
      if _lie_side_by_side(curve_N, u_NQ) or not pd.api.types.is_numeric_dtype(points[column]):
        likely.append(str(column))
        shares[str(column)] = _explained(curve_N, u_NQ, residual_N, len(law.names))
  setting_N = np.unique(u_NQ, axis=0, return_inverse=True)[1].ravel()
  if shares and max(shares.values()) > 0:
    best = max(shares, key=lambda column: shares[column])
    like = [column for column, share in shares.items() if column != best and share > 0.99 * shares[best]]
    also = f' (or {", ".join(like[:3])})' if like else ''
    seen = _furthest(points, x, y, setting_N, points[best].astype(str).to_numpy())
    text = f'{best}{also} tells apart rows that are fitted as one curve{seen}; fit each by itself with --by={best}'
    return [table.warning('pooled', text)]
  if group is not None or seeds.replicates(points, x) is not None or len(np.unique(setting_N)) == len(points):
    return []
  squares, freedom = seeds.noise(setting_N, np.log(table.positive(points, [y])[:, 0]))
  if np.sqrt(squares / freedom) < _FAR:
    return []
  seen = _furthest(points, x, y, setting_N, np.arange(len(points)))
  text = f'rows of equal {", ".join(x)} lie far apart{seen}'
  if likely:
    return [table.warning('equal_x', f'{text}; if {likely[0]} is why, fit each by itself with --by={likely[0]}')]
  text += ', and no column says why; name what differs in a column, and fit each by itself with --by=COL'
  return [table.warning('equal_x', text)]


def _broken_counts(points: pd.DataFrame, x: Sequence[str]) -> Iterator[dict[str, str]]:
  grouped = points.attrs.get(read_table.GROUPED, {})
  for column in x:
    values = table.positive(points, [column])[:, 0]
    broken = np.flatnonzero(values != np.round(values))
    partly = 0 < broken.size < len(values)
    counts, three = column in COUNTS, column in grouped
    if not broken.size or not ((counts and (partly or three)) or (partly and three)):
      continue
    first = f'{values[broken[0]]:g} in {read_table.place(points, int(broken[0]))}'
    example = grouped.get(column)
    first = first if example is None else f'{example!r}, read as {first}'
    where = 'write it without grouping points; a file of decimal commas has --thousands=. --decimal=,'
    text = f'{column} is whole in {len(values) - broken.size} rows and broken in {broken.size} ({first}); a count is whole: {where}'
    yield table.warning('broken_count', text)


def _equal_rows(points: pd.DataFrame, columns: Sequence[str]) -> Iterator[dict[str, str]]:
  columns = list(dict.fromkeys(columns))
  alike = points[columns].duplicated(keep=False).to_numpy()
  if not alike.any():
    return
  at = np.flatnonzero(alike)
  rows = points.iloc[at].drop(columns=[_UNNAMED], errors='ignore').astype(str)
  copies = rows.duplicated().to_numpy()
  if not copies.any():
    return
  copy = int(np.argmax(copies))
  first = int(np.argmax((rows == rows.iloc[copy]).all(axis=1).to_numpy()))
  where = f'{read_table.place(points, int(at[copy]))} is that of {_short(points, int(at[first]))}'
  text = (
    f'{int(copies.sum())} of {len(points)} rows equal an earlier one in every column ({where}): copies are no evidence '
    'and make intervals too narrow; drop them, or let a column such as seed tell real repeats apart'
  )
  yield table.warning('equal_rows', text)


def _has_curves(curve_N: Array, u_NQ: Array) -> bool:
  """Whether the values of a column are few, and two of them have several settings each."""
  count = int(curve_N.max(initial=0)) + 1
  if not 2 <= count <= min(_MOST_CURVES, len(curve_N) // 2):
    return False
  return sum(len(np.unique(u_NQ[curve_N == c], axis=0)) > 1 for c in range(count)) > 1


def _lie_side_by_side(curve_N: Array, u_NQ: Array) -> bool:
  """Whether two curves of several settings span common ground."""
  members = [u_NQ[curve_N == c] for c in range(int(curve_N.max()) + 1)]
  low_CQ, high_CQ = (
    np.array([end(mine, axis=0) for mine in members if len(np.unique(mine, axis=0)) > 1]) for end in (np.min, np.max)
  )
  both_CCQ = np.minimum(high_CQ[:, None], high_CQ[None]) - np.maximum(low_CQ[:, None], low_CQ[None])
  return bool((both_CCQ >= 0).all(axis=2)[~np.eye(len(low_CQ), dtype=bool)].any())


def _explained(curve_N: Array, u_NQ: Array, residual_N: Array, width: int) -> float:
  """Share of the squares that a level of each curve, or a line of each, takes away; 0 where that may be chance."""
  count, curves = len(residual_N), int(curve_N.max()) + 1
  inside_NC = np.eye(curves)[curve_N]
  lines = [inside_NC, *(inside_NC * (u_N - u_N.mean())[:, None] for u_N in u_NQ.T)]
  whole = float(residual_N @ residual_N)
  for design_NP in (inside_NC, np.concatenate(lines, axis=1)):
    rest_N = residual_N - design_NP @ np.linalg.lstsq(design_NP, residual_N, rcond=None)[0]
    left = float(rest_N @ rest_N)
    more, freedom = design_NP.shape[1] - 1, count - width - design_NP.shape[1] + 1
    if freedom > 0 and left < (1 - _EXPLAINED) * whole:
      ratio = (whole - left) / more / (max(left, 1e-300) / freedom)
      if special.fdtrc(more, freedom, ratio) < _CLEAR:
        return 1 - left / whole
  return 0.0


def _furthest(points: pd.DataFrame, x: Sequence[str], y: str, setting_N: Array, curve_N: Array) -> str:
  """The two rows of equal variables and different curves whose losses differ most, in words; empty without any."""
  loss_N = table.positive(points, [y])[:, 0]
  best, found = 0.0, (0, 0)
  for setting in np.flatnonzero(np.bincount(setting_N) > 1):
    mine = np.flatnonzero(setting_N == setting)
    low, high = mine[np.argmin(loss_N[mine])], mine[np.argmax(loss_N[mine])]
    ratio = float(np.log(loss_N[high] / loss_N[low]))
    if ratio > best and curve_N[low] != curve_N[high]:
      best, found = ratio, (int(low), int(high))
  if not best:
    return ''
  one, other = found
  at = ', '.join(f'{column}={points[column].iloc[one]}' for column in x)
  values = f'{loss_N[one]:.4g} ({_short(points, one)}) and {loss_N[other]:.4g} ({_short(points, other)})'
  return f': at {at}, {y} is {values}'


def _short(points: pd.DataFrame, row: int) -> str:
  return read_table.place(points, row).split(' of ')[0]
