"""Steps of several cells of one batch size in one process, each with a compiled step of its own.

python -m bench.step_cells --width=576 --batch=512 --cell=256,8 --cell=256,16
"""

import argparse

import jax
import jax.numpy as jnp

from bench import step_ours, worker


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m bench.step_cells', description=__doc__.splitlines()[0])
  parser.add_argument('--width', metavar='D', type=int, required=True)
  parser.add_argument('--batch', metavar='B', type=int, required=True)
  parser.add_argument('--cell', metavar='N,K', action='append', required=True, help='may repeat')
  args = parser.parse_args()
  sizes = [tuple(int(v) for v in text.split(',')) for text in args.cell]

  def prepare():
    jax.config.update('jax_platforms', 'cpu')
    jax.block_until_ready(jnp.zeros(1))
    pool_PBD, w_FD = worker.inputs(args.width, max(n for n, _ in sizes), args.batch)

    def begin():
      steps = []
      for n, k in sizes:
        work, _ = step_ours.begin((args.width, n, args.batch, k), (1, 1), True, 0.0, pool_PBD, w_FD[:n])
        steps.append(work['step'])

      # A compiled step of a whole group, once there is one, becomes a second piece of work beside this: bench/sweep.py
      # then times both in turn and takes the group's for the sweep on one pass.
      def in_turn():
        for step in steps:
          step()

      return {'step': in_turn}, {}

    return begin

  worker.serve(prepare)


if __name__ == '__main__':
  main()
