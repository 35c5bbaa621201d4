"""What AuxK costs a step: a planted share of dead latents against none.

python -m bench.auxk [--json=OUT]
The dead are the dearest there can be: just too weak to fire, so that as many as possible reconstruct the residual.
"""

import argparse
import json
from typing import Any

from bench.alternate import Worker, alternate, machine, median, ratio, started, warn
from bench.side_by_side import SHAPES, parse_shape
from sae_jax import files
from sae_jax.errors import one_line_errors

SHARES = (0.0, 0.001, 0.01, 0.1, 0.5)


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
  """Step seconds by share of dead latents, as the step itself reports it, and ratios to none dead."""
  flag = f'--shape={",".join(map(str, shape))}'
  workers = {str(share): Worker('bench.step_ours', [flag, f'--dead={share}']) for share in SHARES}
  with started(workers):
    seconds, load = alternate(workers, rounds, label='auxk')
    none = seconds[str(SHARES[0])]
    return {
      'shape': list(shape),
      'planted': [
        {
          'dead_fraction': worker.facts['dead_fraction'],
          'aux_slots': worker.facts.get('aux_slots', 0),  # of k_aux, by the token that uses most
          'step_s': median(seconds[name]),
          'times_none_dead': ratio(seconds[name], none),
        }
        for name, worker in workers.items()
      ],
      'load_of_others': load,
      'seconds': seconds,
      'machine': machine(),
    }


def lines(row: dict[str, Any]) -> str:
  """Markdown: a row a share."""
  out = [
    f'AuxK at d, n, B, k = {", ".join(map(str, row["shape"]))}:',
    '',
    '| dead latents | slots used | step | times none dead |',
    '|---|---|---|---|',
  ]
  for p in row['planted']:
    r = p['times_none_dead']
    out.append(
      f'| {p["dead_fraction"]:.2%} | {p["aux_slots"]} | {1e3 * p["step_s"]:,.0f} ms | '
      f'{r["ratio"]:.2f} ({r["low"]:.2f} to {r["high"]:.2f}) |'
    )
  return '\n'.join(out)


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m bench.auxk', description=__doc__.splitlines()[0])
  parser.add_argument('--shape', metavar='D,N,B,K', help='instead of the smaller standard one')
  parser.add_argument('--rounds', type=int, default=5, help='turns each share gets (default 5)')
  parser.add_argument('--json', metavar='OUT', help='write everything measured here')
  args = parser.parse_args(argv)
  row = measure(parse_shape(args.shape) if args.shape else SHAPES[0], args.rounds)
  print(lines(row))
  warn(row['load_of_others'])
  if args.json:
    files.replace(args.json, json.dumps(row, indent=1).encode() + b'\n')
  return 0


if __name__ == '__main__':
  main()
