"""IsoFLOP profiles: for a compute budget, the loss of every size trained with it, and the size that does best.

A profile is a valley in log n (see `valley`); budgets whose best size is at the edge of those tried, or whose
parabola opens downwards, or is flat, are refused and named. Through the others goes n_opt = c C^p.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis import table, valley
from analysis.fit import Fit, fit_law
from sae_jax.errors import UserError

_BURN_IN = 0.05  # share of a run's compute: before it, the loss is that of the initialisation


def profiles(
  curves: pd.DataFrame,
  budgets: Sequence[float],
  x: str = 'flops_useful',
  y: str = 'nmse',
  flat: float = valley.FLAT,
) -> tuple[pd.DataFrame, pd.DataFrame]:
  """The points of every profile, and one row a budget.

  A run's loss at a budget is interpolated in logs between its measurements; runs that had not spent it, or were in
  the first twentieth of theirs, are not in that profile. Compare runs of one k.

  Returns:
    points: budget, id, n_latents, y.
    best: budget, `sizes` in its profile, n_latents at the minimum with `low` and `high`, y there, `verdict`, `reason`.

  Raises:
    UserError: no finished run has both columns, or a budget is not positive.
  """
  for column in ('id', 'n_latents', x, y):
    if column not in curves.columns:
      raise UserError(f'no column {column!r} in the curves; they have {", ".join(map(str, curves.columns))}')
  done = curves[curves['state'] == 'done'] if 'state' in curves else curves
  done = done[np.isfinite(done[x]) & np.isfinite(done[y])]
  if done.empty:
    raise UserError(f'no finished run has both {x} and {y} in its metrics; there is no profile to draw')
  table.positive(done, ['n_latents', x, y])
  for budget in budgets:
    if not (np.isfinite(budget) and budget > 0):
      raise UserError(f'budget {budget} is not a positive number of FLOPs; give some inside the runs')
  rows = []
  for name, run in done.sort_values(x, kind='stable').groupby('id', sort=True):
    spent, loss = run[x].to_numpy(float), run[y].to_numpy(float)
    first = max(spent[0], _BURN_IN * spent[-1])
    for budget in budgets:
      if first <= budget <= spent[-1] * (1 + 1e-9):  # a run's own budget went through JSON
        value = float(np.exp(np.interp(np.log(budget), np.log(spent), np.log(loss))))
        rows.append({'budget': budget, 'id': name, 'n_latents': run['n_latents'].iloc[0], y: value})
  points = pd.DataFrame(rows, columns=pd.Index(['budget', 'id', 'n_latents', y]))
  best = []
  for budget in budgets:
    mine = points[points['budget'] == budget]
    found = valley.fit_valley(mine['n_latents'].to_numpy(float), mine[y].to_numpy(float), flat)
    best.append({
      'budget': budget, 'sizes': mine['n_latents'].nunique(), 'n_latents': found.x, 'low': found.low, 'high': found.high,
      y: found.y, 'curvature': found.curvature, 'verdict': found.verdict, 'reason': found.reason,
    })  # fmt: skip
  return points, pd.DataFrame(best)


def fit_best_size(
  curves: pd.DataFrame,
  budgets: Sequence[float],
  x: str = 'flops_useful',
  y: str = 'nmse',
  flat: float = valley.FLAT,
  *,
  bootstrap: int = 500,
) -> Fit:
  """The law n_opt = c C^p through the minima of the profiles.

  Budgets read the same runs, so they are not independent and the interval is too narrow when they are close.

  Raises:
    UserError: fewer than two budgets have a minimum.
  """
  _, best = profiles(curves, budgets, x, y, flat)
  points = best[best['verdict'] == 'minimum'].reset_index(drop=True)
  refused = best[best['verdict'] != 'minimum'].to_dict('records')
  why = '; '.join(f'C={row["budget"]:.3g}: {row["verdict"]} ({row["reason"]})' for row in refused[:6])
  if len(points) < 2:
    raise UserError(
      f'{len(points)} of {len(best)} budgets have a best size, the law needs two; train smaller and larger n at them: {why}'
    )
  fit = fit_law(points, 'growth', ['budget'], 'n_latents', bootstrap=bootstrap)
  if not refused:
    return fit
  return fit.warned(
    table.warning('edge_minimum', f'{len(refused)} of {len(best)} budgets are left out: {why}')
  )
