"""What explaining latents costs: python -m bench.explain --cell=DIR [--json=OUT]

Of a cell whose ledger has a bank that holds its examples: a token of the bank, N2G of all latents once the bank is there,
and an ablation. What autoencoders share is not counted, what is made of this one alone is made anew.
"""

import pathlib
import shutil
import tempfile
import time
from typing import Any

from bench import command
from sae_jax import schema
from sae_jax.errors import one_line_errors
from sae_jax.measures import Scope, run
from sae_jax.measures.ablation import Ablation
from sae_jax.measures.bank import SEGMENT
from sae_jax.measures.explained import bank_of
from sae_jax.measures.n2g import N2G

_ALONE = ('tries.', 'simulated.', schema.CLAIMS)


def measure(cell: str, rounds: int) -> dict[str, Any]:
  """CPU-seconds and seconds of a token of the bank, of N2G and of an ablation."""
  with tempfile.TemporaryDirectory() as temporary:
    copy = pathlib.Path(temporary) / 'cell'
    shutil.copytree(cell, copy, ignore=shutil.ignore_patterns(schema.MEASURES, schema.CHECKPOINTS))
    shared = _shared(pathlib.Path(run.inputs_folder(cell)), pathlib.Path(temporary) / 'inputs')
    of = run.target(str(copy))
    inputs, judged = run.inputs_of(of, Scope(), str(shared)), run.judged(of)
    bank = bank_of(inputs, N2G().asked)
    examples = bank.examples(judged)
    places = examples.place_EX.reshape(-1)[:SEGMENT]
    bank.computed(places)  # the first compiles
    tokens = [_timed(lambda: bank.computed(places)) for _ in range(rounds)]
    costs = {'bank_token': {name: min(cost[name] for cost in tokens) / len(places) for name in tokens[0]}}
    for one in (N2G(), Ablation()):  # once, compiling too: a second run would find its tries in memory
      costs[one.NAME] = _timed(lambda one=one: run.run(of, [one], inputs, None))
    ablated = Ablation()
    return {
      'cell': of.id,
      'n_latents': of.config.sae.n_latents,
      'explained': len(examples.latent_E),
      'bank_tokens': bank.size,
      'edits': 4 * ablated.places * ablated.edits,  # latents and random directions, each once and at all
      'costs': costs,
    }


def _shared(made: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
  """A folder in which what autoencoders share is that of the ledger, and nothing else is there."""
  for inputs in made.iterdir():
    if inputs.name.startswith('bank-'):
      folder.mkdir(parents=True, exist_ok=True)
      (folder / inputs.name).symlink_to(inputs.resolve())
    elif inputs.name != 'compile_cache':
      (folder / inputs.name).mkdir(parents=True)
      for one in inputs.iterdir():
        if not one.name.startswith(_ALONE):
          (folder / inputs.name / one.name).symlink_to(one.resolve())
  return folder


def _timed(work: Any) -> dict[str, float]:
  cpu, wall = time.process_time(), time.perf_counter()
  work()
  return {'cpu_s': time.process_time() - cpu, 'wall_s': time.perf_counter() - wall}


@one_line_errors
def main(argv: list[str]) -> int:
  made = command.parser('explain', __doc__)
  made.add_argument('--cell', required=True, metavar='DIR', help='folder of a finished cell, explained before')
  command.add_rounds(made)
  args = made.parse_args(argv)
  found = measure(args.cell, args.rounds)
  costs, tokens = found['costs'], found['bank_tokens']
  print(
    f'bank: {costs["bank_token"]["cpu_s"]:.3f} CPU-seconds a token, {tokens} tokens in '
    f'{tokens * costs["bank_token"]["wall_s"] / 60:.1f} min'
  )
  minutes = costs['n2g']['wall_s'] / 60
  print(
    f'N2G: {found["explained"]} of {found["n_latents"]} latents in {minutes:.2f} min, '
    f'{minutes * 4096 / found["n_latents"]:.2f} min per 4,096; {costs["n2g"]["cpu_s"]:.0f} CPU-seconds'
  )
  print(f'ablation: {costs["ablation"]["cpu_s"] / found["edits"]:.3f} CPU-seconds an edit of a window')
  if args.json:
    command.write(args.json, found)
  return 0


if __name__ == '__main__':
  main()
