"""What a cell costs beyond its steps: process, compiling, data, evaluation, checkpoints, each by name.

python -m bench.overhead [--store=DIR] [--cell=N,K] [--json=OUT]
Cells are those of the demo, on its store or, without one, on planted activations of its width. Each is trained twice, in a
process of its own: with an empty cache of compiled programs, and with the one that the first left.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from bench import command
from bench.alternate import ROOT, cpu_time, machine
from bench.overhead_cell import PROCESS, STEPS
from sae_jax.errors import UserError, one_line_errors

CELLS = ((256, 8), (4096, 64))
_PLANTED = ('--config.sae.d_model=576', '--config.data.source=planted', '--config.train.tokens=65_536')


def size(text: str) -> tuple[int, int]:
  """For `add_argument('--cell', type=size)`: N,K as two positive numbers."""
  parts = text.split(',')
  if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts):
    raise UserError(f'--cell={text} is not N,K; e.g. --cell=256,8')
  return int(parts[0]), int(parts[1])


def measure(cells: Sequence[tuple[int, int]], store: str | None) -> dict[str, Any]:
  """Seconds and CPU-seconds by part, of each cell with a cold and a warm cache."""
  rows = []
  for n_latents, k in cells:
    data = (f'--config.data.path={pathlib.Path(store).absolute()}',) if store else _PLANTED
    flags = (f'--config.sae.n_latents={n_latents}', f'--config.sae.k={k}', *data)
    with tempfile.TemporaryDirectory() as folder:
      made = {name: _run(pathlib.Path(folder), name, flags) for name in ('cold', 'warm')}
    rows.append({'n_latents': n_latents, 'k': k} | made)
  return {'store': bool(store), 'rows': rows, 'machine': machine()}


def lines(record: dict[str, Any]) -> str:
  """Markdown: of each cell a table with a row a part."""
  out = []
  for row in record['rows']:
    out += [f'n={row["n_latents"]}, k={row["k"]}', '', '| | cold | CPU | warm | CPU |', '|---|---|---|---|---|']
    for name in row['cold']['parts']:
      each = [value for made in ('cold', 'warm') for value in row[made]['parts'].get(name, (0.0, 0.0))]
      out.append(f'| {name} | ' + ' | '.join(f'{value:.2f}' for value in each) + ' |')
    shares = [f'{row[made]["over_steps"][i]:.0%}' for made in ('cold', 'warm') for i in range(2)]
    out += [f'| all but the steps, over the steps | {" | ".join(shares)} |', '']
  return '\n'.join(out)


def _run(folder: pathlib.Path, name: str, flags: tuple[str, ...]) -> dict[str, Any]:
  """One cell in a process of its own. Raises `UserError` when it fails."""
  cache = {'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'), 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  argv = [sys.executable, '-m', 'bench.overhead_cell', f'--began={time.time()}', '--config=experiments/demo.py']
  before = cpu_time()
  process = subprocess.Popen(
    [*argv, f'--workdir={folder / name}', *flags],
    cwd=ROOT,
    env=os.environ | cache,
    stdout=subprocess.PIPE,
    text=True,
  )
  said = process.communicate()[0].splitlines()
  if process.returncode:
    raise UserError(f'the cell ended with code {process.returncode}; its output is above')
  found = json.loads(said[-1])
  parts = found['parts'] | {'exit': [time.time() - found['ended'], 0.0]}
  totals = [sum(part[i] for part in parts.values()) for i in range(2)]
  busy, total = (b - a for a, b in zip(before, cpu_time(), strict=True))
  return {
    'parts': dict(sorted(parts.items(), key=lambda part: (part[0] != PROCESS, part[0] == STEPS, -part[1][0]))),
    'over_steps': [(total - steps) / steps for total, steps in zip(totals, parts[STEPS], strict=True)],
    'load_of_others': max(0.0, busy / os.sysconf('SC_CLK_TCK') - totals[1]) * os.sysconf('SC_CLK_TCK') / total,
  }


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('overhead', __doc__)
  parser.add_argument('--store', metavar='DIR', help='the store of make demo (default: planted activations)')
  usual = ' and '.join(f'{n_latents},{k}' for n_latents, k in CELLS)
  parser.add_argument('--cell', metavar='N,K', type=size, action='append', help=f'may repeat (default: {usual})')
  args = parser.parse_args(argv)
  record = measure(args.cell or CELLS, args.store)
  return command.report(record, lines(record), args.json)


if __name__ == '__main__':
  main()
