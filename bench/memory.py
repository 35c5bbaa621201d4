"""Peak memory of a training step, in a fresh process, against what the algorithm has to hold.

python -m bench.memory [--peers_python=runs/peers/bin/python] [--json=OUT]     (Linux)
The yardstick: parameters, gradients, two moments and (ours) the average of the weights, plus one B x n array of
pre-activations. The peak is what the process holds at most beyond its imports and inputs; what it already holds at a
toy size (compiler, code loaded on first use) is given apart.
"""

from typing import Any

from bench import command
from bench.alternate import Worker, machine, started
from bench.side_by_side import PEERS, SHAPES
from sae_jax.errors import one_line_errors

_FLOAT = 4
_STEPS = 3
_TOY = (16, 64, 16, 2)


def needed(shape: tuple[int, ...], arrays: int) -> int:
  """Bytes of `arrays` float32 copies of all parameters and one [B, F] array."""
  d, n, batch, _ = shape
  return _FLOAT * (arrays * (2 * n * d + n + d) + batch * n)


def measure(shape: tuple[int, ...], peers: list[str], python: str) -> dict[str, Any]:
  """Peak bytes of a few steps by library, each in a process of its own, one after the other, and multiples of what is needed."""
  peak = {name: _peak(name, shape, python) for name in ('sae_jax', *peers)}
  least = {name: needed(shape, 5 if name == 'sae_jax' else 4) for name in peak}
  return {
    'shape': list(shape),
    'peak_bytes': peak,
    'needed_bytes': least,
    'toy_bytes': {name: _peak(name, _TOY, python) for name in peak},
    'times_needed': {name: peak[name] / least[name] for name in peak},
    'machine': machine(),
  }


def _peak(name: str, shape: tuple[int, ...], python: str) -> int:
  flag = command.shape_flag(shape)
  if name == 'sae_jax':
    worker = Worker('bench.step_ours', [flag])
  else:
    worker = Worker('bench.step_peer', [flag, f'--library={name}'], python)
  with started({name: worker}):
    worker.seconds('step', _STEPS)
    return worker.peak_bytes


def table(rows: list[dict[str, Any]]) -> str:
  """Markdown: a row a library and shape."""
  out = [
    '| d, n, B, k | library | peak | needed | peak / needed | at a toy size |',
    '|---|---|---|---|---|---|',
  ]
  for row in rows:
    for name, peak in row['peak_bytes'].items():
      out.append(
        f'| {", ".join(map(str, row["shape"]))} | {name} | {peak / 1e6:,.0f} MB | '
        f'{row["needed_bytes"][name] / 1e6:,.0f} MB | {row["times_needed"][name]:.2f} | {row["toy_bytes"][name] / 1e6:,.0f} MB |'
      )
  return '\n'.join(out)


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('memory', __doc__)
  command.add_peers_python(parser)
  command.add_shapes(parser)
  parser.add_argument('--no_peers', action='store_true', help='only ours')
  args = parser.parse_args(argv)
  peers = [] if args.no_peers else list(PEERS)
  rows = [measure(shape, peers, args.peers_python) for shape in args.shape or SHAPES]
  return command.report(rows, table(rows), args.json)


if __name__ == '__main__':
  main()
