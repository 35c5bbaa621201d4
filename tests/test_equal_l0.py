"""Families at equal measured L0: a planted difference is found whatever L0 each cell has."""

import numpy as np
import pandas as pd
import pytest

from analysis import equal_l0
from analysis.figures import equal_l0 as figure


def planted(n: int, **families: tuple[float, list[float]]) -> pd.DataFrame:
  """NMSE = level * l0^-.5 of each family, at L0s of its own."""
  rows = [
    {'activation': name, 'n_latents': n, 'l0': l0, 'nmse': level * l0**-0.5}
    for name, (level, l0s) in families.items()
    for l0 in l0s
  ]
  return pd.DataFrame(rows)


def test_a_planted_ratio_is_found_between_the_cells():
  cells = planted(64, topk=(1.0, [4, 8, 16]), relu=(1.3, [3, 7.3, 11, 21]), gated=(1.05, [30, 40]))
  (found,) = equal_l0.compare(cells.sample(frac=1, random_state=0))
  assert list(found.nmse) == ['topk', 'relu'] and 4 <= found.l0 <= 16  # gated has nothing on both sides
  assert found.nmse['relu'] / found.nmse['topk'] == pytest.approx(1.3)
  assert figure.equal_l0(found).axes[0].get_title() == 'n = 64'


def test_where_nothing_can_be_compared_nothing_is_said():
  apart = planted(64, topk=(1.0, [4, 8]), relu=(1.3, [10, 20]))
  alone = planted(64, topk=(1.0, [4, 8]), relu=(1.3, [5]))
  assert equal_l0.compare(apart) == equal_l0.compare(alone) == []
  unknown = planted(64, topk=(1.0, [4, 8]), relu=(1.3, [5, 7])).assign(l0=np.nan)
  assert equal_l0.compare(unknown) == []
