"""Which points a bootstrap draws together: rows, runs, or settings and then the seeds inside them.

A resample is a weight per row, so that all of them are fitted at once.
"""

import numpy as np
import pandas as pd

from analysis import frames
from analysis.law import Array
from sae_jax import checks
from sae_jax.errors import UserError

MOST = 100_000
_TRIES = 20  # most resamples of a handful of points cannot carry a law


def count(bootstrap: int) -> int:
  """The number of resamples asked for. Raises `UserError`."""
  return checks.whole('bootstrap', bootstrap, 0, MOST, 'some hundreds do, 0 uses standard errors')


def labels(points: pd.DataFrame, group: str | None) -> Array:
  """Index [N] of what is resampled together: the row, or the value of the group column."""
  if group is None:
    return np.arange(len(points))
  checks.text('group', group, 'give a column of the table')
  if group not in points.columns:
    raise UserError(f'group {checks.shown(group)} is not a column; {frames.known(group, points)}')
  frames.labels(points, group)
  index_N = pd.factorize(points[group])[0]
  if index_N.max(initial=0) < 1:
    raise UserError(f'group {group!r} has one value; resampling needs at least two')
  return index_N


def weights(
  label_N: Array, setting_N: Array, least: int, count: int, rng: np.random.Generator, *, within: bool = False
) -> Array:
  """Weights [1 + B, N]: ones, then resamples that still have `least` different settings (up to `count` of them).

  Labels are drawn with replacement. With `within`, the rows of a label (its seeds) are drawn again inside it, as often
  as the label was drawn times their number. That counts the scatter of seeds a little twice. The spread of resamples is
  too wide for it by a factor of sqrt(3/2) at most: with two seeds and no other scatter.
  """
  row_N = np.arange(len(label_N))
  members = [row_N[label_N == g] for g in range(int(label_N.max()) + 1)]
  kept = [np.ones((1, len(label_N)))]
  found = 0
  for _ in range(_TRIES):
    if found >= count:
      break
    drawn_BG = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=count)
    weight_BN = drawn_BG[:, label_N].astype(float)
    for g, rows in enumerate(members):
      if within and len(rows) > 1:
        weight_BN[:, rows] = rng.multinomial(drawn_BG[:, g] * len(rows), np.full(len(rows), 1 / len(rows)))
    different_B = np.array([len(np.unique(setting_N[w > 0])) for w in weight_BN])
    kept.append(weight_BN[different_B >= least][: count - found])
    found += len(kept[-1])
  return np.concatenate(kept)
