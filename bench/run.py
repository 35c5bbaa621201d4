"""Steps, memory, AuxK, scaling, harvest and the live sweep in one go.

Writes bench/results/<date>.json and docs/bench.png, and prints the tables.

python -m bench.run [--peers_python=runs/peers/bin/python] [--only=side_by_side]
Leave the machine alone meanwhile: about half an hour on two cores.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from bench import auxk, command, figure, harvest, memory, scaling, side_by_side, sweep
from bench.alternate import ROOT, machine, warn
from sae_jax import files, metrics
from sae_jax.errors import one_line_errors


def parts(python: str, rounds: int) -> dict[str, tuple[Callable[[], Any], Callable[[Any], str]]]:
  """By name: how to measure it and how to say it in Markdown."""
  peers = list(side_by_side.PEERS)
  return {
    'side_by_side': (
      lambda: [side_by_side.measure(shape, peers, python, rounds) for shape in side_by_side.SHAPES],
      side_by_side.table,
    ),
    'memory': (lambda: [memory.measure(side_by_side.SHAPES[1], peers, python)], memory.table),
    'auxk': (lambda: auxk.measure(side_by_side.SHAPES[0], rounds), auxk.lines),
    'scaling': (lambda: scaling.measure([*scaling.SIZES, 'mesh'], max(1, rounds - 2)), scaling.lines),
    'harvest': (
      lambda: [harvest.measure(python, harvest.CALLS, rounds, subject) for subject in harvest.SITES],
      lambda rows: '\n\n'.join(map(harvest.lines, rows)),
    ),
    'sweep': (sweep.measure, sweep.lines),
  }


@one_line_errors
def main(argv: list[str]) -> int:
  names = list(parts('', 1))
  parser = argparse.ArgumentParser(prog='python -m bench.run', description=__doc__.splitlines()[0])
  command.add_peers_python(parser)
  parser.add_argument('--only', choices=names, action='append', help='may repeat; the others keep what the file holds')
  command.add_rounds(parser)
  parser.add_argument('--out', metavar='DIR', default='bench/results', help='default bench/results')
  args = parser.parse_args(argv)
  where = machine()
  path = files.join(args.out, f'{where["date"]}.json')
  record = json.loads(files.read(path)) if args.only and files.exists(path) else {}
  chosen = parts(args.peers_python, args.rounds)
  for name in args.only or names:
    began = time.monotonic()
    measure, say = chosen[name]
    result = measure()
    record[name] = {
      'result': result,
      'machine': where,
      'git_commit': metrics.git_commit(),
      'load_average': os.getloadavg(),
      'wall_s': time.monotonic() - began,
    }
    files.replace(path, json.dumps(record, indent=1).encode() + b'\n')  # after each: an interrupt loses one part
    print(f'\n{say(result)}', flush=True)
    print(f'({name}: {time.monotonic() - began:.0f} s)', file=sys.stderr, flush=True)
  if 'side_by_side' in record:
    picture = ROOT / 'docs' / 'bench.png'
    figure.side_by_side(record['side_by_side']['result']).savefig(picture, dpi=160)
  warn(command.load_of_others([record[name] for name in args.only or names]))
  print(f'\n{path}', file=sys.stderr)
  return 0


if __name__ == '__main__':
  main()
