"""IsoFLOP profiles: for a compute budget, the loss of every size trained with it, and the size that does best.

A profile is a valley in log n (see `valley`). A budget is refused, and named, where the valley has no bottom: the best
size is at the edge of those tried, the parabola opens downwards, or it is flat. Through the others goes n_opt = c C^p.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis import frames, table, valley
from analysis.fit import Fit, fit_law
from analysis.fitting import resample
from analysis.frontier import BURN_IN
from sae_jax import checks
from sae_jax.errors import UserError

_BUDGETS = 6  # of compute, where the sweep was not made for certain ones
_SAME = 0.02  # relative: cells that spent so nearly the same share a budget


def profiles(
  curves: pd.DataFrame,
  budgets: Sequence[float],
  x: str = 'flops_useful',
  y: str = 'nmse',
  flat: float = valley.FLAT,
) -> tuple[pd.DataFrame, pd.DataFrame]:
  """The points of every profile, and one row a budget.

  A run's loss at a budget is interpolated in logs between its measurements; runs that had not spent it, or were in
  the first twentieth of theirs, are not in that profile. Compare runs of one family and target.

  Returns:
    points: budget, id, n_latents, y.
    best: budget, `sizes` in its profile, n_latents at the minimum with `low` and `high`, y there, `verdict`, `reason`.

  Raises:
    UserError: no finished run has both columns, or a budget is not positive.
  """
  done = table.finished_runs(curves, x, y)
  budgets = checks.numbers('budgets', budgets, 'give FLOPs inside the runs, each once')
  checks.number('flat', flat, 'a number of at least 0', f'the usual choice is {valley.FLAT}', least=0)
  rows = []
  for name, run in done.sort_values(x, kind='stable').groupby('id', sort=True):
    spent, loss = run[x].to_numpy(float), run[y].to_numpy(float)
    first = max(spent[0], BURN_IN * spent[-1])
    for budget in budgets:
      if first <= budget <= spent[-1] * (1 + 1e-9):  # a run's own budget went through JSON
        value = float(np.exp(np.interp(np.log(budget), np.log(spent), np.log(loss))))
        rows.append({'budget': budget, 'id': name, 'n_latents': run['n_latents'].iloc[0], y: value})
  points = pd.DataFrame(rows, columns=pd.Index(['budget', 'id', 'n_latents', y]))
  best = []
  for budget in budgets:
    mine = points[points['budget'] == budget]
    found = valley.fit_valley(mine['n_latents'].to_numpy(float), mine[y].to_numpy(float), flat)
    best.append(
      {
        'budget': budget,
        'sizes': mine['n_latents'].nunique(),
        'n_latents': found.x,
        'low': found.low,
        'high': found.high,
        y: found.y,
        'curvature': found.curvature,
        'verdict': found.verdict,
        'reason': found.reason,
      }
    )
  columns = ['budget', 'sizes', 'n_latents', 'low', 'high', y, 'curvature', 'verdict', 'reason']
  return points, pd.DataFrame(best, columns=pd.Index(columns))


def budgets(curves: pd.DataFrame, x: str = 'flops_useful') -> np.ndarray:
  """Compute at which at least three sizes can be compared: what cells were trained for, else six in equal ratios.

  Args:
    curves: as from `load_curves`, of finished runs of one family and target.
    x: column of the compute.

  Returns:
    Budgets by rising compute; none where no three sizes overlap.
  """
  checks.text('x', x, 'give a column of the curves, e.g. flops_useful')
  frames.frame('curves', curves, ('id', 'n_latents', 'nmse', x))
  frames.labels(curves, 'id')
  for column in ('n_latents', x):
    frames.measured(curves, column)
  runs = curves.groupby('id').agg(spent=(x, 'max'), n=('n_latents', 'first')).sort_values('spent')
  # Neighbours closer than _SAME belong together; the least of them is what all have spent.
  group = (runs['spent'].pct_change() > _SAME).cumsum()
  meant = runs.groupby(group).agg(spent=('spent', 'min'), sizes=('n', 'nunique'))
  meant = meant.loc[meant['sizes'] >= 3, 'spent'].to_numpy(float)
  if len(meant):
    return meant
  seen = curves.loc[curves[x] > 0, x]
  tried = np.geomspace(seen.min(), seen.max(), 60) if len(seen) else np.array([])
  _, found = profiles(curves, tried.tolist(), x)
  shared = found.loc[found['sizes'] >= 3, 'budget'] if len(found) else pd.Series(dtype=float)
  return np.geomspace(shared.min(), shared.max(), _BUDGETS) if len(shared) else np.array([])


def fit_best_size(
  curves: pd.DataFrame,
  budgets: Sequence[float],
  x: str = 'flops_useful',
  y: str = 'nmse',
  flat: float = valley.FLAT,
  *,
  bootstrap: int = 500,
  seed: int = 0,
) -> Fit:
  """The law n_opt = c C^p through the minima of the profiles.

  Budgets read the same runs, so their minima err together, and the scatter around the law does not show it. The
  intervals therefore come from resamples of whole runs. In each, every profile is built again without the runs left
  out, then its minimum, then the law through the minima. Where standard errors are wider, those count. Even so the
  intervals are a little too narrow (LOG.md has the coverage).

  Raises:
    UserError: fewer than two budgets have a minimum.
  """
  resample.count(bootstrap)
  measured, best = profiles(curves, budgets, x, y, flat)
  points = best[best['verdict'] == 'minimum'].reset_index(drop=True)
  refused = best[best['verdict'] != 'minimum'].to_dict('records')
  why = valley.refusals([(f'C={row["budget"]:.3g}', row) for row in refused])
  if len(points) < 2:
    raise UserError(
      f'{len(points)} of {len(best)} budgets have a best size, the law needs two; train smaller and larger n at them: {why}'
    )
  fit = fit_law(points, 'growth', ['budget'], 'n_latents', bootstrap=0)
  if bootstrap:
    draws_B2 = _resampled(
      measured, points['budget'].to_numpy(float), y, bootstrap, np.random.default_rng(checks.seed(seed))
    )
    fit = fit.redrawn(draws_B2, 'run')
  if not refused:
    return fit
  return fit.warned(table.warning('edge_minimum', f'{len(refused)} of {len(best)} budgets are left out: {why}'))


def _resampled(points: pd.DataFrame, budgets: np.ndarray, y: str, count: int, rng: np.random.Generator) -> np.ndarray:
  """ln c and p of up to `count` resamples of runs; those that leave fewer than two minima are dropped."""
  name_R, run_N = np.unique(points['id'], return_inverse=True)
  weight_BR = rng.multinomial(len(name_R), np.full(len(name_R), 1 / len(name_R)), size=count).astype(float)
  bottom_BC = np.empty((count, len(budgets)))
  for c, budget in enumerate(budgets):
    mine_N = (points['budget'] == budget).to_numpy()
    u_N, v_N = (np.log(points.loc[mine_N, column].to_numpy(float)) for column in ('n_latents', y))
    bottom_BC[:, c] = valley.bottoms(u_N, v_N, weight_BR[:, run_N[mine_N]])
  bottom_BC = bottom_BC[np.isfinite(bottom_BC).sum(axis=1) >= 2]
  on_BC = np.isfinite(bottom_BC)
  number_B = on_BC.sum(axis=1)
  u_C, v_BC = np.log(budgets), np.where(on_BC, bottom_BC, 0.0)
  mean_u_B, mean_v_B = on_BC @ u_C / number_B, v_BC.sum(axis=1) / number_B
  away_BC = on_BC * (u_C - mean_u_B[:, None])
  p_B = (away_BC * v_BC).sum(axis=1) / (away_BC**2).sum(axis=1)
  return np.stack([mean_v_B - p_B * mean_u_B, p_B], axis=1)
