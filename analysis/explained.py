"""How well patterns of tokens explain latents: families at equal n and L0, beside what the paper found.

    python -m analysis.explained --ledger=DIR --out=DIR

Writes figures (PNG and PDF), tables.md for a page, and points.csv. A claim of Gao et al. 2024 is reproduced or not
reproduced only where a 90 % interval says so; else it is undecided.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from analysis import explained_cells, family_cells, read_ledger
from analysis.activations import Verdict, markdown
from analysis.explained_cells import ELIGIBLE, F1, OF, OVER, PRECISION, RECALL, Explained, Place
from analysis.family_tables import Table
from analysis.figures import explained as figures
from analysis.figures import style
from analysis.fitting.uncertainty import Estimate
from analysis.measure_laws import with_error
from sae_jax import files
from sae_jax.errors import one_line_errors

_SIMULATED, _BIGRAM = 'simulate/kl', 'simulate/kl_over_bigram'
_ABLATED, _OVER_CHANNEL = 'ablation/latent_once', 'ablation/latent_over_channel'
_MAIN = {
  'precision': PRECISION,
  'recall': RECALL,
  'F1': F1,
  'ablation sparsity': _ABLATED,
  'KL of simulated latents': _SIMULATED,
}
# A score is of the latents that are explained, and precision of those of them that are ever predicted.
_SHARES = {'explained': ELIGIBLE, 'never predicted': 'n2g/silent'}
_PAPER = {RECALL: 'more than 1.5', PRECISION: 'about 0.9', F1: 'above 1'}
_BASELINES = {
  'START patterns': 'n2g/start_share',
  'high recall, low precision': 'n2g/illusory',
  'balanced precision': 'n2g/precision_balanced',
  'F1': F1,
  'F1 of the last token seen': 'n2g/last_token_f1',
  'F1 of all tokens seen': 'n2g/token_max_f1',
}
_SIMULATION = {
  'KL': _SIMULATED,
  'of true latents': 'simulate/true_kl',
  'of a bigram model': 'simulate/bigram_kl',
  'less that of the bigram model': _BIGRAM,
  'ΔCE': 'simulate/delta_ce',
  'ΔCE of true latents': 'simulate/true_delta_ce',
  'ΔCE of a bigram model': 'simulate/bigram_delta_ce',
}
_ABLATION = {
  f'{what}, {where}': f'ablation/{name}_{how}'
  for how, where in (('once', 'once'), ('all', 'at all'))
  for what, name in (
    ('latent', 'latent'),
    ('channel', 'channel'),
    ('random', 'random'),
    ('latent over channel', 'latent_over_channel'),
  )
}


def verdicts(found: Explained) -> list[Verdict]:
  """One a claim of the paper."""
  return [
    Verdict(claim, where, _judged(number, *than), number, f'{what}: {number if number.known else "not known"}')
    for claim, where, what, number, *than in _claims(found)
  ]


def _claims(found: Explained) -> Iterator[tuple[str, str, str, Estimate, str, float]]:
  """Each claim and where it stands; what a number is, the number, and what it is above or below if the claim holds."""
  both = found.pairs(OF, OVER, RECALL)
  over = f'{OF} over {OVER}, {_said([place for place, _ in both])}' if both else f'no n and L0 has both {OF} and {OVER}'
  for name, column, bound in (('recall', RECALL, 1.5), ('precision', PRECISION, 0.9), ('F1', F1, 1.0)):
    than = f'more than {bound:g} times that' if bound != 1 else 'above that'
    yield f'{name} of {OF} is {than} of {OVER}', 'Figure 24', over, found.ratio(both, column), 'above', bound
  for claim, where, column, rises in (
    ('are easier to explain', 'section 4.3', F1, True),
    ('are better simulated', 'Figure 7', _SIMULATED, False),
  ):
    of = f'in {"F1" if rises else "the KL of simulated latents"} of {OF}{_of_which(found, column)}'
    n, l0 = (found.slope(column, x) for x in ('n_latents', 'l0'))
    yield f'larger autoencoders {claim}', where, f'power of n {of}', n, 'above' if rises else 'below', 0.0
    yield f'sparser autoencoders {claim}', where, f'power of L0 {of}', l0, 'below' if rises else 'above', 0.0
  for claim, where, what, column, bound in (
    (
      'simulated latents predict better than a bigram model',
      'Figure 7',
      'KL less that of the bigram model',
      _BIGRAM,
      0,
    ),
    (
      'a latent touches less than a channel, edited once',
      'section 4.5',
      'ablation sparsity over that of channels',
      f'{_OVER_CHANNEL}_once',
      1,
    ),
    (
      'a latent touches less than a channel, edited at all positions',
      'section 4.5',
      'ablation sparsity over that of channels',
      f'{_OVER_CHANNEL}_all',
      1,
    ),
  ):
    own = [place for place in found.places if place.family == OF and np.isfinite(found.value(place, column)[0])]
    yield claim, where, f'{what}, of {OF}, {_said(own)}', found.mean(own, column), 'below', bound


def _of_which(found: Explained, column: str) -> str:
  """The share of latents that a power is of: it moves with n and L0 too. Empty where it is not known."""
  mine = found.cells[found.cells['activation'] == OF]
  if ELIGIBLE not in mine or mine[ELIGIBLE].isna().all():
    return ''
  said = ' to '.join(dict.fromkeys(f'{end:.3g}' for end in (mine[ELIGIBLE].min(), mine[ELIGIBLE].max())))
  return (
    f' (of explained latents alone, {said} of all)' if column == F1 else f' ({said} of all explained, the others 0)'
  )


def _judged(number: Estimate, way: str, bound: float) -> str:
  above, below = number.low > bound, number.high < bound
  holds, fails = (above, below) if way == 'above' else (below, above)
  return 'reproduced' if holds else 'not reproduced' if fails else 'undecided'


def _said(places: Sequence[Place]) -> str:
  """What a mean is over: the sizes and L0s, and which of their combinations it lacks."""
  sizes, l0s = (sorted({getattr(place, name) for place in places}) for name in ('n', 'l0'))
  if not places:
    return 'at no n and L0'
  said = f'mean over n = {", ".join(f"{n:,.0f}" for n in sizes)} and L0 = {", ".join(f"{value:g}" for value in l0s)}'
  there = {(place.n, place.l0) for place in places}
  missing = [f'n = {n:,.0f} at L0 = {l0:g}' for n in sizes for l0 in l0s if (n, l0) not in there]
  if not missing:
    return said
  return f'{said} ({len(missing)} of {len(missing) + len(there)} combinations missing: {family_cells.listed(missing)})'


def tables(found: Explained) -> list[Table]:
  """The verdicts, the families at equal n and L0, the same over one of them, the baselines, and the warnings."""
  rows = [[one.claim, one.where, one.verdict, one.why] for one in verdicts(found)]
  errors = (
    'Standard errors of scores are over latents, or over seeds where these scatter more; of the rest over windows or '
    'places and, added in squares, over seeds.'
  )
  made = [
    Table('Claims of the paper', ['claim', 'where', 'verdict', 'numbers, 90 % intervals'], rows),
    _values(
      found,
      'Families at equal n and L0',
      _SHARES | _MAIN,
      f'Ablation sparsity of latents edited once. KL in nats a token. {errors}',
    ),
    _over(found),
    _values(found, 'Beside simpler explanations', _BASELINES, 'Balanced: as if half of all tokens were positive.'),
    _values(found, 'Simulated latents in the place of true ones', _SIMULATION, 'In nats a token.'),
    _values(
      found,
      'Ablation sparsity',
      _ABLATION,
      'About the share of predictions at 16 positions that change; a Gaussian change of all scores 0.64.',
    ),
    Table('Warnings', ['code', 'message'], [[one['code'], one['message']] for one in found.warnings]),
  ]
  return [one for one in made if one.rows]


def _values(found: Explained, title: str, columns: Mapping[str, str], note: str) -> Table:
  """A row a family, size and L0, and a column a value that some of them have."""
  places = [
    (
      place,
      {
        head: with_error(*pair)
        for head, column in columns.items()
        if np.isfinite((pair := found.value(place, column))[0])
      },
    )
    for place in found.places
  ]
  heads = [head for head in columns if any(head in shown for _, shown in places)]
  rows = [
    [place.family, f'{place.n:,.0f}', f'{place.reached:.3g}', *(shown.get(head, '') for head in heads)]
    for place, shown in places
    if shown
  ]
  return Table(title, ['family', 'n', 'L0', *heads], rows, note)


def _over(found: Explained) -> Table:
  """A row a family, size and L0, one for their mean, and at the end what the paper has."""
  rows = []
  for name in found.families:
    pairs = found.pairs(name, OVER, RECALL) if name != OVER else []
    for pair in pairs:
      rows.append([name, f'{pair[0].n:,.0f}', f'{pair[0].l0:g}', *_ratios(found, [pair])])
    if len(pairs) > 1:
      rows.append([name, 'mean', '', *_ratios(found, pairs)])
  if rows:
    rows.append([f'{OF} in the paper', '', '', *(_PAPER.get(column, '') for column in _MAIN.values())])
  note = f'Values over those of {OVER} at the same n and L0, with 90 % intervals by propagation of the errors.'
  return Table(f'Over {OVER}', ['family', 'n', 'L0', *_MAIN], rows, note)


def _ratios(found: Explained, pairs: Sequence[tuple[Place, Place]]) -> list[str]:
  """Of every value of the main table; '' where it is not known at all of these."""
  numbers = [found.ratio(pairs, column) for column in _MAIN.values()]
  return [str(number) if np.isfinite(number.value) else '' for number in numbers]


def write(found: Explained, ledger: str, out: str) -> list[str]:
  """Writes figures, tables.md and points.csv into a folder; returns their paths."""
  made = {
    f'{name}.{kind}': data
    for name, fig in figures.drawn(found, ledger).items()
    for kind, data in style.saved(fig).items()
  }
  made['tables.md'] = markdown(tables(found)).encode()
  made['points.csv'] = found.points().to_csv(index=False).encode()
  for name, data in made.items():
    files.write_output(files.join(out, name), data, '--out')
  return [files.join(out, name) for name in made]


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m analysis.explained', description=__doc__.splitlines()[0])
  parser.add_argument('--ledger', required=True, metavar='DIR', help='the folder a sweep wrote, with n2g measured')
  parser.add_argument('--out', required=True, metavar='DIR', help='where figures, tables.md and points.csv go')
  args = parser.parse_args(argv)
  found = explained_cells.find(read_ledger.load_ledger(args.ledger))
  paths = write(found, args.ledger, args.out)
  for one in verdicts(found):
    print(f'{one.claim} ({one.where}): {one.verdict}; {one.why}')
  for warning in found.warnings:
    print(f'warning: {warning["code"]}: {warning["message"]}')
  print(f'written: {", ".join(paths)}')
  return 0


if __name__ == '__main__':
  main()
