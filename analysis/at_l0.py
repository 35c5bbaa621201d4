"""Measures of families at equal L0, with the errors of their differences paired over what all of them saw.

A value is read off where the NMSE is: between the same cells with the same weights. So it is a linear combination of
values of cells, and without one window at a time that combination says how far the windows move it, or a difference of
two. What is common to all families in a window cancels there.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pandas as pd

from analysis import equal_l0, measured
from analysis.equal_l0 import Compared
from analysis.law import Array
from sae_jax import files, measures, schema
from sae_jax.errors import UserError
from sae_jax.measures import paired, results
from sae_jax.measures.measure import Measure
from sae_jax.measures.results import Result


@dataclasses.dataclass(frozen=True, eq=False)
class AtL0:
  """One value of a measure for every family, size and L0; NaN where its cells do not reach that L0 or lack the value."""

  of: Compared
  value_FNL: Array
  dropped_JFNL: Array  # without one sample; no rows where that is not known

  def value(self, name: str, n: float) -> tuple[float, float]:
    """Value and standard error of a family at the main L0."""
    place = self._place(name, n)
    return float(self.value_FNL[place]), _error(self.dropped_JFNL[:, *place])

  def difference(self, name: str, n: float) -> tuple[float, float, float]:
    """Value of a family less that of the reference at the main L0, its paired error, and what both errors give alone."""
    mine, other = self._place(name, n), self._place(self.of.reference, n)
    left, right = (self.dropped_JFNL[:, *place] for place in (mine, other))
    apart = float(np.hypot(_error(left), _error(right)))
    return float(self.value_FNL[mine] - self.value_FNL[other]), _error(left - right), apart

  def ranks(self, alike: Callable[[Array, Array], float], least: int) -> list[float]:
    """How alike the NMSE and the value order families, at each size and L0 that `least` of them reach."""
    out = []
    for n, at in np.ndindex(self.value_FNL.shape[1:]):
      x_F, y_F = self.of.loss_FNL[:, n, at], self.value_FNL[:, n, at]
      both = np.isfinite(x_F + y_F)
      if both.sum() >= least:
        out.append(alike(x_F[both], y_F[both]))
    return out

  def _place(self, name: str, n: float) -> tuple[int, int, int]:
    at = (np.flatnonzero(self.of.sizes == n)[0], np.flatnonzero(self.of.l0 == self.of.main)[0])
    return self.of.families.index(name), *map(int, at)


def at_l0(ledger: str, cells: pd.DataFrame) -> dict[str, AtL0]:
  """Every value of every measure by column. A measure of too few cells is left out.

  Args:
    ledger: the folder a sweep wrote.
    cells: of several families. Those that a measure lacks have no part in what is read off of it.
  """
  by_measure, _ = measured.read(ledger, cells)
  out = {}
  for measure, of in by_measure.items():
    try:
      found = equal_l0.compare(cells[cells['id'].isin(of)])
    except UserError:
      continue
    dropped = _dropped(ledger, of)
    for value in dict.fromkeys(name for result in of.values() for name in result.values):
      cell_C = [
        of[name].values.get(value, {}).get('value', np.nan) if name in of else np.nan for name in found.cells['id']
      ]
      without = [dropped.get(name, {}).get(value) for name in found.cells['id']]
      counts = {len(one) for one in without if one is not None}
      rows = counts.pop() if len(counts) == 1 else 0
      dropped_CJ = [np.full(rows, np.nan) if one is None or not rows else one for one in without]
      column = f'{measure}/{value}'
      out[column] = AtL0(found, _combined(found, np.array(cell_C)), _combined(found, np.array(dropped_CJ).T))
  return out


def _combined(found: Compared, value_C: Array) -> Array:
  """Values [..., C] of cells at every family, size and L0: [..., F, N, L]. A cell without weight may lack its value."""
  weight_FNLC = found.weight_FNLC
  return np.where(weight_FNLC == 0, 0.0, weight_FNLC * value_C[..., None, None, None, :]).sum(axis=-1)


def _dropped(ledger: str, of: dict[str, Result]) -> dict[str, dict[str, Array]]:
  """By cell and name, the values without one sample; not of a cell whose lines cannot be believed."""
  out = {}
  for name, result in of.items():
    try:
      records = results.records(files.join(ledger, schema.CELLS, name), result)
    except (schema.Broken, OSError):
      continue
    if not any('arrays_sha256' in record for record in records):
      out[name] = paired.dropped(_measure(result), records)
  return out


def _measure(result: Result) -> Measure:
  made = measures.by_name(result.key.name)
  assert dataclasses.is_dataclass(made)
  return dataclasses.replace(made, **result.key.settings)


def _error(dropped_J: Array) -> float:
  found = paired.error(dropped_J)
  return np.nan if found is None else found
