"""The best learning rate of every size, from the valley of its loss, and its law c n^-p.

A size whose best rate is the lowest or highest tried, or whose valley is flat, gives no point to the law and is named.
"""

import pandas as pd

from analysis import setting, sparsity, table, valley
from analysis.fit import Fit, fit_law
from analysis.fitting import resample
from sae_jax import checks
from sae_jax.errors import UserError


def valleys(cells: pd.DataFrame, flat: float = valley.FLAT) -> pd.DataFrame:
  """One row a setting (all but learning rate and seed): its sizes, `learning_rate`, `low`, `high`, `nmse`, `verdict`,
  `reason`. Only where `verdict` is 'minimum' are the numbers not NaN.

  Args:
    cells: as from `read_ledger.load_ledger`.
    flat: relative rise over all rates below which a valley has no best rate.
  """
  checks.number('flat', flat, 'a number of at least 0', f'the usual choice is {valley.FLAT}', least=0)
  table.positive(cells, ['n_latents', 'learning_rate', 'nmse'])
  sparsity.check(cells)
  rows = []
  for same, group in setting.groups(cells):
    found = valley.fit_valley(group['learning_rate'].to_numpy(), group['nmse'].to_numpy(), flat)
    rows.append(
      same
      | {
        'rates': group['learning_rate'].nunique(),
        'learning_rate': found.x,
        'low': found.low,
        'high': found.high,
        'nmse': found.y,
        'curvature': found.curvature,
        'verdict': found.verdict,
        'reason': found.reason,
      }
    )
  columns = [*setting.keys(cells), 'rates', 'learning_rate', 'low', 'high', 'nmse', 'curvature', 'verdict', 'reason']
  return pd.DataFrame(rows, columns=pd.Index(columns))


def fit_learning_rate(cells: pd.DataFrame, flat: float = valley.FLAT, *, bootstrap: int = 500) -> Fit:
  """The law lr = a n^-b through the minima of the valleys; give it cells of one family and target, or say that
  the target does not matter.

  Raises:
    UserError: fewer than two sizes have a valley with a bottom.
  """
  resample.count(bootstrap)
  found = valleys(cells, flat)
  points = found[found['verdict'] == 'minimum'].reset_index(drop=True)
  refused = found[found['verdict'] != 'minimum']
  if points['n_latents'].nunique() < 2:
    why = f': {_refusals(refused)}' if len(refused) else ''
    raise UserError(
      f'{points["n_latents"].nunique()} sizes have a best learning rate, the law needs two; try more rates{why}'
    )
  fit = fit_law(points, 'power_no_floor', ['n_latents'], 'learning_rate', bootstrap=bootstrap)
  if refused.empty:
    return fit
  return fit.warned(
    table.warning('edge_minimum', f'{len(refused)} of {len(found)} valleys are left out: {_refusals(refused)}')
  )


def _refusals(refused: pd.DataFrame) -> str:
  rows = refused.to_dict('records')
  return valley.refusals([(f'n={row["n_latents"]:g}, {sparsity.named(refused, row)}', row) for row in rows])
