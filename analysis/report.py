"""One command from a ledger to a report: table.csv, laws.json, figures, and index.html that works offline.

A law that cannot be fitted is named with its reason, and the report is written all the same.
"""

import argparse
import datetime
import hashlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from analysis import heading, page, plots
from analysis.every_law import analyse
from analysis.figures import equal_l0, measures, style
from analysis.findings import Findings, OneFamily
from analysis.fit_result import Fit, write_json
from sae_jax import files, schema
from sae_jax.errors import UserError, one_line_errors


def figures(found: Findings) -> dict[str, Figure]:
  """The figures that the fits allow, by file name without extension; those of one target end in _k8 or _sparsity0.05.

  Those of measures begin with measure_.

  Where a ledger has several families, each has a folder of its name.
  """
  several = len(found.families) > 1
  one = found.compared
  together = equal_l0.drawn(one) if one else {}
  measured = {value.picture: measures.value(value) for one in found.measures for value in one.values}
  of_families = {
    f'{one.folder}/{name}' if several else name: figure
    for one in found.families
    for name, figure in _family_figures(found, one).items()
  }
  return together | of_families | measured


def _family_figures(found: Findings, family: OneFamily) -> dict[str, Figure]:
  notes = [w for w in [*found.about, *family.warnings] if w['code'] != 'not_fitted']
  codes = list(dict.fromkeys(w['code'] for w in notes))

  def said(fits: Sequence[Fit | None]) -> list[Fit]:
    """The fits with the ledger's own warnings, which hold for all of them."""
    return [
      fit.warned(*(n for n in notes if n['code'] not in {w['code'] for w in fit.warnings})) for fit in fits if fit
    ]

  def each(name: str) -> list[Fit]:
    return said([getattr(one, name) for one in family.targets])

  out: dict[str, Figure] = {}
  for joint in said([family.joint]):
    out |= {'joint': plots.joint(joint), 'residuals': plots.residuals(joint)}
  if fits := each('power'):
    out['power'] = plots.power(fits)
  if fits := each('frontier'):
    out['frontier'] = plots.frontier(fits, found.curves[found.curves['state'] == 'done'])
  if fits := each('converged'):
    out['converged'] = plots.growth(fits)
  for one in family.targets:
    if one.profiles:
      out[f'isoflop_{one.name}'] = plots.isoflop(*one.profiles, one.where, codes)
  if fits := each('best_size'):
    rows = [one.profiles[1] for one in family.targets if one.best_size and one.profiles]
    refused = np.unique(np.concatenate([row.loc[row['verdict'] != 'minimum', 'budget'] for row in rows]))
    out['best_size'] = plots.growth(fits, refused.tolist())
  for one in family.targets:
    if one.rates is not None:
      law = said([one.learning_rate])
      out[f'learning_rates_{one.name}'] = plots.learning_rates(one.rates, law[0] if law else None, codes, one.where)
    if one.split:
      out[f'allocation_{one.name}'] = plots.allocation(said([one.tokens])[0], family.cost)
    if one.subjects:
      out[f'family_{one.name}'] = plots.family(one.subjects, codes)
  return out


def write(found: Findings, out: str, title: str, facts: str = '') -> str:
  """Writes the report into a folder or fsspec URL and returns the path of its page; title and facts as of `heading`."""
  pictures, digests = {}, {}
  for name, figure in figures(found).items():
    for kind, data in style.saved(figure).items():
      files.write_output(files.join(out, f'{name}.{kind}'), data, '--out')
      digests[f'{name}.{kind}'] = hashlib.sha256(data).hexdigest()
      if kind == 'png':
        pictures[name] = data
  done = found.done
  if done['sparsity'].isna().all():  # nothing was asked for by a coefficient
    done = done.drop(columns=['sparsity', 'target'])
  files.write_output(files.join(out, 'table.csv'), done.to_csv(index=False).encode(), '--out')
  write_json(files.join(out, 'laws.json'), found.to_json())
  path = files.join(out, 'index.html')
  _remove_stale(out, path, set(digests))
  files.write_output(path, page.render(title, found, pictures, digests, facts).encode(), '--out')
  return path


def _remove_stale(out: str, path: str, drawn: set[str]) -> None:
  """Deletes figures of the report that was here which are drawn no more, while they are what that report wrote."""
  try:
    before = page.figure_digests(files.read(path, schema.LARGE).decode())
    for name in sorted(set(before) - drawn):
      file = files.join(out, name)
      if files.exists(file) and hashlib.sha256(files.read(file, schema.LARGE)).hexdigest() == before[name]:
        files.remove(file)
  except (FileNotFoundError, UnicodeDecodeError, schema.Broken):
    return
  except OSError as error:
    raise UserError(f'cannot tidy {out} ({error.strerror}); choose another --out') from None


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
  parser.add_argument(
    '--subject',
    metavar='NAME',
    help='fit the laws over n, k and C to its cells (default: the one with most cells)',
  )
  args = parser.parse_args(argv)
  found = analyse(args.ledger, args.bootstrap, args.subject)
  path = write(found, args.out, *heading.heading(args.ledger, found.done, datetime.date.today()))
  for fit in found.fits:
    if 'flops_dense' not in fit.x:  # those are in laws.json and on the page
      print(fit.summary())
  for pair in found.comparisons:
    print(f'irreducible loss in {pair.floored.label}: {pair.verdict}')
  for line in found.warning_lines():
    print(f'warning: {line}')
  if found.not_attempted:
    print(f'not attempted: {"; ".join(found.not_attempted)}')
  states = found.cells['state'].value_counts().to_dict()
  print(f'{len(found.done)} of {len(found.cells)} cells done {states if len(states) > 1 else ""}'.rstrip())
  print(f'report: {path}')
  return 0


if __name__ == '__main__':
  main()
