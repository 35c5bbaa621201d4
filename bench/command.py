"""What the commands of bench/ share: flags, and how they end."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from bench.alternate import warn
from sae_jax import files, flags


def parser(name: str, doc: str) -> argparse.ArgumentParser:
  """Of `python -m bench.<name>`, with --json."""
  made = argparse.ArgumentParser(prog=f'python -m bench.{name}', description=doc.splitlines()[0])
  made.add_argument('--json', metavar='OUT', help='write everything measured here')
  return made


def add_rounds(made: argparse.ArgumentParser) -> None:
  made.add_argument('--rounds', type=flags.whole('--rounds'), default=5, help='turns each competitor gets (default 5)')


def add_peers_python(made: argparse.ArgumentParser) -> None:
  made.add_argument(
    '--peers_python',
    default='runs/peers/bin/python',
    help='interpreter of the environment in bench/peers.md (default %(default)s)',
  )


def add_shapes(made: argparse.ArgumentParser) -> None:
  made.add_argument(
    '--shape',
    metavar='D,N,B,K',
    type=flags.shape,
    action='append',
    help='instead of the standard ones; may repeat',
  )


def shape_flag(shape: Sequence[int]) -> str:
  """For a worker; the inverse of `flags.shape`."""
  return f'--shape={",".join(map(str, shape))}'


def report(record: Any, table: str, out: str | None) -> int:
  """Prints the table, warns when others used the machine, writes the record where --json says; returns 0."""
  print(table)
  warn(load_of_others(record))
  if out:
    files.replace(out, json.dumps(record, indent=1).encode() + b'\n')
  return 0


def load_of_others(record: Any) -> float:
  """The largest load that any part of a record states; 0 where none states one."""
  if isinstance(record, dict):
    return max([record.get('load_of_others', 0.0), *(load_of_others(value) for value in record.values())])
  return max(map(load_of_others, record), default=0.0) if isinstance(record, list) else 0.0
