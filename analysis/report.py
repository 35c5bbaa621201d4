"""One command from a ledger to a report: table.csv, laws.json, figures, and index.html that works offline.

A law that cannot be fitted is named with its reason, and the report is written all the same.
"""

import argparse
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from analysis import convergence, page, plots, table
from analysis.compare import WITHOUT, Comparison
from analysis.fit import Fit, fit_law, warning_lines, with_holdout, write_json
from analysis.frontier import fit_frontier
from sae_jax import files
from sae_jax.errors import UserError, one_line_errors

_LEAST_SIZES = 4  # of a power law with three constants


@dataclasses.dataclass(frozen=True)
class Findings:
  """What a ledger says: its cells, the laws fitted to them, and everything a reader must be warned of."""

  cells: pd.DataFrame  # all, with state and reason
  done: pd.DataFrame  # finished cells; `best_learning_rate` marks those the laws are fitted to
  curves: pd.DataFrame
  joint: Fit | None
  power: list[Fit]  # L(n), one a k
  frontier: list[Fit]  # L(C) in useful FLOPs, one a k
  frontier_dense: list[Fit]  # the same in dense FLOPs
  comparisons: list[Comparison]  # of joint, power and frontier with the same laws without an irreducible loss
  warnings: list[dict[str, str]]

  @property
  def fits(self) -> list[Fit]:
    return [*([self.joint] if self.joint else []), *self.power, *self.frontier, *self.frontier_dense]

  def to_json(self) -> list[dict[str, Any]]:
    """The content of laws.json."""
    compared = {(c.floored.label, c.floored.x): {'comparison': c.to_json()} for c in self.comparisons}
    return [fit.to_json() | compared.get((fit.label, fit.x), {}) for fit in self.fits]

  def warning_lines(self) -> list[str]:
    """Those of the ledger, then those of the fits that say something else."""
    said = {w['code'] for w in self.warnings}
    own = [line for line in warning_lines(self.fits) if line.partition(':')[0] not in said]
    return [f'{w["code"]}: {w["message"]}' for w in self.warnings] + own


def analyse(ledger: str, bootstrap: int = 500) -> Findings:
  """Fits every law the finished cells can carry. Raises `UserError` when there is no ledger."""
  cells = table.load_cells(ledger)
  done, curves = table.load_ledger(ledger, cells), table.load_curves(ledger, cells)
  best = table.best_learning_rate(done)
  done['best_learning_rate'] = done['id'].isin(best['id'])
  warnings = list(best.attrs['warnings']) + _mixed_settings(best)
  best.attrs['warnings'] = []  # said once for the report, not again with every law
  sizes = sorted(best['n_latents'].unique())
  largest = f'n_latents>{sizes[-2]:g}' if len(sizes) > 1 else None

  def fit_n(law: str, points: pd.DataFrame, bootstrap: int = bootstrap) -> Callable[[str | None], Fit]:
    return lambda holdout: fit_law(points, law, bootstrap=bootstrap, holdout=holdout)

  def fit_c(
    x: str, points: pd.DataFrame, law: str = 'power', bootstrap: int = bootstrap
  ) -> Callable[[str | None], Fit]:
    return lambda holdout: fit_frontier(points, x, law=law, bootstrap=bootstrap, holdout=holdout)

  comparisons: list[Comparison] = []

  def compare(floored: Fit | None, plain: Callable[[str | None], Fit], holdout: str | None) -> None:
    if floored and (other := _attempt(f'{floored.label} without e', plain, holdout, warnings)):
      comparisons.append(Comparison(floored, other))

  joint = _attempt('L(n,k)', fit_n('joint_nk', best), largest, warnings)
  risen = convergence.risen_warnings(best)
  warnings += risen + convergence.unconverged_warnings(curves, best['id'])
  joint = joint and joint.warned(*risen)
  compare(joint, fit_n(WITHOUT['joint_nk'], best, 0), largest)
  power, frontier, dense = [], [], []
  for k in sorted(best['k'].unique()):
    points, measured = best[best['k'] == k], curves[curves['k'] == k]
    count = points['n_latents'].nunique()
    if count < _LEAST_SIZES:
      text = f'L(n) at k={k}: {count} sizes, a power law with a floor needs {_LEAST_SIZES}; add sizes'
      warnings.append(table.warning('not_fitted', text))
    else:
      power.append(_attempt(f'L(n) at k={k}', fit_n('power', points), largest, warnings, k))
      compare(power[-1], fit_n(WITHOUT['power'], points, 0), largest)
    for x, fits in (('flops_useful', frontier), ('flops_dense', dense)):
      # Held out in the variable one extrapolates in: the envelope of the last factor of five.
      far = f'{x}>{measured[x].max() / 5:.2g}'
      fits.append(_attempt(f'L(C) at k={k} in {x}', fit_c(x, measured), far, warnings, k))
      if x == 'flops_useful':
        compare(fits[-1], fit_c(x, measured, WITHOUT['power'], 0), far)
  power, frontier, dense = ([fit for fit in fits if fit] for fits in (power, frontier, dense))
  return Findings(cells, done, curves, joint, power, frontier, dense, comparisons, warnings)


