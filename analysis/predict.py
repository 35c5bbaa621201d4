"""What an autoencoder of a size not trained yet would reach, and what it would cost.

The prediction is of one new cell of one family, trained like the ledger's: same tokens, same data. Its 90 % interval
holds the uncertainty of the law and the scatter of cells around it. It cannot hold the law being wrong far from the
data. So the decades of extrapolation and the error on held-out cells stand beside it.
"""

import argparse
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis import derived, laws, rests
from analysis.fit import Fit, warning_lines, write_json
from analysis.fit_result import fits_of, where_words
from analysis.fitting import uncertainty
from analysis.reach import reach
from sae_jax import checks
from sae_jax.errors import UserError, one_line_errors


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """The loss of a cell of one size with its 90 % interval, what it costs, and what the reader must know."""

  at: dict[str, float | str]  # n_latents, one of `rests.SPARSE`, and the family where the ledger has several
  nmse: float
  low: float  # NaN when unknown
  high: float
  tokens: int  # those of the ledger's cells
  flops_useful: float
  flops_dense: float
  flops_subject: float  # of making the activations; NaN when the ledger does not say
  beyond: dict[str, float]  # decades above the largest (positive) or below the smallest (negative) in the ledger
  fit: Fit
  numbers: dict[str, uncertainty.Estimate]  # exponent of n, and the relative change of the loss a doubling, of the law
  warnings: list[dict[str, str]]

  def to_json(self) -> dict[str, Any]:
    """Strict JSON: null where a number is unknown."""
    numbers = {key: _known(getattr(self, key)) for key in ('nmse', 'low', 'high')}
    costs = {key: _known(getattr(self, key)) for key in ('flops_useful', 'flops_dense', 'flops_subject')}
    rest = {
      **{name: dict(zip(('estimate', 'low', 'high'), map(_known, e), strict=True)) for name, e in self.numbers.items()},
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
    where = ', '.join(where_words({laws.SYMBOLS.get(key, key): value for key, value in self.at.items()}))
    known = np.isfinite(self.low)
    interval = f'90 % interval {self.low:.4g} to {self.high:.4g}' if known else '90 % interval unknown'
    subject = f', {self.flops_subject:.3g} for the subject' if np.isfinite(self.flops_subject) else ''
    return '\n'.join(
      [
        f'NMSE {self.nmse:.4g} at {where}   {interval}',
        f'  exponent of n there {self.numbers["exponent_n"]}; {self._doublings()}',
        f'  law {self.fit.law.name} through {len(self.fit.table)} cells; {self._where()}',
        f'  held out: {self.fit.holdout_text() or "nothing"}',
        f'  needs {self.tokens:,} tokens as the cells of the ledger: {self.flops_useful:.3g} useful FLOPs, '
        f'{self.flops_dense:.3g} dense{subject}',
      ]
    )

  def _doublings(self) -> str:
    """What one more doubling of every variable does to the loss."""
    changes = {x: uncertainty.Estimate(*(100 * end for end in self.numbers[f'per_doubling_{x}'])) for x in self.fit.x}
    return ', '.join(f'a doubling of {laws.SYMBOLS.get(x, x)} changes the loss by {e} %' for x, e in changes.items())

  def _where(self) -> str:
    words = []
    for column, decades in self.beyond.items():
      symbol = laws.SYMBOLS.get(column, column)
      values = self.fit.table[column]
      if decades:
        side, edge = ('above', values.max()) if decades > 0 else ('below', values.min())
        words.append(f'extrapolates {abs(decades):.2f} decades {side} {symbol} = {edge:g}')
      else:
        words.append(f'{symbol} inside {values.min():g} to {values.max():g}')
    return ', '.join(words)


def predict(ledger: str, at: Mapping[str, float | str], *, bootstrap: int = 500) -> Prediction:
  """Predicts one cell from the cells of a ledger that have the best learning rate of their size.

  Args:
    ledger: the folder a sweep wrote.
    at: `n_latents` and its sparsity: `k` or `sparsity` as it is asked for, or `l0` as it is measured. `activation`
      names the family where the ledger has several.
    bootstrap: resamples behind the interval; 0 takes it from standard errors alone.

  Raises:
    UserError: the ledger cannot carry the law, or `at` is no size.
  """
  at = rests.size(at)
  done, best, sparse, fit = rests.ground(ledger, at, bootstrap)
  place = {key: float(value) for key, value in at.items() if not isinstance(value, str)}
  low, high = interval(fit, place)
  costs, tokens, notes = rests.costs(best, place)
  beyond = {column: rests.beyond(best[column], place[column]) for column in ('n_latents', sparse)}
  return Prediction(
    at=at,
    nmse=float(fit.predict(place)[0]),
    low=low,
    high=high,
    tokens=tokens,
    **costs,
    beyond=beyond,
    fit=fit,
    numbers={'exponent_n': derived.exponent(fit, place)}
    | {f'per_doubling_{x}': derived.doubling(fit, place, x) for x in fit.x},
    warnings=[*rests.warnings(ledger, done, best, fit), *notes, *rests.far(fit, beyond)],
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


def parse_at(text: str) -> dict[str, float | str]:
  """'n_latents=8192,k=32', or with a family 'n_latents=8192,l0=30,activation=relu', as a mapping.

  Raises `UserError` for anything else.
  """
  return rests.size(_pairs(text))


def _pairs(text: str) -> dict[str, Any]:
  at: dict[str, Any] = {}
  if not isinstance(text, str):
    raise UserError(f'--at {checks.shown(text)} is not a size; write it as n_latents=8192,k=32')
  for part in text.split(','):
    key, equals, value = (s.strip() for s in part.partition('='))
    if not equals or not key or key in at:
      raise UserError(f'--at {text[:80]!r} is not a size; write it as n_latents=8192,k=32')
    if key == 'activation':
      at[key] = value
      continue
    try:
      number = float(value)
    except ValueError:
      raise UserError(f'{key[:40]}={value[:40]!r} is not a number; write --at as n_latents=8192,k=32') from None
    at[key] = int(number) if math.isfinite(number) and number == int(number) else number
  return at


def _known(value: float) -> float | None:
  return value if math.isfinite(value) else None


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m analysis.predict', description=__doc__.splitlines()[0])
  parser.add_argument(
    '--ledger', required=True, metavar='DIR', help='the folder a sweep wrote; a path or an fsspec URL'
  )
  parser.add_argument(
    '--at',
    default='',
    metavar='SIZE',
    help='the cell, e.g. "n_latents=8192,k=32" or "n_latents=8192,l0=30,activation=relu"; with --reach its sparsity',
  )
  parser.add_argument('--activation', metavar='NAME', help='the family, where the ledger has several')
  parser.add_argument(
    '--reach', metavar='LOSS', help='find the n and the compute instead that a loss takes: --reach nmse=0.1 --at k=32'
  )
  parser.add_argument(
    '--bootstrap', type=int, default=500, metavar='N', help='resamples behind the interval (default: 500)'
  )
  parser.add_argument('--json', metavar='OUT', help='write the prediction there')
  args = parser.parse_args(argv)
  at = _pairs(args.at) if args.at or args.reach is None else {}
  if args.activation is not None:
    if at.setdefault('activation', args.activation) != args.activation:
      raise UserError(f'--activation={args.activation} is not that of --at, {at["activation"]}; name one family')
  if args.reach is None:
    found = predict(args.ledger, at, bootstrap=args.bootstrap)
  else:
    target = _pairs(args.reach)
    if {*target} != {'nmse'}:
      raise UserError(f'--reach {args.reach[:80]!r} is not a loss; write it as nmse=0.1')
    found = reach(args.ledger, target['nmse'], at, bootstrap=args.bootstrap)
  print(found.summary())
  said = dataclasses.replace(found.fit, warnings=found.warnings)
  for line in warning_lines([said]):
    print(f'  warning: {line}')
  if args.json:
    write_json(args.json, found.to_json())
  return 0


if __name__ == '__main__':
  main()
