"""Families at equal L0 in tables of words, for the report's page and for `analysis.activations`."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from analysis import derived, sparsity
from analysis.equal_l0 import Compared
from analysis.fit_result import Fit
from analysis.fitting.uncertainty import Estimate

_MOST = 12  # cells of another number of tokens


class Table(NamedTuple):
  """A table of words; what stands in a row is said in its heads and, where that is too long, in the note."""

  title: str
  heads: list[str]
  rows: list[list[str]]
  note: str = ''


def tables(found: Compared, joint: Sequence[Fit]) -> list[Table]:
  """The families at equal L0, the comparison with the reference, and the numbers that people use.

  Args:
    joint: a law over n and sparsity of every family that has one.
  """
  made = [_losses(found), _against(found), _numbers(found, joint), _longer(found)]
  return [one for one in made if one.rows]


def noise(found: Compared) -> str:
  """What the intervals rest on, in a sentence."""
  if not np.isfinite(found.scatter):
    return 'No setting was run with two seeds, and cells are too few to show their scatter: there are no intervals.'
  what = (
    'Seeds scatter' if found.repeats else 'One seed a setting: cells scatter around log-linear laws of their family'
  )
  return (
    f'{what} by {100 * found.scatter:.2g} % ({found.freedom} degrees of freedom); in brackets 90 % intervals from that.'
  )


def _losses(found: Compared) -> Table:
  """A row a family, a column a size."""
  points = sparsity.at(found.points(), {'l0': found.main})
  rows = []
  for name in found.ranked:
    mine = {row['n_latents']: row for row in sparsity.at(points, {'activation': name}).to_dict('records')}
    shown = [mine.get(int(n)) for n in found.sizes]
    rows.append([name, *(str(Estimate(r['nmse'], r['low'], r['high'])) if r else '' for r in shown)])
  note = f'Read off between the cells of a size, linearly in the logarithms of L0 and NMSE. {noise(found)}'
  return Table(f'NMSE at L0 = {found.main:g}', ['family', *(f'n = {n:,.0f}' for n in found.sizes)], rows, note)


def _against(found: Compared) -> Table:
  """A row a family: loss, exponent and size of the reference."""
  reference, rows = found.reference, []
  laws = {fit.where['activation']: fit.params['b'] for fit in found.laws}
  for name in found.ranked:
    b = laws.get(name)
    row = [name, str(Estimate(*(b[key] for key in ('estimate', 'low', 'high')))) if b else '']
    sizes = found.sizes[found.shared(name, reference).any(axis=1)]
    if name == reference or not len(sizes):
      rows.append([*row, *['', '', '', '', '']])
      continue
    n, latents = found.latents(name, reference)
    numbers = (
      found.ratio(name, reference, sizes[-1]),
      found.steeper(reference, name),
      latents,
      found.compute(n, latents),
    )
    shown = [f'beyond the sizes of {reference}' if e.value in (0, np.inf) else _known(e) for e in numbers]
    rows.append([*row, f'{sizes[-1]:,.0f}', *shown])
  heads = ['family', 'exponent of n', 'at n', f'NMSE over {reference}', f'exponent of {reference} less its own']
  note = (
    f'The exponent is of a n^-b at L0 = {found.main:g}. NMSE over that of {reference}: the mean over those of L0 '
    f'{", ".join(f"{value:g}" for value in found.l0)} that both reach at that n. Exponents are subtracted over the sizes that '
    f'both have, and the mean over the L0 that both reach at two of them or more is taken; above 0, {reference} is the steeper. Times the latents and compute: how many times more '
    f'the family takes at that n than {reference} for the same loss at L0 = {found.main:g} and equal tokens, in the FLOPs '
    'of the sparse algorithm.'
  )
  return Table(f'Against {reference}', [*heads, 'times the latents', 'times the compute'], rows, note)


def _numbers(found: Compared, joint: Sequence[Fit]) -> Table:
  """A row a family: from its law, at its largest size."""
  rows = []
  for fit in joint:
    n, sparse = float(fit.table['n_latents'].max()), fit.x[1]
    exponents = [derived.exponent(fit, {'n_latents': n, sparse: value}) for value in found.l0]
    at = {'n_latents': n, sparse: found.main}
    changes = [derived.doubling(fit, at, column) for column in fit.x]
    said = [f'{Estimate(*(100 * number for number in one))} %' for one in changes]
    rows.append([str(fit.where['activation']), f'{n:,.0f}', *map(str, exponents), *said])
  heads = ['family', 'at n', *(f'exponent of n at {value:g} active' for value in found.l0)]
  note = (
    f'From the law of each family over n and sparsity; what a doubling changes is at {found.main:g} active latents.'
  )
  heads += ['NMSE a doubling of n', 'NMSE a doubling of active latents']
  return Table('What more latents bring', heads, rows, note)


def _longer(found: Compared) -> Table:
  """A row a cell of another number of tokens."""
  usual = found.cells.groupby('n_latents')['tokens'].max() if len(found.others) else {}
  rows = []
  for row in found.others.head(_MOST).to_dict('records'):
    times = row['tokens'] / usual.get(row['n_latents'], np.nan)
    numbers = (f'{row["n_latents"]:,.0f}', f'{row["l0"]:.3g}', f'{times:.3g}', f'{row["nmse"]:.3g}')
    rows.append(
      [
        row['activation'],
        *numbers,
        *(f'{row[key]:.3g}' if np.isfinite(row[key]) else '' for key in ('over', 'over_reference')),
      ]
    )
  heads = [
    'family',
    'n',
    'L0',
    'times the tokens',
    'NMSE',
    'over its own at equal tokens',
    f'over {found.reference} there',
  ]
  more = len(found.others) - len(rows)
  return Table('Cells of another number of tokens, at equal L0', heads, rows, f'And {more} more.' if more else '')


def _known(value: Estimate) -> str:
  return '' if np.isnan(value.value) else str(value)
