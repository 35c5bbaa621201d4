"""The n and the compute that a loss takes, by the law through the cells of a ledger.

The interval is of the law: half of the cells of that n would do better, half worse. It cannot hold the law being wrong far
from the data.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis import derived, laws, rests, sparsity
from analysis.fit_result import Fit, where_words
from analysis.fitting.uncertainty import LEVEL, Estimate
from sae_jax import checks
from sae_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Reach:
  """What a loss takes, at one sparsity or at each that the ledger has."""

  nmse: float
  rows: list[
    dict[str, Any]
  ]  # at, n_latents and flops_useful (estimates), beyond; or at and `reason` where it takes no n
  tokens: int  # those of the ledger's cells
  fit: Fit
  warnings: list[dict[str, str]]

  def to_json(self) -> dict[str, Any]:
    """Strict JSON: null where a number is unknown or infinite."""
    rows = [{key: _strict(value) for key, value in row.items()} for row in self.rows]
    return {'nmse': self.nmse, 'reached': rows, 'level': LEVEL, 'tokens': self.tokens, 'warnings': self.warnings}

  def summary(self) -> str:
    """Lines for a terminal, without the warnings."""
    lines = [f'NMSE {self.nmse:g} takes, by the law {self.fit.law.name} through {len(self.fit.table)} cells:']
    for row in self.rows:
      where = ', '.join(where_words({laws.SYMBOLS.get(key, key): value for key, value in row['at'].items()}))
      if 'reason' in row:
        lines.append(f'  {where}: {row["reason"]}')
        continue
      inside = 'inside the sizes' if not row['beyond'] else f'{row["beyond"]:+.2f} decades beyond the sizes'
      lines.append(f'  {where}: n = {row["n_latents"]}, {row["flops_useful"]} useful FLOPs; {inside} of the ledger')
    return '\n'.join([*lines, f'  at {self.tokens:,} tokens, as the cells of the ledger; in brackets 90 % intervals'])


def reach(ledger: str, nmse: float, at: Mapping[str, Any] | None = None, *, bootstrap: int = 500) -> Reach:
  """What a loss takes.

  Args:
    ledger: the folder a sweep wrote.
    nmse: the loss.
    at: one of `rests.SPARSE`, or every target of the ledger without it; `activation` where the ledger has several.
    bootstrap: resamples behind the interval; 0 takes it from standard errors alone.

  Raises:
    UserError: the ledger cannot carry the law, or the loss is not reached at any sparsity.
  """
  checks.number('nmse', nmse, 'in (0, 1)', 'predicting the mean has 1', above=0, below=1)
  given = dict(at or {})
  if 'n_latents' in given:
    raise UserError('n_latents is what is looked for; leave it out of at (--at), or ask for a prediction without reach')
  if {*given} - {'activation'}:
    given = rests.size(given | {'n_latents': rests.MOST})
    del given['n_latents']
  done, best, sparse, fit = rests.ground(ledger, given, bootstrap)
  family = {key: value for key, value in given.items() if key == 'activation'}
  places = [{sparse: given[sparse]}] if sparse in given else sparsity.targets(best)
  rows, refused = [], []
  for place in places:
    try:
      rows.append({'at': place | family} | _one(best, fit, nmse, place))
    except UserError as error:
      refused.append(error)
      rows.append({'at': place | family, 'reason': str(error)})
  if len(refused) == len(places):
    raise refused[-1]
  _, tokens, notes = rests.costs(best, {'n_latents': 1, **places[-1]})
  reached = [row for row in rows if 'beyond' in row]
  far = rests.far(fit, {'n_latents': max((row['beyond'] for row in reached), key=abs)})
  return Reach(nmse, rows, tokens, fit, [*rests.warnings(ledger, done, best, fit), *notes, *far])


def _one(best: pd.DataFrame, fit: Fit, nmse: float, place: dict[str, float]) -> dict[str, Any]:
  """Latents, compute and decades beyond the sizes, at one sparsity."""
  n = derived.reach(fit, nmse, {key: value for key, value in place.items() if key in fit.x})
  if n.value > rests.MOST:
    raise UserError(
      f'nmse={nmse:g} takes more than {rests.MOST:.0e} latents at {sparsity.said(place)}; allow a larger loss'
    )
  spent = [
    rests.costs(best, {'n_latents': size, **place})[0]['flops_useful'] if math.isfinite(size) else size for size in n
  ]
  beyond = rests.beyond(best['n_latents'], n.value)
  return {'n_latents': n, 'flops_useful': Estimate(*spent), 'beyond': beyond}


def _strict(value: Any) -> Any:
  if isinstance(value, Estimate):
    return {key: v if np.isfinite(v) else None for key, v in zip(('estimate', 'low', 'high'), value, strict=True)}
  return value
