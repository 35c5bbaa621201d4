"""What an autoencoder of a size not trained yet would reach, and what it would cost.

The prediction is of one new cell trained like the ledger's: same tokens, same data. Its 90 % interval holds the
uncertainty of the law and the scatter of cells around it; it cannot hold the law being wrong far from the data, so
the decades of extrapolation and the error on held-out cells stand beside it.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from analysis import convergence, laws, read_ledger, table
from analysis.fit import Fit, fit_law, warning_lines, with_holdout, write_json
from analysis.fit_result import fits_of
from analysis.fitting import resample, uncertainty
from sae_jax import checks, flops
from sae_jax.errors import UserError, one_line_errors

_FAR = 1.0  # decades beyond the data from which an extrapolation is warned of
_MOST = 10**15  # latents; guards against nonsense, not a limit of anything


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """The loss of a cell of one size with its 90 % interval, what it costs, and what the reader must know."""

  at: dict[str, int]  # n_latents, k
  nmse: float
  low: float  # NaN when unknown
  high: float
  tokens: int  # those of the ledger's cells
  flops_useful: float
  flops_dense: float
  flops_subject: float  # of making the activations; NaN when the ledger does not say
  beyond: dict[str, float]  # decades above the largest (positive) or below the smallest (negative) in the ledger
  fit: Fit
  warnings: list[dict[str, str]]

  def to_json(self) -> dict[str, Any]:
    """Strict JSON: null where a number is unknown."""
    numbers = {key: _known(getattr(self, key)) for key in ('nmse', 'low', 'high')}
    costs = {key: _known(getattr(self, key)) for key in ('flops_useful', 'flops_dense', 'flops_subject')}
    rest = {
      'decades_beyond': self.beyond,
      'holdout': self.fit.to_json()['holdout'],
      'warnings': self.warnings,
    }
    return {
      'at': self.at,
      **numbers,
      'level': uncertainty.LEVEL,
      'tokens': self.tokens,
      **costs,
      **rest,
      'law': self.fit.law.name,
      'n_points': len(self.fit.table),
      'interval_of': 'one new cell',
    }

  def summary(self) -> str:
    """Lines for a terminal, without the warnings."""
    n, k = self.at['n_latents'], self.at['k']
    known = np.isfinite(self.low)
    interval = f'90 % interval {self.low:.4g} to {self.high:.4g}' if known else '90 % interval unknown'
    subject = f', {self.flops_subject:.3g} for the subject' if np.isfinite(self.flops_subject) else ''
    return '\n'.join(
      [
        f'NMSE {self.nmse:.4g} at n = {n}, k = {k}   {interval}',
        f'  law {self.fit.law.name} through {len(self.fit.table)} cells; {self._where()}',
        f'  held out: {self.fit.holdout_text() or "nothing"}',
        f'  needs {self.tokens:,} tokens as the cells of the ledger: {self.flops_useful:.3g} useful FLOPs, '
        f'{self.flops_dense:.3g} dense{subject}',
      ]
    )

  def _where(self) -> str:
    words = []
    for column, decades in self.beyond.items():
      symbol = laws.SYMBOLS[column]
      values = self.fit.table[column]
      if decades:
        side, edge = ('above', values.max()) if decades > 0 else ('below', values.min())
        words.append(f'extrapolates {abs(decades):.2f} decades {side} {symbol} = {edge:g}')
      else:
        words.append(f'{symbol} inside {values.min():g} to {values.max():g}')
    return ', '.join(words)


def predict(ledger: str, at: Mapping[str, int], *, bootstrap: int = 500) -> Prediction:
  """Predicts one cell from the cells of a ledger that have the best learning rate of their size.

  Args:
    ledger: the folder a sweep wrote.
    at: `n_latents` and `k`.
    bootstrap: resamples behind the interval; 0 takes it from standard errors alone.

  Raises:
    UserError: the ledger cannot carry the law, or `at` is no size.
  """
  at = _size(at)
  resample.count(bootstrap)
  done = read_ledger.load_ledger(ledger)
  best = table.best_learning_rate(done)
  sizes = sorted(best['n_latents'].unique())
  alone = best['k'].nunique() == 1
  if alone and best['k'].iloc[0] != at['k']:
    raise UserError(f'k={at["k"]} cannot be predicted from cells of k={best["k"].iloc[0]:g} alone; add another k')
  law = 'power' if alone else 'joint_nk'
  fit = with_holdout(
    lambda holdout: fit_law(best, law, bootstrap=bootstrap, holdout=holdout),
    f'n_latents>{sizes[-2]:g}' if len(sizes) > 1 else None,
  )
  low, high = interval(fit, at)
  costs, tokens, notes = _costs(best, at)
  beyond = {column: _beyond(best[column], at[column]) for column in ('n_latents', 'k')}
  curves = read_ledger.load_curves(ledger)
  return Prediction(
    at=at,
    nmse=float(fit.predict(at)[0]),
    low=low,
    high=high,
    tokens=tokens,
    **costs,
    beyond=beyond,
    fit=fit,
    warnings=[
      *table.useless_warnings(done),
      *fit.warnings,
      *notes,
      *convergence.risen_warnings(best),
      *_far(fit, beyond),
      *convergence.unconverged_warnings(curves, best['id']),
    ],
  )


def interval(fit: Fit, at: Mapping[str, float]) -> tuple[float, float]:
  """The 90 % interval of one new observation at a point, as `Fit.interval`; NaN when the points do not determine it."""
  (fit,) = fits_of(fit)
  low_1, high_1 = fit.interval(at)
  if len(low_1) != 1:
    raise UserError(
      f'at has {len(low_1)} rows of {", ".join(fit.x)} and one point has an interval here; use fit.interval for several'
    )
  return float(low_1[0]), float(high_1[0])


def parse_at(text: str) -> dict[str, int]:
  """'n_latents=8192,k=32' as a mapping. Raises `UserError` for anything else."""
  at: dict[str, Any] = {}
  if not isinstance(text, str):
    raise UserError(f'--at {checks.shown(text)} is not a size; write it as n_latents=8192,k=32')
  for part in text.split(','):
    key, equals, value = (s.strip() for s in part.partition('='))
    if not equals or not key or key in at:
      raise UserError(f'--at {text[:80]!r} is not a size; write it as n_latents=8192,k=32')
    try:
      number = float(value)
    except ValueError:
      raise UserError(f'{key[:40]}={value[:40]!r} is not a number; write --at as n_latents=8192,k=32') from None
    at[key] = int(number) if math.isfinite(number) and number == int(number) else number
  return _size(at)


def _size(at: Mapping[str, Any]) -> dict[str, int]:
  if not isinstance(at, Mapping):
    raise UserError(f'at={checks.shown(at)} is not a size; give {{"n_latents": 8192, "k": 32}}')
  if set(at) != {'n_latents', 'k'}:
    names = ', '.join(str(key)[:40] for key in at) or 'nothing'
    raise UserError(f'a prediction is made at n_latents and k, not at {names}; write n_latents=8192,k=32')
  for key, value in at.items():
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= _MOST:
      raise UserError(f'{key}={checks.shown(value)} is not a whole number of at least 1; give one, e.g. {key}=32')
  if at['k'] > at['n_latents']:
    raise UserError(f'k={at["k"]} exceeds n_latents={at["n_latents"]}; lower k or raise n_latents')
  return {key: int(at[key]) for key in ('n_latents', 'k')}


def _costs(best: pd.DataFrame, at: dict[str, int]) -> tuple[dict[str, float], int, list[dict[str, str]]]:
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
  spent = flops.step_flops(at['n_latents'], at['k'], int(like['d_model']), batch)
  subject = like['flops_subject'] if 'flops_subject' in like else math.nan
  costs = {f'flops_{key}': steps * value for key, value in spent.items()} | {'flops_subject': float(subject)}
  return costs, steps * batch, notes


def _beyond(values: pd.Series, value: int) -> float:
  low, high = float(values.min()), float(values.max())
  return math.log10(value / high) if value > high else math.log10(value / low) if value < low else 0.0


def _far(fit: Fit, beyond: dict[str, float]) -> list[dict[str, str]]:
  out = []
  for column, decades in beyond.items():
    if abs(decades) > _FAR:
      text = (
        f'{laws.SYMBOLS[column]} is {abs(decades):.1f} decades outside the cells: the law itself may not hold there'
      )
      out.append(table.warning('far_extrapolation', text))
  sizes = np.unique(fit.table['n_latents'])
  if fit.holdout and beyond['n_latents'] > 0 and len(sizes) > 1:
    seen = math.log10(sizes[-1] / sizes[-2])
    if beyond['n_latents'] > seen + 1e-9:
      text = (
        f'the held-out error is over {seen:.2f} decades of n, this prediction reaches {beyond["n_latents"]:.2f} '
        'beyond the data: expect a larger error'
      )
      out.append(table.warning('beyond_holdout', text))
  return out


def _known(value: float) -> float | None:
  return value if math.isfinite(value) else None


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m analysis.predict', description=__doc__.splitlines()[0])
  parser.add_argument(
    '--ledger', required=True, metavar='DIR', help='the folder a sweep wrote; a path or an fsspec URL'
  )
  parser.add_argument('--at', required=True, metavar='SIZE', help='the cell, e.g. "n_latents=8192,k=32"')
  parser.add_argument(
    '--bootstrap', type=int, default=500, metavar='N', help='resamples behind the interval (default: 500)'
  )
  parser.add_argument('--json', metavar='OUT', help='write the prediction there')
  args = parser.parse_args(argv)
  found = predict(args.ledger, parse_at(args.at), bootstrap=args.bootstrap)
  print(found.summary())
  said = dataclasses.replace(found.fit, warnings=found.warnings)
  for line in warning_lines([said]):
    print(f'  warning: {line}')
  if args.json:
    write_json(args.json, found.to_json())
  return 0


if __name__ == '__main__':
  main()
