"""What a sweep over one language model costs when every cell runs the model for itself, and when all share one pass.

python -m bench.sweep [--json=OUT]
The grid is that of sweeps/grids/demo.py. Two things are measured, in turn: the subject's forward pass per token and
one training step of all cells; both totals are computed from them. No whole sweep is run.
"""

import argparse
import json
import pathlib
import tempfile
from typing import Any

from bench import harvest
from bench.alternate import Worker, alternate, machine, median, started, warn
from sae_jax import files
from sae_jax.errors import one_line_errors
from sweeps.grids import demo

WIDTH, BATCH = 576, 512
_WINDOWS = 8


def measure(rounds: int, cells: list[tuple[int, int]], batch: int = BATCH) -> dict[str, Any]:
  """Seconds per token of the subject and of the training of all cells (n, k), and of the sweep either way."""
  sizes = sorted({n for n, _ in cells})
  with tempfile.TemporaryDirectory() as folder:
    windows = f'--windows={harvest.windows(pathlib.Path(folder), _WINDOWS)}'
    workers = {'subject': Worker('bench.subject_ours', [windows, f'--site={harvest.SITE}'])}
    for size in sizes:
      flags = [f'--cell={n},{k}' for n, k in cells if n == size]
      workers[f'n={size}'] = Worker('bench.step_cells', [f'--width={WIDTH}', f'--batch={batch}', *flags])
    with started(workers):
      cell_workers = {name: worker for name, worker in workers.items() if name != 'subject'}
      forward, load = alternate({'subject': workers['subject']}, rounds, 'forward', 'subject')
      steps, load_of_steps = alternate(cell_workers, rounds, label='cells')
  subject = median(forward['subject']) / (_WINDOWS * (harvest.WINDOW - 1))
  training = {name: median(seconds) / batch for name, seconds in steps.items()}
  total = sum(training.values())
  apart, shared = len(cells) * subject + total, subject + total
  return {
    'cells': cells, 'width': WIDTH, 'batch': batch, 'subject_s_per_token': subject,
    'training_s_per_token': training, 'apart_s_per_token': apart, 'shared_s_per_token': shared,
    'saved': apart / shared, 'load_of_others': max(load, load_of_steps),
    'seconds': {'subject': forward, 'cells': steps}, 'machine': machine(),
  }  # fmt: skip


def lines(row: dict[str, Any]) -> str:
  """Markdown: what each part takes for a million tokens."""
  count, subject = len(row['cells']), row['subject_s_per_token']
  out = ['| for a million tokens | seconds |', '|---|---|', f'| subject, once | {1e6 * subject:,.0f} |']
  for name, seconds in row['training_s_per_token'].items():
    out.append(f'| training, the cells of {name} | {1e6 * seconds:,.0f} |')
  out += [
    f'| {count} cells, each with its own pass (computed) | {1e6 * row["apart_s_per_token"]:,.0f} |',
    f'| {count} cells on one pass (computed) | {1e6 * row["shared_s_per_token"]:,.0f} |',
    '',
    f'One pass for all is {row["saved"]:.1f} times as fast, if training costs the same either way.',
  ]
  return '\n'.join(out)


def grid() -> list[tuple[int, int]]:
  """The cells (n, k) of the demo."""
  return [(cell['sae.n_latents'], cell['sae.k']) for cell in demo.sweep()]


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m bench.sweep', description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=5, help='turns each part gets (default 5)')
  parser.add_argument('--json', metavar='OUT', help='write everything measured here')
  args = parser.parse_args(argv)
  row = measure(args.rounds, grid())
  print(lines(row))
  warn(row['load_of_others'])
  if args.json:
    files.replace(args.json, json.dumps(row, indent=1).encode() + b'\n')
  return 0


if __name__ == '__main__':
  main()
