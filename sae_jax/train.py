"""Train one autoencoder: `python -m sae_jax.train --config=experiments/tiny.py --workdir=runs/tiny`.

Killed at any moment, the same command goes on from the newest checkpoint.
"""

import argparse
import logging
import os
from typing import TYPE_CHECKING, Any

from sae_jax import files, flags
from sae_jax.config import resolve
from sae_jax.errors import one_line_errors


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m sae_jax.train', description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', required=True, help='cell folder; starting again in it resumes')
  args, config_dict = flags.parse(parser, argv)
  config = resolve(config_dict)
  # They load jax, which --help and a wrong flag do without.
  from sae_jax import distributed, heap, single_run, training
  from sae_jax.member import claim_folder

  logging.getLogger('absl').setLevel(logging.CRITICAL)  # orbax logs the traceback of what it also raises
  heap.one_arena()
  distributed.initialize()
  workdir = os.path.abspath(args.workdir) if files.is_local(args.workdir) else args.workdir
  files.check_exclusive_create(workdir)
  claim_folder(config, workdir)
  return single_run.run(config, workdir, training.train)


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

  def __getattr__(name: str) -> Any:
    """`train` and `train_group` by the names that they had before the loop had a file of its own."""
    if name in ('train', 'train_group'):
      from sae_jax import training  # loads jax, which --help does without

      return getattr(training, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


if __name__ == '__main__':
  main()
