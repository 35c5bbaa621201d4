"""What a prediction rests on: the cells of one family in a ledger, a law through them, what cells cost, and the warnings."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis import convergence, laws, read_ledger, sparsity, table
from analysis.fit import Fit, fit_law, with_holdout
from analysis.fitting import resample
from sae_jax import checks, flops
from sae_jax.errors import UserError

SPARSE = (*sparsity.TARGETS, sparsity.MEASURED)  # what the sparsity of a prediction can be given in
MOST = 10**15  # latents; guards against nonsense, not a limit of anything
_FAR = 1.0  # decades beyond the data from which an extrapolation is warned of


def ground(ledger: str, at: Mapping[str, float | str], bootstrap: int) -> tuple[pd.DataFrame, pd.DataFrame, str, Fit]:
  """What a prediction rests on: the cells of the family, the best of them, the column of their sparsity, and the law.

  Without a sparsity in `at`, it is that which was asked of all cells.
  """
  resample.count(bootstrap)
  done = _family(read_ledger.load_ledger(ledger), at)
  best = table.best_learning_rate(done)
  asked = [key for key in sparsity.TARGETS if best[key].notna().all()]
  sparse = next((key for key in at if key in SPARSE), [*asked, sparsity.MEASURED][0])
  if lacking := best.loc[best[sparse].isna(), 'id'].tolist():
    raise UserError(f'cell {lacking[0]} has no {sparse}; predict at {" or ".join([*asked, sparsity.MEASURED])}')
  sizes = sorted(best['n_latents'].unique())
  alone = len(sparsity.targets(best)) == 1
  if alone and sparse in at:
    _check_near(best, sparse, float(at[sparse]))
  law, x = ('power', ['n_latents']) if alone else ('joint_nk', ['n_latents', sparse])
  fit = with_holdout(
    lambda holdout: fit_law(best, law, x, bootstrap=bootstrap, holdout=holdout),
    f'n_latents>{sizes[-2]:g}' if len(sizes) > 1 else None,
  )
  return done, best, sparse, fit


def warnings(ledger: str, done: pd.DataFrame, best: pd.DataFrame, fit: Fit) -> list[dict[str, str]]:
  """What holds wherever one predicts."""
  moving = convergence.unconverged_warnings(read_ledger.load_curves(ledger), best['id'])
  return [*table.useless_warnings(done), *fit.warnings, *convergence.risen_warnings(best), *moving]


def costs(best: pd.DataFrame, at: dict[str, float]) -> tuple[dict[str, float], int, list[dict[str, str]]]:
  """FLOPs, tokens and warnings, at the budget of the ledger's largest cells."""
  if best['d_model'].nunique() > 1:
    widths = ', '.join(f'{d:g}' for d in sorted(best['d_model'].unique()))
    raise UserError(f'cells have d_model {widths}; predict from a ledger of one width')
  notes = []
  for column in ('tokens', 'batch_tokens'):
    if best[column].nunique() > 1:
      values = ', '.join(f'{v:g}' for v in sorted(best[column].unique())[:6])
      text = f'cells have {column} {values}; the cost is that of the largest cell, and the law ignores the difference'
      notes.append(table.warning(f'mixed_{column}', text))
  like = best.sort_values(['n_latents', 'tokens'], kind='stable').iloc[-1]
  batch = int(like['batch_tokens'])
  steps = int(like['tokens']) // batch
  # Useful FLOPs follow the active latents; of a coefficient, one knows those of the cells trained with the nearest.
  near = (best['sparsity'] / at['sparsity']).apply(np.log).abs().idxmin() if 'sparsity' in at else None
  active = best.loc[near, 'l0'] if near is not None else at.get('k', at.get('l0'))
  spent = flops.step_flops(int(at['n_latents']), active, int(like['d_model']), batch)
  subject = like['flops_subject'] if 'flops_subject' in like else math.nan
  found = {f'flops_{key}': steps * value for key, value in spent.items()} | {'flops_subject': float(subject)}
  return found, steps * batch, notes


