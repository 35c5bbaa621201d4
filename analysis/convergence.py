"""Whether autoencoders are at convergence, and the tokens that takes: T ~ n^p.

The criterion: a run has converged at the first T from which on a doubling of its tokens improves NMSE by less than eps,
relative, and leaves its L0 as it is. While a penalty still lowers L0 the NMSE may rise, and what is learnt does not show. Runs that never show that are named and left out. They do not count as converged at their end.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis import frames, laws, sparsity, table
from analysis.fit import Fit, fit_law
from analysis.fitting import resample
from sae_jax import checks
from sae_jax.convergence import SAME_L0
from sae_jax.errors import UserError

EPS = 0.01  # least relative improvement per doubling of a run that still learns
_GRID = 2000  # points of ln T at which the improvement is looked at
_NAMED = 6  # runs named in a warning
_FACTS = ('n_latents', *sparsity.KEYS, 'learning_rate', 'seed')  # of a cell


def tokens_to_convergence(curves: pd.DataFrame, eps: float = EPS) -> pd.DataFrame:
  """One row a finished run: its sizes, `converged_tokens` (NaN when it did not) and `reason` (empty when it did).

  Between measurements ln NMSE is taken as linear in ln T. A run whose first measurement already meets the criterion
  is left out too: it converged somewhere before.

  Args:
    curves: as from `read_ledger.load_curves`, with columns id, n_latents, k, tokens, nmse. Without l0 that is not looked at.
    eps: relative improvement per doubling of tokens below which a run counts as converged.

  Raises:
    UserError: eps is not in (0, 1), or a column is missing.
  """
  checks.number('eps', eps, 'in (0, 1)', f'the usual choice is {EPS}', above=0, below=1)
  frames.frame('curves', curves, ('id', 'n_latents', 'k', 'tokens', 'nmse'))
  done = table.useful(curves[curves['state'] == 'done'] if 'state' in curves else curves)
  frames.labels(done, 'id')
  sparsity.check(done)
  for column in ('n_latents', 'tokens', 'nmse'):
    frames.measured(done, column)
  rows = []
  for name, run in done.groupby('id', sort=True):
    tokens, reason = _converged(run[np.isfinite(run['nmse']) & (run['tokens'] > 0)], eps)
    facts = {key: run[key].iloc[0] for key in _FACTS if key in run}
    rows.append({'id': name} | facts | {'converged_tokens': tokens, 'reason': reason})
  return pd.DataFrame(rows, columns=pd.Index(['id', *_FACTS, 'converged_tokens', 'reason']))


def fit_convergence(curves: pd.DataFrame, eps: float = EPS, *, bootstrap: int = 500) -> Fit:
  """The law T = c n^p through the runs that converged.

  Give it runs of one family and target, at the best learning rate.

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


def unconverged_warnings(
  curves: pd.DataFrame, ids: pd.Series, eps: float = EPS, *, named: bool = False
) -> list[dict[str, str]]:
  """One warning when runs among `ids` still improved by more than eps per doubling at their end; `named` adds which."""
  checks.truth('named', named)
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
  if named:
    names = found.loc[still, 'id'].astype(str).tolist()
    text += f' ({", ".join(names[:_NAMED])}{f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""})'
  return [table.warning('still_improving', text)]


def risen_cells(best: pd.DataFrame) -> list[str]:
  """Cells whose loss is not below that of their neighbour with less to work with, by the family's own rule.

  At convergence the loss falls with n at a fixed k, and with k at a fixed n. With a penalty it falls, at a fixed n,
  with a smaller coefficient. It need not fall with n at a fixed coefficient, where the larger autoencoder may choose to
  be sparser. Each entry names the cells and the comparison.
  """
  table.positive(best, ['n_latents', 'nmse'])
  sparsity.check(best)
  frames.labels(frames.frame('best', best, ['id']), 'id')
  keys = ['n_latents', *sparsity.keys(best)]
  means = best.groupby(keys, sort=True, dropna=False).agg(nmse=('nmse', 'mean'), ids=('id', list)).reset_index()
  penalised = means['k'].isna()
  out = []
  for rows, moving, rising in (
    (means[~penalised], 'n_latents', True),
    (means[~penalised], 'k', True),
    (means[penalised], 'sparsity', False),
  ):
    symbol = laws.SYMBOLS.get(moving, moving)
    for _, line in rows.groupby([key for key in keys if key != moving], dropna=False):
      for less, more in itertools.pairwise(line.sort_values(moving, ascending=rising).to_dict('records')):
        if more['nmse'] >= less['nmse']:
          same = sparsity.named(best, more) if moving == 'n_latents' else f'n={more["n_latents"]:g}'
          out.append(
            f'{", ".join(map(str, more["ids"]))} ({same}: {more["nmse"]:.4g} at {symbol}={more[moving]:g}, '
            f'{less["nmse"]:.4g} at {symbol}={less[moving]:g})'
          )
  return out


def risen_warnings(best: pd.DataFrame) -> list[dict[str, str]]:
  """One warning that names `risen_cells`; none when there are none."""
  risen = risen_cells(best)
  if not risen:
    return []
  how = 'n and with k' if best['k'].notna().any() else 'a smaller coefficient'
  text = (
    f'loss must fall with {how}, and does not at {"; ".join(risen)}. These are not at convergence. The joint '
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
  moved_G = _moved(run, t_G)
  learning = np.flatnonzero((-np.expm1(after_G - before_G) >= eps) | (moved_G >= SAME_L0))
  if not learning.size:
    return np.nan, 'converged before its first measurement'
  if learning[-1] == _GRID - 1 and moved_G[-1] >= SAME_L0:
    return np.nan, f'its L0 still moved by {np.expm1(moved_G[-1]):.2%} over its last doubling'
  if learning[-1] == _GRID - 1:
    return np.nan, f'still improved by {-np.expm1(after_G[-1] - before_G[-1]):.2%} over its last doubling'
  return float(np.exp(t_G[learning[-1] + 1])), ''


def _moved(run: pd.DataFrame, t_G: np.ndarray) -> np.ndarray:
  """How far ln L0 moves over the doubling of tokens from each ln T on; 0 where L0 was not measured."""
  l0 = run['l0'].to_numpy(float) if 'l0' in run else np.full(len(run), np.nan)
  if not (known := l0 > 0).any():
    return np.zeros(len(t_G))
  at, value = np.log(run['tokens'].to_numpy(float)[known]), np.log(l0[known])
  return np.abs(np.interp(t_G + np.log(2), at, value) - np.interp(t_G, at, value))


def _left_out(found: pd.DataFrame) -> list[dict[str, str]]:
  out = found[found['reason'] != '']
  if out.empty:
    return []
  named = [f'{row["id"]} ({row["reason"]})' for row in out.head(_NAMED).to_dict('records')]
  more = f' and {len(out) - _NAMED} more' if len(out) > _NAMED else ''
  text = f'{len(out)} of {len(found)} runs do not meet the criterion and are left out: {", ".join(named)}{more}'
  return [table.warning('not_converged', text)]
