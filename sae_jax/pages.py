"""Writes pages of a finished cell's latents: python -m sae_jax.pages --cell=DIR --out=DIR [--latents=0-99,512] [--dry_run]

DIR/index.html lists the latents; each has a page of its own. They need no network and no server. What is shown was
measured before: the measure `latents` must be there, and `n2g` adds explanations. A run that was killed goes on, and
pages that are there already are kept. Pages of earlier runs that the list does not name are removed.
"""

import argparse
import contextlib
import re
import time

import numpy as np

from sae_jax import flags
from sae_jax.errors import UserError, one_line_errors
from sae_jax.measure import Shown
from sae_jax.measures import Scope


def chosen(text: str, n_latents: int) -> np.ndarray:
  """The latents of '0-99,512', ascending; all for ''. Raises `UserError` for what is no such list or not there."""
  if not text:
    return np.arange(n_latents)
  found: set[int] = set()
  for part in text.split(','):
    read = re.fullmatch(r'([0-9]{1,9})(?:-([0-9]{1,9}))?', part)
    if read is None:
      raise UserError(f'--latents={text[:60]} is not a list of numbers and ranges; write e.g. --latents=0-99,512')
    first, last = int(read[1]), int(read[2] or read[1])
    if not first <= last < n_latents:
      raise UserError(
        f'--latents={text[:60]}: {part} is not within the latents 0 to {n_latents - 1}; name some of these'
      )
    found.update(range(first, last + 1))
  return np.array(sorted(found))


@one_line_errors
def main(argv: list[str]) -> int:
  made = argparse.ArgumentParser(prog='python -m sae_jax.pages', description='Write pages of latents.')
  made.add_argument('--cell', required=True, metavar='DIR', help='folder of a finished cell')
  made.add_argument('--out', required=True, metavar='DIR', help='where index.html and the pages go')
  made.add_argument('--latents', default='', metavar='LIST', help='numbers and ranges, e.g. 0-99,512 (default: all)')
  made.add_argument(
    '--ablate',
    type=flags.whole('--ablate', least=0),
    default=4,
    metavar='N',
    help='contexts in which each latent is taken away, which runs the language model (%(default)s; 0: none)',
  )
  made.add_argument('--weights', choices=('raw', 'ema'), help='default: those that training found better')
  made.add_argument(
    '--windows', type=flags.whole('--windows'), default=Scope.held_out, help='as they were measured (%(default)s)'
  )
  made.add_argument(
    '--train_windows', type=flags.whole('--train_windows'), default=Scope.train, help='likewise (%(default)s)'
  )
  made.add_argument('--dry_run', action='store_true', help='say what would be written')
  args = made.parse_args(argv)
  # They load jax, which --help does without.
  from sae_jax.latent_pages import write
  from sae_jax.measures import run

  began, of = time.monotonic(), run.target(args.cell, args.weights)
  latents = chosen(args.latents, of.config.sae.n_latents)
  inputs = run.inputs_of(of, Scope(args.windows, args.train_windows), run.inputs_folder(args.cell))
  site = write.Site(of, inputs, latents, args.ablate, args.out)
  missing, left_over = len(site.missing()), len(site.left_over())
  if args.dry_run:
    tidied = f', {left_over} of earlier runs to remove' if left_over else ''
    print(f'{missing} of {len(latents)} pages to write into {args.out}{tidied}; {site.said_of_n2g}')
    return 0
  with contextlib.closing(Shown(of.id, 1)) as progress:
    size = site.write(progress)
  took, tidied = time.monotonic() - began, f'{left_over} of earlier runs removed, ' if left_over else ''
  print(f'{missing} pages written, {len(latents) - missing} kept, {tidied}{size / 1e6:.1f} MB in all, {took:.0f} s')
  print(f'pages: {args.out.rstrip("/")}/index.html')
  return 0


if __name__ == '__main__':
  main()
