"""Families of autoencoders compared at equal measured L0.

What was asked for (k, a coefficient) differs from what came of it, and more active latents alone lower the loss. So the
loss of each family is read off at one L0: between its two neighbours, linearly in the logarithms.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd

from analysis import frames

_COLUMNS = ('activation', 'n_latents', 'l0', 'nmse')


class EqualL0(NamedTuple):
  """Families of one size at one L0."""

  n_latents: int
  l0: float
  rows: pd.DataFrame  # the finished cells: activation, l0, nmse
  nmse: dict[str, float]  # by family, the best first; a family without cells on both sides of the L0 is not in it


def compare(cells: pd.DataFrame) -> list[EqualL0]:
  """The families at each size, at an L0 that most of them reach from both sides. Empty where there is none.

  Cells that differ in neither family, size nor L0 count with their mean.
  """
  rows = frames.frame('cells', cells, _COLUMNS)
  rows = rows[(rows['l0'] > 0) & (rows['nmse'] > 0)]
  found = []
  for n, of_size in rows.groupby('n_latents'):
    curves = {
      str(name): mine.groupby('l0')['nmse'].mean() for name, mine in of_size.groupby('activation') if len(mine) > 1
    }
    reached = {
      l0: [name for name, curve in curves.items() if curve.index[0] <= l0 <= curve.index[-1]] for l0 in of_size['l0']
    }
    most = max(map(len, reached.values()))
    if most < 2:
      continue
    # The middle one of those that are reached by most.
    common = sorted(l0 for l0, names in reached.items() if len(names) == most)
    l0 = float(common[len(common) // 2])
    nmse = {
      name: float(np.exp(np.interp(np.log(l0), np.log(curves[name].index), np.log(curves[name].to_numpy()))))
      for name in reached[l0]
    }
    found.append(EqualL0(int(n), l0, of_size[list(_COLUMNS)], dict(sorted(nmse.items(), key=lambda item: item[1]))))
  return found