def far(fit: Fit, decades: dict[str, float]) -> list[dict[str, str]]:
  out = []
  for column, away in decades.items():
    if abs(away) > _FAR:
      text = f'{laws.SYMBOLS.get(column, column)} is {abs(away):.1f} decades outside the cells: the law itself may not hold there'
      out.append(table.warning('far_extrapolation', text))
  sizes = np.unique(fit.table['n_latents'])
  if fit.holdout and decades['n_latents'] > 0 and len(sizes) > 1:
    seen = math.log10(sizes[-1] / sizes[-2])
    if decades['n_latents'] > seen + 1e-9:
      text = (
        f'the held-out error is over {seen:.2f} decades of n, this prediction reaches {decades["n_latents"]:.2f} '
        'beyond the data: expect a larger error'
      )
      out.append(table.warning('beyond_holdout', text))
  return out


def beyond(values: pd.Series, value: float) -> float:
  low, high = float(values.min()), float(values.max())
  return math.log10(value / high) if value > high else math.log10(value / low) if value < low else 0.0


def _family(done: pd.DataFrame, at: Mapping[str, float | str]) -> pd.DataFrame:
  """The cells of the family that `at` names, or of the only one."""
  names = sorted(done['activation'].dropna().unique())
  name = at.get('activation', names[0] if len(names) == 1 else None)
  if names and name is None:
    raise UserError(f'the ledger has cells of {", ".join(names)}; name one of them: activation={names[0]}')
  if name is not None and name not in names:
    raise UserError(f'no finished cell of activation={name}; the ledger has {", ".join(names) or "none"}')
  return done if len(names) < 2 else done[done['activation'] == name].reset_index(drop=True)


def _check_near(best: pd.DataFrame, sparse: str, value: float) -> None:
  """Raises `UserError` where cells of one target say nothing of another sparsity."""
  low, high = float(best[sparse].min()), float(best[sparse].max())
  reach = sparsity.ALIKE if sparse == sparsity.MEASURED else 1.0
  if not low / reach <= value <= high * reach:
    alone = f'{low:g}' if low == high else f'{low:.3g} to {high:.3g}'
    raise UserError(
      f'{sparse}={value:g} cannot be predicted from cells of {sparse}={alone} alone; add another {sparse}'
    )


def size(at: Mapping[str, Any]) -> dict[str, float | str]:
  """`n_latents`, one of `SPARSE` and maybe `activation`, checked. Raises `UserError`."""
  if not isinstance(at, Mapping):
    raise UserError(f'at={checks.shown(at)} is not a size; give {{"n_latents": 8192, "k": 32}}')
  sparse = next((key for key in at if key in SPARSE), '')
  if {*at} - {'activation'} != {'n_latents', sparse}:
    names = ', '.join(str(key)[:40] for key in at) or 'nothing'
    raise UserError(
      f'a prediction is made at n_latents and k (or l0, or sparsity), not at {names}; write n_latents=8192,k=32'
    )
  found = {key: _whole(key, at[key]) for key in ('n_latents', sparse) if key in ('n_latents', 'k')}
  if sparse not in found:
    found[sparse] = checks.positive(sparse, at[sparse], 'write n_latents=8192,l0=32')
  if sparse != 'sparsity' and found[sparse] > found['n_latents']:
    raise UserError(
      f'{sparse}={found[sparse]} exceeds n_latents={found["n_latents"]}; lower {sparse} or raise n_latents'
    )
  if 'activation' in at:
    return found | {'activation': checks.text('activation', at['activation'], 'name a family of the ledger')}
  return found


def _whole(key: str, value: Any) -> int:
  if isinstance(value, float) and value.is_integer():  # a column of whole numbers with gaps holds them so
    value = int(value)
  if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= MOST:
    raise UserError(f'{key}={checks.shown(value)} is not a whole number of at least 1; give one, e.g. {key}=32')
  return int(value)
