"""What repeats of one setting under other seeds say: the noise of seeds, and whether a law fits to within it.

The residual of a law is noise of seeds plus what the law gets wrong. Only repeats can tell the two apart.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import special

from analysis import sparsity, table
from analysis.law import Array

_ALIKE = ('setting', 'learning_rate')  # with the variables of the law, what repeats have in common
_SEEDS = ('seed', 'data_seed')
_CLEAR = 0.01  # probability under a fitting law below which lack of fit is warned of
_NOTHING = 1e-12  # rms that is rounding


def replicates(points: pd.DataFrame, x: Sequence[str]) -> Array | None:
  """Index [N] of the setting of every row; None unless some setting was run with two seeds or more.

  Rows are of one setting when they agree in the variables of the law and, where the table has these columns, in
  `setting` and learning rate. Repeats never share a measured variable, so there `setting` alone says it.
  """
  seeds = [c for c in _SEEDS if c in points]
  asked = [c for c in x if c != sparsity.MEASURED or 'setting' not in points]
  keys = [*asked, *(c for c in _ALIKE if c in points)]
  if not seeds or not points[[*keys, *seeds]].drop_duplicates()[keys].duplicated().any():
    return None
  return points.groupby(keys, sort=False, dropna=False).ngroup().to_numpy()


def noise(setting_N: Array, v_N: Array) -> tuple[float, int]:
  """Sum of squares of the log losses around the mean of their setting, and its degrees of freedom."""
  count_S = np.bincount(setting_N)
  mean_S = np.bincount(setting_N, v_N) / count_S
  return float(np.sum((v_N - mean_S[setting_N]) ** 2)), len(v_N) - len(count_S)


def judge(
  setting_N: Array | None, v_N: Array, squares: float, width: int, least_squares: bool
) -> tuple[dict[str, float | int] | None, list[dict[str, str]]]:
  """The entry `seed_noise` of a fit's diagnostics, and a warning `lack_of_fit` where p < 0.01.

  Args:
    setting_N: as from `replicates`.
    squares: sum of squared residuals of the fit.
    width: its constants.
    least_squares: whether it minimises those squares; another objective has no F test.

  Returns:
    sd_log: pooled standard deviation within settings of the log loss; freedom: its degrees of freedom;
    lack_of_fit_p: probability (F test) of settings this far off the law were it right, NaN when it cannot be tested.
  """
  if setting_N is None:
    return None, []
  pure, freedom = noise(setting_N, v_N)
  sd = float(np.sqrt(pure / freedom))
  more = len(v_N) - width - freedom  # settings beyond the constants
  p = float('nan')
  if least_squares and more > 0 and sd > _NOTHING:
    ratio = max(squares - pure, 0.0) / more / (pure / freedom)
    p = float(special.fdtrc(more, freedom, ratio))
  found = {'sd_log': sd, 'freedom': freedom, 'lack_of_fit_p': p}
  if not p < _CLEAR:
    return found, []
  text = (
    f'settings lie further from the law than seeds scatter (p = {p:.1g}; seeds {sd:.2g} in log loss, residuals '
    f'{np.sqrt(squares / len(v_N)):.2g}): the law is not quite right here, or the settings differ in something else'
  )
  return found, [table.warning('lack_of_fit', text)]
