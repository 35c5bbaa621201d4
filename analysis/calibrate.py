"""Predict, then check: losses of cells written down before they are trained, and how many fell inside their band.

python -m analysis.calibrate --ledger=SMALL --n_latents=2048,4096 --k=8,64 --out=predictions.json
python -m analysis.calibrate --check=predictions.json --ledger=LARGE

Cells of a penalised family are asked for by coefficients, --sparsity=0.05,0.1; --activation names the family where the
ledger has several. The file of predictions is created once and never replaced, and names the cells it was made from.
"""

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from scipy import special
from tqdm import tqdm

from analysis import laws, plots, read_ledger, sparsity
from analysis.fit import write_json
from analysis.fitting import uncertainty
from analysis.predict import predict
from sae_jax import files, schema
from sae_jax.errors import UserError, one_line_errors

_NUMBERS = ('nmse', 'low', 'high', 'tokens', 'decades_beyond')


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
  """Predictions beside what was measured.

  `cells` has one row a trained cell: n_latents, its target (k or sparsity), id, predicted, low, high, measured, rel_err
  (predicted over measured, less one), inside. `missing` lists predictions without a finished cell.
  """

  cells: pd.DataFrame
  missing: list[dict[str, float | str]]
  level: float

  @property
  def inside(self) -> int:
    return int(self.cells['inside'].sum())

  @property
  def p_so_few(self) -> float:
    """Probability of at most this many inside, were the bands right and cells independent (binomial)."""
    return float(special.bdtr(self.inside, len(self.cells), self.level))

  def to_json(self) -> dict[str, Any]:
    """Strict JSON; `cells` as a list of objects."""
    return {
      'level': self.level,
      'n_cells': len(self.cells),
      'inside': self.inside,
      'p_so_few': self.p_so_few,
      'mean_rel_err': float(self.cells['rel_err'].abs().mean()),
      'max_rel_err': float(self.cells['rel_err'].abs().max()),
      'mean_signed_rel_err': float(self.cells['rel_err'].mean()),
      'missing': self.missing,
      'cells': json.loads(self.cells.to_json(orient='records')),
    }

  def summary(self) -> str:
    """A table for a terminal and the verdict in two lines."""
    what = 'k' if 'k' in self.cells else 'sparsity'
    lines = [f'      n {what:>4s}   predicted   90 % band            measured   error']
    for row in self.cells.to_dict('records'):
      band = f'{row["low"]:.4f} to {row["high"]:.4f}'
      mark = '' if row['inside'] else '   outside'
      lines.append(
        f'{row["n_latents"]:7.0f} {row[what]:{max(4, len(what))}g}   {row["predicted"]:9.4f}   {band:18s}   {row["measured"]:8.4f}   '
        f'{row["rel_err"]:+.1%}{mark}'
      )
    error = self.cells['rel_err']
    lines.append(
      f'{self.inside} of {len(self.cells)} inside their {self.level:.0%} band '
      f'(so few or fewer with probability {self.p_so_few:.2g} were the bands right)'
    )
    lines.append(
      f'error {error.abs().mean():.1%} on average, {error.abs().max():.1%} at most, {error.mean():+.1%} signed'
    )
    if self.missing:
      sizes = ', '.join(_said(m) for m in self.missing)
      lines.append(f'predicted and not finished: {sizes}')
    return '\n'.join(lines)


def write_predictions(
  ledger: str, sizes: Sequence[Mapping[str, float | str]], out: str, *, bootstrap: int = 500
) -> dict[str, Any]:
  """Predicts a cell for every place as `predict` takes it, {'n_latents': 8192, 'k': 32}, and creates `out` with them.

  Raises:
    UserError: the ledger cannot carry the law or a band, already holds one of these sizes, or `out` exists.
  """
  seen = read_ledger.load_ledger(ledger)
  for at in sizes:
    if not sparsity.target(at):
      raise UserError(
        f'{_said(at, ", ")} is asked of no cell, which has a k or a coefficient; predict at k or sparsity'
      )
    if len(known := sparsity.at(seen, at)):
      raise UserError(f'{_said(at, ", ")} is cell {known["id"].iloc[0]} of the ledger; predict sizes it does not hold')
  if files.exists(out):
    raise UserError(f'{out} exists; predictions are never replaced: choose another --out')
  found = [predict(ledger, at, bootstrap=bootstrap) for at in tqdm(sizes, 'predicting', disable=None)]
  for p in found:
    if not math.isfinite(p.low + p.high):
      raise UserError(
        f'the band of {_said(p.at, ", ")} is unknown: {len(p.fit.table)} cells for the '
        f'{len(p.fit.law.names)} constants of {p.fit.law.name}; finish more cells'
      )
  first = found[0]
  record = {
    'schema': 1,
    'law': first.fit.law.name,
    'activation': first.fit.table['activation'].iloc[0],
    'level': uncertainty.LEVEL,
    'holdout': first.fit.to_json()['holdout'],
    'fitted_cells': sorted(first.fit.table['id']),
    'predictions': [p.at | {key: value for key, value in p.to_json().items() if key in _NUMBERS} for p in found],
    'warnings': list({(w['code'], w['message']): w for p in found for w in p.warnings}.values()),
  }
  try:
    files.create(out, json.dumps(record, indent=1, allow_nan=False).encode() + b'\n')
  except FileExistsError:
    raise UserError(f'{out} exists; predictions are never replaced: choose another --out') from None
  except OSError as error:
    raise UserError(f'cannot write {out} ({error.strerror}); choose another --out') from None
  return record


