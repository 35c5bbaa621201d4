"""What the commands of bench/ share: flags, and how they end."""

import argparse
import json
import os
from collections.abc import Sequence
from typing import Any

from bench.alternate import warn
from sae_jax import files, flags
from sae_jax.errors import UserError


def parser(name: str, doc: str) -> argparse.ArgumentParser:
  """Of `python -m bench.<name>`, with --json."""
  made = argparse.ArgumentParser(prog=f'python -m bench.{name}', description=doc.splitlines()[0])
  made.add_argument('--json', metavar='OUT', type=_file, help='write everything measured here')
  return made


def _file(text: str) -> str:
  """Of --json; asked before anything is measured."""
  if not text or os.path.isdir(text):
    raise UserError(f'--json={text!r} is no name of a file; e.g. --json=found.json')
  return text


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
    write(out, record)
  return 0


def write(out: str, record: Any) -> None:
  """Writes a record where --json says. Raises `UserError` where that cannot be."""
  files.write_output(out, json.dumps(record, indent=1).encode() + b'\n', '--json')


def load_of_others(record: Any) -> float:
  """The largest load that any part of a record states; 0 where none states one."""
  if isinstance(record, dict):
    return max([record.get('load_of_others', 0.0), *(load_of_others(value) for value in record.values())])
  return max(map(load_of_others, record), default=0.0) if isinstance(record, list) else 0.0
