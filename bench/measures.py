"""What measures of one autoencoder cost, against the subject's own logits: python -m bench.measures --cell=DIR [--json=OUT]

Inputs that all autoencoders share are made first and not counted. Each measure is run from nothing in a copy of the cell.
The downstream loss and the logits of the same windows take turns.
"""

import pathlib
import shutil
import statistics
import tempfile
import time
from typing import Any

import numpy as np

from bench import command
from sae_jax import schema
from sae_jax.errors import one_line_errors
from sae_jax.measures import Scope, run, some
from sae_jax.measures.downstream import Downstream


def measure(cell: str, rounds: int, scope: Scope) -> dict[str, Any]:
  """CPU-seconds and seconds by measure, and tokens per second of the downstream loss over those of logits."""
  with tempfile.TemporaryDirectory() as temporary:
    copy = pathlib.Path(temporary) / 'cell'
    shutil.copytree(cell, copy, ignore=shutil.ignore_patterns(schema.MEASURES, schema.CHECKPOINTS))
    of = run.target(str(copy))
    inputs = run.inputs_of(of, scope, run.inputs_folder(cell))
    judged, one = run.judged(of), Downstream()
    ids_WT = inputs.block('held_out', 0).windows.ids_WT

    def logits() -> None:
      np.asarray(inputs.subject.logits(ids_WT)[:, :, :1])

    seconds: dict[str, list[float]] = {'logits': [], 'downstream': []}
    for turn in range(rounds + 1):
      for name, work in (('logits', logits), ('downstream', lambda: one.run(0, judged, inputs))):
        began = time.perf_counter()
        work()
        if turn:  # the first compiles
          seconds[name].append(time.perf_counter() - began)
    # A first run makes what is shared, and compiles.
    run.run(of, some([]), inputs, None)
    costs = {}
    for name in some([]):
      shutil.rmtree(copy / schema.MEASURES)
      cpu, wall = time.process_time(), time.perf_counter()
      run.run(of, [name], inputs, None)
      units = name.units(inputs)
      spent = {'cpu_s': time.process_time() - cpu, 'wall_s': time.perf_counter() - wall}
      costs[name.NAME] = spent | {'units': units, 'cpu_s_per_unit': spent['cpu_s'] / max(1, units)}
  ratios = [a / b for a, b in zip(seconds['logits'], seconds['downstream'], strict=True)]
  return {
    'cell': of.id,
    'n_latents': of.config.sae.n_latents,
    'activation': of.config.sae.activation,
    'rate_over_logits': statistics.median(ratios),
    'tokens_per_s': {name: ids_WT.size / statistics.median(taken) for name, taken in seconds.items()},
    'measures': costs,
  }


@one_line_errors
def main(argv: list[str]) -> int:
  made = command.parser('measures', __doc__)
  made.add_argument('--cell', required=True, metavar='DIR', help='folder of a finished cell')
  command.add_rounds(made)
  args = made.parse_args(argv)
  found = measure(args.cell, args.rounds, Scope())
  rate = found['tokens_per_s']
  print(f'downstream: {rate["downstream"]:.0f} tokens/s, {found["rate_over_logits"]:.2f} times the rate of logits')
  for name, cost in found['measures'].items():
    print(f'{name}: {cost["cpu_s"]:.1f} CPU-seconds, {cost["wall_s"]:.1f} s, {cost["units"]} units')
  if args.json:
    command.write(args.json, found)
  return 0


if __name__ == '__main__':
  main()
