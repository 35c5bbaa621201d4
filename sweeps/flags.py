"""Flags that several commands of a sweep have."""

import argparse

from sae_jax.flags import whole
from sweeps import ledger


def parser(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
  """For a command about a sweep that exists. Its --ledger is a `ledger.Ledger`."""
  made = argparse.ArgumentParser(prog=f'python -m sweeps.{command}', description=description, epilog=epilog)
  made.add_argument('--ledger', type=ledger.Ledger, required=True, help='folder or fsspec URL of the sweep')
  return made


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
