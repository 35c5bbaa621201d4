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
import pandas as pd

from analysis import convergence, laws, read_ledger, sparsity, table
from analysis.fit import Fit, fit_law, warning_lines, with_holdout, write_json
from analysis.fit_result import fits_of, where_words
from analysis.fitting import resample, uncertainty
from sae_jax import checks, flops
from sae_jax.errors import UserError, one_line_errors

_FAR = 1.0  # decades beyond the data from which an extrapolation is warned of
_MOST = 10**15  # latents; guards against nonsense, not a limit of anything
SPARSE = (*sparsity.TARGETS, sparsity.MEASURED)  # what the sparsity of a prediction can be given in
_NEAR = 1.1  # factor within which one L0 is like another


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
  """The loss of a cell of one size with its 90 % interval, what it costs, and what the reader must know."""

  at: dict[str, float | str]  # n_latents, one of `SPARSE`, and the family where the ledger has several
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
    where = ', '.join(where_words({laws.SYMBOLS.get(key, key): value for key, value in self.at.items()}))
    known = np.isfinite(self.low)
    interval = f'90 % interval {self.low:.4g} to {self.high:.4g}' if known else '90 % interval unknown'
    subject = f', {self.flops_subject:.3g} for the subject' if np.isfinite(self.flops_subject) else ''
    return '\n'.join(
      [
        f'NMSE {self.nmse:.4g} at {where}   {interval}',
        f'  law {self.fit.law.name} through {len(self.fit.table)} cells; {self._where()}',
        f'  held out: {self.fit.holdout_text() or "nothing"}',
        f'  needs {self.tokens:,} tokens as the cells of the ledger: {self.flops_useful:.3g} useful FLOPs, '
        f'{self.flops_dense:.3g} dense{subject}',
      ]
    )

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
    names
      the family where the ledger has several.
    bootstrap: resamples behind the interval; 0 takes it from standard errors alone.

  Raises:
    UserError: the ledger cannot carry the law, or `at` is no size.
  """
  at = _size(at)
  resample.count(bootstrap)
  done = _family(read_ledger.load_ledger(ledger), at)
  best = table.best_learning_rate(done)
  place = {key: float(value) for key, value in at.items() if not isinstance(value, str)}
  sparse = next(key for key in place if key in SPARSE)
  if lacking := best.loc[best[sparse].isna(), 'id'].tolist():
    asked = [key for key in sparsity.TARGETS if best[key].notna().all()]
    raise UserError(f'cell {lacking[0]} has no {sparse}; predict at {" or ".join([*asked, sparsity.MEASURED])}')
  sizes = sorted(best['n_latents'].unique())
  alone = len(sparsity.targets(best)) == 1
  if alone:
    _check_near(best, sparse, place[sparse])
  law, x = ('power', ['n_latents']) if alone else ('joint_nk', ['n_latents', sparse])
  fit = with_holdout(
    lambda holdout: fit_law(best, law, x, bootstrap=bootstrap, holdout=holdout),
    f'n_latents>{sizes[-2]:g}' if len(sizes) > 1 else None,
  )
  low, high = interval(fit, place)
  costs, tokens, notes = _costs(best, place)
  beyond = {column: _beyond(best[column], place[column]) for column in ('n_latents', sparse)}
  curves = read_ledger.load_curves(ledger)
  return Prediction(
    at=at,
    nmse=float(fit.predict(place)[0]),
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


def parse_at(text: str) -> dict[str, float | str]:
  """'n_latents=8192,k=32', or with a family 'n_latents=8192,l0=30,activation=relu', as a mapping.

  Raises `UserError` for anything else.
  """
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
  return _size(at)


def _size(at: Mapping[str, Any]) -> dict[str, float | str]:
  if not isinstance(at, Mapping):
    raise UserError(f'at={checks.shown(at)} is not a size; give {{"n_latents": 8192, "k": 32}}')
  sparse = next((key for key in at if key in SPARSE), '')
  if {*at} - {'activation'} != {'n_latents', sparse}:
    names = ', '.join(str(key)[:40] for key in at) or 'nothing'
    raise UserError(
      f'a prediction is made at n_latents and k (or l0, or sparsity), not at {names}; write n_latents=8192,k=32'
    )
  size = {key: _whole(key, at[key]) for key in ('n_latents', sparse) if key in ('n_latents', 'k')}
  if sparse not in size:
    size[sparse] = checks.positive(sparse, at[sparse], 'write n_latents=8192,l0=32')
  if sparse != 'sparsity' and size[sparse] > size['n_latents']:
    raise UserError(f'{sparse}={size[sparse]} exceeds n_latents={size["n_latents"]}; lower {sparse} or raise n_latents')
  if 'activation' in at:
    return size | {'activation': checks.text('activation', at['activation'], 'name a family of the ledger')}
  return size


def _whole(key: str, value: Any) -> int:
  if isinstance(value, float) and value.is_integer():  # a column of whole numbers with gaps holds them so
    value = int(value)
  if not isinstance(value, int | np.integer) or isinstance(value, bool) or not 1 <= value <= _MOST:
    raise UserError(f'{key}={checks.shown(value)} is not a whole number of at least 1; give one, e.g. {key}=32')
  return int(value)


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
  reach = _NEAR if sparse == sparsity.MEASURED else 1.0
  if not low / reach <= value <= high * reach:
    alone = f'{low:g}' if low == high else f'{low:.3g} to {high:.3g}'
    raise UserError(
      f'{sparse}={value:g} cannot be predicted from cells of {sparse}={alone} alone; add another {sparse}'
    )


def _costs(best: pd.DataFrame, at: dict[str, float]) -> tuple[dict[str, float], int, list[dict[str, str]]]:
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
  costs = {f'flops_{key}': steps * value for key, value in spent.items()} | {'flops_subject': float(subject)}
  return costs, steps * batch, notes


def _beyond(values: pd.Series, value: float) -> float:
  low, high = float(values.min()), float(values.max())
  return math.log10(value / high) if value > high else math.log10(value / low) if value < low else 0.0


def _far(fit: Fit, beyond: dict[str, float]) -> list[dict[str, str]]:
  out = []
  for column, decades in beyond.items():
    if abs(decades) > _FAR:
      text = f'{laws.SYMBOLS.get(column, column)} is {abs(decades):.1f} decades outside the cells: the law itself may not hold there'
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
  parser.add_argument(
    '--at',
    required=True,
    metavar='SIZE',
    help='the cell, e.g. "n_latents=8192,k=32" or "n_latents=8192,l0=30,activation=relu"',
  )
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
