"""What AuxK costs a step: a planted share of dead latents against none.

python -m bench.auxk [--json=OUT]
The dead are the dearest there can be: just too weak to fire, so that as many as possible reconstruct the residual.
"""

from typing import Any

from bench import command
from bench.alternate import Worker, alternate, machine, median, ratio, started
from bench.side_by_side import SHAPES
from sae_jax import flags
from sae_jax.errors import one_line_errors

SHARES = (0.0, 0.001, 0.01, 0.1, 0.5)


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, Any]:
  """Step seconds by share of dead latents, as the step itself reports it, and ratios to none dead."""
  workers = {str(share): Worker('bench.step_ours', [command.shape_flag(shape), f'--dead={share}']) for share in SHARES}
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
  parser = command.parser('auxk', __doc__)
  parser.add_argument(
    '--shape',
    metavar='D,N,B,K',
    type=flags.shape,
    default=SHAPES[0],
    help='instead of the smaller standard one',
  )
  command.add_rounds(parser)
  args = parser.parse_args(argv)
  row = measure(args.shape, args.rounds)
  return command.report(row, lines(row), args.json)


if __name__ == '__main__':
  main()