def figures(found: Findings) -> dict[str, Figure]:
  """The figures that the fits allow, by file name without extension."""
  out: dict[str, Figure] = {}
  if found.joint:
    out |= {'joint': plots.joint(found.joint), 'residuals': plots.residuals(found.joint)}
  if found.power:
    out['power'] = plots.power(found.power)
  if found.frontier:
    out['frontier'] = plots.frontier(found.frontier, found.curves[found.curves['state'] == 'done'])
  return out


def write(found: Findings, out: str, title: str) -> str:
  """Writes the report into a folder or fsspec URL and returns the path of its page."""
  pictures = {}
  for name, figure in figures(found).items():
    for kind in ('png', 'pdf'):
      buffer = io.BytesIO()
      figure.savefig(
        buffer, format=kind, metadata={'Software': None} if kind == 'png' else {'CreationDate': None}
      )
      _replace(files.join(out, f'{name}.{kind}'), buffer.getvalue())
      if kind == 'png':
        pictures[name] = buffer.getvalue()
  _replace(files.join(out, 'table.csv'), found.done.to_csv(index=False).encode())
  write_json(files.join(out, 'laws.json'), found.to_json())
  path = files.join(out, 'index.html')
  text = page.render(
    title, found.cells, found.done, found.fits, found.comparisons, found.warning_lines(), pictures
  )
  _replace(path, text.encode())
  return path


def _attempt(
  what: str,
  fit: Callable[[str | None], Fit],
  holdout: str | None,
  warnings: list[dict[str, str]],
  k: int | None = None,
) -> Fit | None:
  """The fit with its held-out error, else without, else None and the reason among `warnings`."""
  where = {} if k is None else {'k': int(k)}
  try:
    return dataclasses.replace(with_holdout(fit, holdout), where=where)
  except UserError as error:
    warnings.append(table.warning('not_fitted', f'{what}: {error}'))
    return None


def _mixed_settings(best: pd.DataFrame) -> list[dict[str, str]]:
  columns = ('d_model', 'batch_tokens', 'source', 'subject', 'site', 'text')
  mixed = [c for c in columns if c in best and best[c].nunique(dropna=False) > 1]
  if not mixed:
    return []
  text = f'cells with different {", ".join(mixed)} are in one ledger; laws over n and k ignore that'
  return [table.warning('mixed_settings', text)]


def _replace(path: str, data: bytes) -> None:
  try:
    files.replace(path, data)
  except OSError as error:
    raise UserError(f'cannot write {path} ({error.strerror}); choose another --out') from None


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m analysis.report', description=__doc__.splitlines()[0])
  parser.add_argument(
    '--ledger', required=True, metavar='DIR', help='the folder a sweep wrote; a path or an fsspec URL'
  )
  parser.add_argument(
    '--out', required=True, metavar='DIR', help='where table.csv, laws.json, figures and index.html go'
  )
  parser.add_argument(
    '--bootstrap', type=int, default=500, metavar='N', help='resamples behind intervals (default: 500)'
  )
  args = parser.parse_args(argv)
  found = analyse(args.ledger, args.bootstrap)
  path = write(found, args.out, files.join(args.ledger).rstrip('/').rsplit('/', 1)[-1])
  shown = found.fits[
    : len(found.fits) - len(found.frontier_dense)
  ]  # the dense count is in laws.json and on the page
  for fit in shown:
    print(fit.summary())
  for pair in found.comparisons:
    print(f'irreducible loss in {pair.floored.label}: {pair.verdict}')
  for line in found.warning_lines():
    print(f'warning: {line}')
  states = found.cells['state'].value_counts().to_dict()
  print(f'{len(found.done)} of {len(found.cells)} cells done {states if len(states) > 1 else ""}'.rstrip())
  print(f'report: {path}')
  return 0


if __name__ == '__main__':
  main()
