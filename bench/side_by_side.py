"""Our training step against other libraries' on this machine's CPU, alternating in one run.

python -m bench.side_by_side [--peers_python=runs/peers/bin/python] [--json=OUT]
How to make the peers' environment, and what each step includes: bench/peers.md.
"""

from typing import Any

from bench import command
from bench.alternate import Worker, alternate, machine, median, ratio, started
from sae_jax.errors import UserError, one_line_errors

SHAPES = ((512, 8192, 2048, 32), (768, 32768, 2048, 32))  # d, n, B, k
PEERS = ('sparsify', 'dictionary_learning', 'saelens')
_OURS, _BARE = 'sae_jax', 'sae_jax without EMA'
_ERRORS_AGREE = 1e-4


def measure(shape: tuple[int, ...], peers: list[str], python: str, rounds: int) -> dict[str, Any]:
  """One row: seconds of every step and encoder matmul of every library, and ratios to ours.

  Raises `UserError` when a library cannot be started, or when the libraries do not reconstruct alike from the same
  weights: then they do not compute the same thing and their times must not be compared.
  """
  at = command.shape_flag(shape)
  workers = {
    _OURS: Worker('bench.step_ours', [at]),
    _BARE: Worker('bench.step_ours', [at, '--no_ema']),
  } | {name: Worker('bench.step_peer', [at, f'--library={name}'], python) for name in peers}
  with started(workers):
    errors = {name: worker.facts['error'] for name, worker in workers.items()}
    for name, error in errors.items():
      if not abs(error / errors[_OURS] - 1) < _ERRORS_AGREE:
        raise UserError(
          f'{name} reconstructs with relative error {error:.6f} and sae_jax with {errors[_OURS]:.6f} from the same '
          'weights; they do not compute the same, so correct bench/step_peer.py before timing'
        )
    label = f'n={shape[1]}'
    steps, load = alternate(workers, rounds, label=f'{label} step')
    matmuls, _ = alternate({name: workers[name] for name in (_OURS, *peers[:1])}, rounds, 'matmul', f'{label} matmul')
    return {
      'shape': list(shape),
      'step_s': {name: median(seconds) for name, seconds in steps.items()},
      'matmul_s': {name: median(seconds) for name, seconds in matmuls.items()},
      'times_ours': {name: ratio(steps[name], steps[_OURS]) for name in steps if name != _OURS},
      'times_ours_without_ema': {name: ratio(steps[name], steps[_BARE]) for name in peers},
      'reconstruction_error': errors,
      'threads': {name: worker.facts['threads'] for name, worker in workers.items()},
      'versions': {name: worker.facts['versions'] for name, worker in workers.items()},
      'load_of_others': load,
      'seconds': {'step': steps, 'matmul': matmuls},
      'machine': machine(),
    }


def table(rows: list[dict[str, Any]]) -> str:
  """Markdown: a row a library and shape; below it the matmuls alone."""
  lines = [
    '| d, n, B, k | library | step | times ours (range over rounds) | times ours without EMA |',
    '|---|---|---|---|---|',
  ]
  for row in rows:
    shape = ', '.join(map(str, row['shape']))
    for name, seconds in row['step_s'].items():
      to = [row[key].get(name) for key in ('times_ours', 'times_ours_without_ema')]
      cells = ['' if r is None else f'{r["ratio"]:.2f} ({r["low"]:.2f} to {r["high"]:.2f})' for r in to]
      lines.append(f'| {shape} | {_named(name, row)} | {1e3 * seconds:,.0f} ms | {" | ".join(cells)} |')
  for row in rows:
    each = ', '.join(f'{name} {1e3 * seconds:,.0f} ms' for name, seconds in row['matmul_s'].items())
    lines += ['', f"The encoder's matmul alone at {', '.join(map(str, row['shape']))}: {each}."]
  return '\n'.join(lines)


def _named(name: str, row: dict[str, Any]) -> str:
  return f'{name} {next(iter(row["versions"][name].values()))}' if name in PEERS else name


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('side_by_side', __doc__)
  command.add_peers_python(parser)
  parser.add_argument('--peer', choices=PEERS, action='append', help='only this one; may repeat (default all)')
  command.add_shapes(parser)
  command.add_rounds(parser)
  args = parser.parse_args(argv)
  peers = args.peer or list(PEERS)
  rows = [measure(shape, peers, args.peers_python, args.rounds) for shape in args.shape or SHAPES]
  return command.report(rows, table(rows), args.json)


if __name__ == '__main__':
  main()
