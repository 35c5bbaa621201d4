"""Flags that several commands of a sweep have."""

import argparse

from sae_jax.flags import whole
from sweeps import ledger


def add_ledger(parser: argparse.ArgumentParser) -> None:
  parser.add_argument('--ledger', required=True, help='folder or fsspec URL of the sweep')


def add_max_failures(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--max_failures',
    type=whole('--max_failures'),
    default=ledger.MAX_FAILURES,
    help='attempts of a cell (default %(default)s)',
  )


def add_group(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--group',
    type=whole('--group'),
    metavar='N',
    help='cells of one stream that a worker trains together (default: 8 with a live subject, else 1)',
  )