def check(predictions: str, ledger: str) -> Calibration:
  """Compares a file of predictions with the finished cells of a ledger; of several seeds of a size each counts.

  Raises:
    UserError: no file of predictions, none of its sizes is finished, a cell was among those fitted, or was trained on
      another number of tokens than predicted for.
  """
  record = _read(predictions)
  done = read_ledger.load_ledger(ledger)
  if isinstance(family := record.get('activation'), str):
    done = sparsity.at(done, {'activation': family})
  fitted = set(record['fitted_cells'])
  rows, missing = [], []
  for p in record['predictions']:
    at = {key: p[key] for key in ('n_latents', *sparsity.KEYS) if key in p}
    mine = sparsity.at(done, at)
    if mine.empty:
      missing.append(at)
    for cell in mine.to_dict('records'):
      if cell['id'] in fitted:
        raise UserError(f'cell {cell["id"]} was fitted, so it cannot check the fit; give a ledger of new cells')
      if cell['tokens'] != p['tokens']:
        raise UserError(
          f'cell {cell["id"]} saw {cell["tokens"]:.0f} tokens and was predicted for {p["tokens"]}; train it as predicted'
        )
      rows.append(
        at
        | {
          'id': cell['id'],
          'predicted': p['nmse'],
          'low': p['low'],
          'high': p['high'],
          'measured': cell['nmse'],
          'rel_err': p['nmse'] / cell['nmse'] - 1,
          'inside': bool(p['low'] <= cell['nmse'] <= p['high']),
        }
      )
  if not rows:
    raise UserError(f'no finished cell of {ledger} was predicted in {predictions}; train them first')
  return Calibration(pd.DataFrame(rows), missing, float(record['level']))


def _read(path: str) -> dict[str, Any]:
  try:
    record = schema.parse(files.read(path))
    for p in record['predictions']:
      numbers = ('n_latents', *sparsity.target(p), 'nmse', 'low', 'high', 'tokens')
      if len(numbers) < 6 or not all(math.isfinite(float(p[key])) for key in numbers):
        raise ValueError
    if not 0 < float(record['level']) < 1 or not isinstance(record['fitted_cells'], list):
      raise ValueError
  except (OSError, ValueError, KeyError, TypeError, OverflowError):
    raise UserError(f'{path} is no file of predictions; make one with --out') from None
  return record


def _said(at: Mapping[str, float | str], between: str = ' ') -> str:
  """A place in words: n=8192 k=32."""
  return between.join(f'{laws.SYMBOLS.get(key, key)}={value}' for key, value in at.items())


def _save(figure: Figure, path: str) -> None:
  try:
    figure.savefig(path)
  except (OSError, ValueError) as error:  # ValueError: an extension that is no kind of picture
    raise UserError(f'cannot write {path} ({error}); choose another --figure, e.g. calibration.png') from None


def _numbers(text: str, kind: type[int] | type[float] = int) -> list[float]:
  try:
    return [kind(part) for part in text.split(',')]
  except ValueError:
    what, example = ('whole numbers', '2048,4096') if kind is int else ('numbers', '0.05,0.1')
    raise UserError(f'{text[:80]!r} is not a list of {what}; write them with commas: {example}') from None


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m analysis.calibrate', description=__doc__.splitlines()[0])
  parser.add_argument('--ledger', required=True, metavar='DIR', help='cells to predict from, or to check with')
  parser.add_argument('--n_latents', metavar='N,N', help='sizes to predict')
  parser.add_argument('--k', metavar='K,K', help='sparsities to predict; every pair of both is')
  parser.add_argument('--sparsity', metavar='C,C', help='coefficients instead, of a penalised family')
  parser.add_argument('--activation', metavar='NAME', help='the family, where the ledger has several')
  parser.add_argument('--out', metavar='FILE', help='write the predictions there; must not exist')
  parser.add_argument('--check', metavar='FILE', help='compare these predictions with the ledger')
  parser.add_argument('--json', metavar='OUT', help='write the comparison there')
  parser.add_argument('--figure', metavar='OUT', help='draw the comparison there, e.g. calibration.png')
  args = parser.parse_args(argv)
  if args.check:
    found = check(args.check, args.ledger)
    print(found.summary())
    if args.json:
      write_json(args.json, found.to_json())
    if args.figure:
      _save(plots.calibration(found.cells), args.figure)
    return 0
  if not (args.n_latents and (args.k or args.sparsity) and args.out):
    raise UserError('give --n_latents, --k and --out to predict, or --check=FILE to compare')
  targets = (
    [{'k': k} for k in _numbers(args.k)] if args.k else [{'sparsity': c} for c in _numbers(args.sparsity, float)]
  )
  family = {'activation': args.activation} if args.activation else {}
  sizes = [{'n_latents': n} | target | family for n, target in itertools.product(_numbers(args.n_latents), targets)]
  record = write_predictions(args.ledger, sizes, args.out)
  for p in record['predictions']:
    at = {key: p[key] for key in ('n_latents', *sparsity.KEYS) if key in p}
    print(f'{_said(at)}: NMSE {p["nmse"]:.4f}, 90 % band {p["low"]:.4f} to {p["high"]:.4f}')
  for w in record['warnings']:
    print(f'warning: {w["code"]}: {w["message"]}')
  print(f'{len(sizes)} predictions from {len(record["fitted_cells"])} cells: {args.out}')
  return 0


if __name__ == '__main__':
  main()
