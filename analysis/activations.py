"""The comparison that starts the paper, from a table of finished cells: two figures, tables, and a verdict a claim.

    python -m analysis.activations TABLE.csv --out=DIR

A claim of Gao et al. 2024 is reproduced or not reproduced only where a 90 % interval says so; else it is undecided.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

from analysis import equal_l0, family_tables, table
from analysis.equal_l0 import Compared
from analysis.family_tables import Table
from analysis.figures import equal_l0 as figures
from analysis.figures import style
from analysis.fit_result import Fit, write_json
from analysis.fitting.uncertainty import Estimate
from sae_jax import files
from sae_jax.errors import one_line_errors

TIE = 1.03  # ratio of losses within which families match
_BEATS, _MATCHES, _STEEPER = 'beats', 'matches', 'is steeper in n than'
CLAIMS = (
  ('topk', _BEATS, 'relu', 'Figure 2a'),
  ('topk', _BEATS, 'prolu_relu', 'Figure 2a'),
  ('topk', _MATCHES, 'gated', 'Figure 2a'),
  ('topk', _STEEPER, 'relu', 'Figure 2b'),
)


class Verdict(NamedTuple):
  """What a table says of a claim."""

  claim: str
  where: str  # in the paper
  verdict: str  # 'reproduced', 'not reproduced' or 'undecided'
  number: Estimate | None  # what decides it: a ratio of losses, or a difference of exponents
  why: str


def verdicts(found: Compared) -> list[Verdict]:
  """One a claim, in the order of `CLAIMS`."""
  return [
    Verdict(f'{one} {what} {other}', where, *_judged(found, one, what, other)) for one, what, other, where in CLAIMS
  ]


def _judged(found: Compared, one: str, what: str, other: str) -> tuple[str, Estimate | None, str]:
  """Verdict, number and reason."""
  if missing := [name for name in (one, other) if name not in found.families]:
    return 'undecided', None, f'the table has no cells of {" and ".join(missing)}'
  both_NL = found.shared(one, other)
  least = 2 if what == _STEEPER else 1
  most = both_NL.sum(axis=0).max()
  if most < least:
    return 'undecided', None, f'at equal L0 they share {most} sizes, and {least} are needed'
  both_NL &= both_NL.sum(axis=0) >= least
  sizes = found.sizes[both_NL.any(axis=1)]
  used_L = both_NL.any(axis=0) if what == _STEEPER else both_NL[found.sizes == sizes[-1]][0]
  over = f'L0 {", ".join(f"{value:g}" for value in found.l0[used_L])}'
  if what == _STEEPER:
    number, (low, high) = found.steeper(one, other), (0.0, 0.0)
    text = f'exponent of {one} less that of {other}, n {sizes[0]:,.0f} to {sizes[-1]:,.0f}, mean over {over}: {number}'
  else:
    number = found.ratio(other, one, sizes[-1])
    low, high = (1.0, 1.0) if what == _BEATS else (1 / TIE, TIE)
    text = f'NMSE of {other} over that of {one} at n = {sizes[-1]:,.0f}, mean over {over}: {number}'
  if not number.known:
    return 'undecided', number, f'{text}; nothing says how far chance moves it: train some settings with a second seed'
  apart, inside = number.low > high, low <= number.low and number.high <= high
  if what == _MATCHES:
    contrary = apart or number.high < low
    said = f'; a match is within {100 * (TIE - 1):.0f} %'
    return 'reproduced' if inside else 'not reproduced' if contrary else 'undecided', number, text + said
  return 'reproduced' if apart else 'not reproduced' if number.high < low else 'undecided', number, text


def tables(found: Compared) -> list[Table]:
  """The verdicts, the tables of the report, and the constants of the laws."""
  rows = [[one.claim, one.where, one.verdict, one.why] for one in verdicts(found)]
  claims = Table('Claims of the paper', ['claim', 'where', 'verdict', 'numbers, 90 % intervals'], rows)
  return [claims, *family_tables.tables(found, found.joint), *map(_constants, (found.laws, found.joint))]


def _constants(fits: Sequence[Fit]) -> Table:
  """A row a fit, a column a constant."""
  if not fits:
    return Table('', [], [])
  rows = [
    [
      fit.where['activation'],
      *(str(Estimate(*(p[key] for key in ('estimate', 'low', 'high')))) for p in fit.params.values()),
      str(len(fit.table)),
      f'{100 * fit.diagnostics["rms_log_residual"]:.2g} %',
    ]
    for fit in fits
  ]
  at = f' at L0 = {fits[0].where["l0"]:g}' if 'l0' in fits[0].where else ''
  title = f'{fits[0].quantity}{at}: {fits[0].words(fits[0].law.formula)}'
  return Table(title, ['family', *fits[0].params, 'points', 'rms residual'], rows)


def markdown(tables: Sequence[Table]) -> str:
  """The tables as a page shows them."""
  parts = []
  for one in tables:
    lines = [one.heads, ['---'] * len(one.heads), *one.rows]
    grid = '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
    parts += [f'### {one.title}\n\n{grid}\n' + (f'\n{one.note}\n' if one.note else '')] if one.rows else []
  return '\n'.join(parts)


def write(found: Compared, out: str) -> list[str]:
  """Writes figures (PNG and PDF), tables.md, points.csv and laws.json into a folder; returns their paths."""
  made = {
    f'{name}.{kind}': data for name, fig in figures.drawn(found).items() for kind, data in style.saved(fig).items()
  }
  made['tables.md'] = markdown(tables(found)).encode()
  made['points.csv'] = found.points().to_csv(index=False).encode()
  for name, data in made.items():
    files.write_output(files.join(out, name), data, '--out')
  write_json(files.join(out, 'laws.json'), [fit.to_json() for fit in (*found.laws, *found.joint)])
  return [files.join(out, name) for name in (*made, 'laws.json')]


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m analysis.activations', description=__doc__.splitlines()[0])
  parser.add_argument('table', metavar='TABLE', help='columns activation, n_latents, k, l0, nmse; a row a cell')
  parser.add_argument('--out', required=True, metavar='DIR', help='where figures, tables.md, points.csv, laws.json go')
  args = parser.parse_args(argv)
  found = equal_l0.compare(table.read_csv(args.table))
  paths = write(found, args.out)
  for one in verdicts(found):
    print(f'{one.claim} ({one.where}): {one.verdict}; {one.why}')
  for warning in found.warnings:
    print(f'warning: {warning["code"]}: {warning["message"]}')
  print(f'{family_tables.noise(found)}\nwritten: {", ".join(paths)}')
  return 0


if __name__ == '__main__':
  main()
