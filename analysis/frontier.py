"""L(C): the best loss any run reached for a given compute, and the power law through it.

A point of the envelope is fitted only where runs of at least two sizes had been measured on both sides of its compute.
Elsewhere it is the learning curve of the one size that exists there, not the best choice of a size. The first steps of
a run do not count: their loss is that of the initialisation, which falls with n for free.
"""

from typing import Any

import numpy as np
import pandas as pd

from analysis import fit, laws, table
from analysis.fitting import resample
from sae_jax import checks
from sae_jax.errors import UserError

BURN_IN = 0.05  # share of a run's compute: before it, the loss is that of the initialisation
_SIZE = 'n_latents'
_NAMED = 6  # runs named in a warning


def envelope(
  curves: pd.DataFrame, x: str = 'flops_useful', y: str = 'nmse', *, burn_in: float = BURN_IN
) -> pd.DataFrame:
  """The measurements that beat every run at the same or less compute, by rising compute.

  Column `used` says whether at least two sizes compete there, so that the point belongs in a fit.
  Measurements in the first `burn_in` share of a run's compute are left out.
  """
  points = _sorted(curves, x, y, burn_in)
  record_BN, used_BN = _records(points, np.ones((1, points['id'].nunique()), bool), x, y)
  return points.assign(used=used_BN[0])[record_BN[0]].reset_index(drop=True)


def fit_frontier(
  curves: pd.DataFrame,
  x: str = 'flops_useful',
  y: str = 'nmse',
  *,
  law: str = 'power',
  bootstrap: int = 500,
  holdout: str | None = None,
  burn_in: float = BURN_IN,
  seed: int = 0,
) -> fit.Fit:
  """The law L(C) through the envelope of finished runs. Its intervals come from resampling runs, not points.

  Args:
    curves: as from `read_ledger.load_curves`; compare runs of one family and target, since a larger k lowers
      every loss.
    x: column of the compute.
    holdout: one comparison on the columns of `curves`, e.g. 'n_latents>=8192': the envelope is built again without
      those measurements and predicts the points they contributed.
    burn_in: share of a run's compute whose measurements are left out.

  Raises:
    UserError: too few runs or points for a law.
  """
  chosen = laws.named(law)
  resample.count(bootstrap)
  points = _sorted(curves, x, y, burn_in)
  runs = np.unique(points['id'])
  rng = np.random.default_rng(checks.seed(seed))
  drawn_BR = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=bootstrap) > 0
  present_BR = np.concatenate([np.ones((1, len(runs)), bool), drawn_BR])
  record_BN, used_BN = _records(points, present_BR, x, y)
  weight_BN = (record_BN & used_BN).astype(float)
  enough_B = weight_BN.sum(axis=1) >= len(chosen.names)
  if not enough_B[0]:
    raise UserError(
      f'{int(weight_BN[0].sum())} points of the envelope have two sizes competing, {law} needs {len(chosen.names)}; '
      'add sizes or evaluations'
    )
  held = None
  if holdout is not None:
    out_N = table.held_out(points, holdout)
    rest_N, count = np.zeros(len(points)), int((~out_N).sum())
    if count:
      record, used = _records(points[~out_N], np.ones((1, points['id'][~out_N].nunique()), bool), x, y)
      rest_N[~out_N] = (record & used)[0]
    held = (holdout, rest_N, (weight_BN[0] > 0) & out_N)
  weight_BN = weight_BN[enough_B]
  on_N = weight_BN.any(axis=0) | (held[1] > 0 if held else False)  # most measurements are on no envelope
  held = held and (held[0], held[1][on_N], held[2][on_N])
  found = fit.fit_weighted(
    points[on_N], chosen, (x,), y, weight_BN[:, on_N], objective='logls', delta=np.inf, holdout=held, by='run', rng=rng
  )
  return found.warned(*_warnings(found.table, points, sorted(set(curves['id']) - set(runs))))


def _sorted(curves: pd.DataFrame, x: str, y: str, burn_in: float) -> pd.DataFrame:
  """Finite measurements of finished runs by rising compute. Raises `UserError` when there are none."""
  checks.number('burn_in', burn_in, 'a share in [0, 1)', f'the usual choice is {BURN_IN}', least=0, below=1)
  points = table.finished_runs(curves, x, y)
  points = points[points[x] >= burn_in * points.groupby('id')[x].transform('max')]
  return points.sort_values([x, y], kind='stable').reset_index(drop=True)


def _records(points: pd.DataFrame, present_BR: np.ndarray, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
  """For each set of runs: points [B, N] that are its envelope, and points where two of its sizes compete."""
  _, run_N = np.unique(points['id'], return_inverse=True)
  compute_N, loss_N = points[x].to_numpy(float), points[y].to_numpy(float)
  seen_BN = np.where(present_BR[:, run_N], loss_N, np.inf)
  best_BN = np.minimum.accumulate(seen_BN, axis=1)
  before_BN = np.concatenate([np.full((len(seen_BN), 1), np.inf), best_BN[:, :-1]], axis=1)
  by_run = points.groupby('id', sort=True)
  first_R, last_R = by_run[x].min().to_numpy(float), by_run[x].max().to_numpy(float)
  size_R = by_run[_SIZE].first().to_numpy(float)
  spans_RN = (first_R[:, None] <= compute_N) & (compute_N <= last_R[:, None])
  competing_BN = sum(
    (present_BR[:, size_R == size].astype(float) @ spans_RN[size_R == size] > 0).astype(int)
    for size in np.unique(size_R)
  )
  return seen_BN < before_BN, competing_BN >= 2


def _warnings(used: pd.DataFrame, points: pd.DataFrame, left_out: list[str]) -> list[dict[str, Any]]:
  out = []
  shares = used['id'].value_counts(normalize=True)
  if shares.iloc[0] > 0.5:
    text = f'cell {shares.index[0]} gives {shares.iloc[0]:.0%} of the envelope, which is then its learning curve'
    out.append(table.warning('one_run_dominates', text))
  smallest, largest = points[_SIZE].min(), points[_SIZE].max()
  for name, size in (('smallest', smallest), ('largest', largest)):
    share = (used[_SIZE] == size).mean()
    if share > 0.5:
      text = f'{share:.0%} of the envelope is from the {name} n ({size:g}): the best size may lie outside the sweep'
      out.append(table.warning('edge_minimum', text))
  if left_out:
    names = ', '.join(map(str, left_out[:_NAMED])) + (' and more' if len(left_out) > _NAMED else '')
    text = f'{len(left_out)} runs are not in the envelope: not finished, or nothing measured ({names})'
    out.append(table.warning('cells_missing', text))
  return out
