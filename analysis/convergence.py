"""Whether autoencoders are at convergence, and the tokens that takes: T ~ n^p.

The criterion: a run has converged at the first T from which on a doubling of its tokens improves NMSE by less
than eps, relative. Runs that never show that are named and left out; they are not counted as converged at their end.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis import frames, table
from analysis.fit import Fit, fit_law
from analysis.fitting import resample
from sae_jax import checks
from sae_jax.errors import UserError

EPS = 0.01  # least relative improvement per doubling of a run that still learns
_GRID = 2000  # points of ln T at which the improvement is looked at
_NAMED = 6  # runs named in a warning


def tokens_to_convergence(curves: pd.DataFrame, eps: float = EPS) -> pd.DataFrame:
  """One row a finished run: its sizes, `converged_tokens` (NaN when it did not) and `reason` (empty when it did).

  Between measurements ln NMSE is taken as linear in ln T. A run whose first measurement already meets the criterion
  is left out too: it converged somewhere before.

  Args:
    curves: as from `read_ledger.load_curves`, with columns id, n_latents, k, tokens, nmse.
    eps: relative improvement per doubling of tokens below which a run counts as converged.

  Raises:
    UserError: eps is not in (0, 1), or a column is missing.
  """
  checks.number('eps', eps, 'in (0, 1)', f'the usual choice is {EPS}', above=0, below=1)
  frames.frame('curves', curves, ('id', 'n_latents', 'k', 'tokens', 'nmse'))
  done = table.useful(curves[curves['state'] == 'done'] if 'state' in curves else curves)
  frames.labels(done, 'id')
  for column in ('n_latents', 'k', 'tokens', 'nmse'):
    frames.measured(done, column)
  rows = []
  for name, run in done.groupby('id', sort=True):
    tokens, reason = _converged(run[np.isfinite(run['nmse']) & (run['tokens'] > 0)], eps)
    facts = {key: run[key].iloc[0] for key in ('n_latents', 'k', 'learning_rate', 'seed') if key in run}
    rows.append({'id': name} | facts | {'converged_tokens': tokens, 'reason': reason})
  columns = ['id', 'n_latents', 'k', 'learning_rate', 'seed', 'converged_tokens', 'reason']
  return pd.DataFrame(rows, columns=pd.Index(columns))


def fit_convergence(curves: pd.DataFrame, eps: float = EPS, *, bootstrap: int = 500) -> Fit:
  """The law T = c n^p through the runs that converged; give it runs of one k and of the best learning rate.

  Raises:
    UserError: fewer than two sizes converged.
  """
  resample.count(bootstrap)
  found = tokens_to_convergence(curves, eps)
  points = found[found['reason'] == ''].reset_index(drop=True)
  if points['n_latents'].nunique() < 2:
    raise UserError(
      f'{len(points)} of {len(found)} runs converged, of {points["n_latents"].nunique()} sizes; tokens to convergence '
      f'need two sizes: train longer or raise eps={eps:g}'
    )
  fit = fit_law(points, 'growth', ['n_latents'], 'converged_tokens', bootstrap=bootstrap)
  return fit.warned(*_left_out(found))


def unconverged_warnings(curves: pd.DataFrame, ids: pd.Series, eps: float = EPS) -> list[dict[str, str]]:
  """One warning when runs among `ids` still improved by more than eps per doubling at their end."""
  if isinstance(ids, str) or not isinstance(ids, pd.Series | Sequence | np.ndarray):
    raise UserError(f'ids={checks.shown(ids)} are no cells; give a column of ids or a list of them')
  found = tokens_to_convergence(frames.frame('curves', curves, ['id'])[curves['id'].isin(ids)], eps)
  still = found['reason'].str.startswith('still')
  if not still.any():
    return []
  text = (
    f'{still.sum()} of {len(found)} cells still improve by more than {100 * eps:g} % per doubling of tokens at their end: '
    'what is fitted holds at this training budget, not at convergence'
  )
  return [table.warning('still_improving', text)]


def risen_cells(best: pd.DataFrame) -> list[str]:
  """Cells whose loss is not below that of the next smaller n at their k, or the next smaller k at their n.

  Both must fall at convergence; each entry names the cells and the comparison.
  """
  table.positive(best, ['n_latents', 'k', 'nmse'])
  frames.labels(frames.frame('best', best, ['id']), 'id')
  means = best.groupby(['n_latents', 'k'], sort=True).agg(nmse=('nmse', 'mean'), ids=('id', list)).reset_index()
  out = []
  for fixed, moving, a, b in (('k', 'n_latents', 'k', 'n'), ('n_latents', 'k', 'n', 'k')):
    for value, line in means.groupby(fixed):
      rows = line.sort_values(moving).to_dict('records')
      for smaller, larger in itertools.pairwise(rows):
        if larger['nmse'] >= smaller['nmse']:
          out.append(
            f'{", ".join(map(str, larger["ids"]))} ({a}={value:g}: {larger["nmse"]:.4g} at {b}={larger[moving]:g}, '
            f'{smaller["nmse"]:.4g} at {b}={smaller[moving]:g})'
          )
  return out


def risen_warnings(best: pd.DataFrame) -> list[dict[str, str]]:
  """One warning that names `risen_cells`; none when there are none."""
  risen = risen_cells(best)
  if not risen:
    return []
  text = (
    f'loss must fall with n and with k, and does not at {"; ".join(risen)}. These are not at convergence. The joint '
    f'law is of converged autoencoders: fitted to these {len(best)} cells it interpolates at this training budget, and '
    'its constants and its extrapolation are worth little'
  )
  return [table.warning('not_at_convergence', text)]


def _converged(run: pd.DataFrame, eps: float) -> tuple[float, str]:
  run = run.sort_values('tokens').drop_duplicates('tokens')
  if len(run) < 3:
    return np.nan, f'{len(run)} measurements'
  xy_N2 = np.log(table.positive(run, ['tokens', 'nmse']))
  first, last = xy_N2[0, 0], xy_N2[-1, 0] - np.log(2)
  if last <= first:
    return np.nan, 'measured over less than a doubling of tokens'
  t_G = np.linspace(first, last, _GRID)
  before_G, after_G = (np.interp(t_G + shift, *xy_N2.T) for shift in (0.0, np.log(2)))
  learning = np.flatnonzero(-np.expm1(after_G - before_G) >= eps)
  if not learning.size:
    return np.nan, 'converged before its first measurement'
  if learning[-1] == _GRID - 1:
    return np.nan, f'still improved by {-np.expm1(after_G[-1] - before_G[-1]):.2%} over its last doubling'
  return float(np.exp(t_G[learning[-1] + 1])), ''


def _left_out(found: pd.DataFrame) -> list[dict[str, str]]:
  out = found[found['reason'] != '']
  if out.empty:
    return []
  named = [f'{row["id"]} ({row["reason"]})' for row in out.head(_NAMED).to_dict('records')]
  more = f' and {len(out) - _NAMED} more' if len(out) > _NAMED else ''
  text = f'{len(out)} of {len(found)} runs do not meet the criterion and are left out: {", ".join(named)}{more}'
  return [table.warning('not_converged', text)]
