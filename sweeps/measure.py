"""Measures the finished cells of a ledger: python -m sweeps.measure --ledger=DIR [--measures=downstream,...] [--dry_run]

The same command runs on every host. Each cell is measured by one of them, under a lease of its measures. What is there
already is not measured again, and a worker that was killed loses at most the unit it was at.
"""

import sys

from sae_jax import cell_state, files, lease, measure, schema, signals
from sae_jax.errors import PREEMPTED, one_line_errors
from sae_jax.measures import Scope
from sweeps import ledger


@one_line_errors
def main(argv: list[str]) -> int:
  made = measure.parser('python -m sweeps.measure', 'Measure the finished cells of a ledger; the same on every host.')
  made.add_argument('--ledger', type=ledger.Ledger, required=True, help='folder or fsspec URL of the sweep')
  made.add_argument('--cell', metavar='ID[,ID...]', default='', help='these cells only')
  made.add_argument(
    '--where', metavar='KEY=VALUE[,...]', default='', help='cells with these values only, as sae.n_latents=1024'
  )
  args = made.parse_args(argv)
  # They load jax, which --help does without.
  import jax

  from sweeps.measuring import Measuring, preview, work

  stop = signals.Signalled()
  wanted = measure.asked(args)
  only = [cell_id for cell_id in args.cell.split(',') if cell_id]
  where = dict(pair.partition('=')[::2] for pair in args.where.split(',') if pair)
  cache = files.join(args.ledger.path, schema.MEASURES, 'compile_cache')
  if not jax.config.jax_compilation_cache_dir:
    jax.config.update('jax_compilation_cache_dir', str(files.local(cache)) if files.is_local(cache) else cache)
  measuring = Measuring(args.ledger, wanted, Scope(args.windows, args.train_windows), args.weights, only, where)
  for cell_id, why in measuring.refused.items():
    print(f'{cell_id}: {cell_state.printable(why)}', file=sys.stderr)
  if args.dry_run:
    print('\n'.join(preview(measuring)))
    return 0
  try:
    if not work(measuring, stop):
      return 128 + stop.signum if stop.signum == signals.STOP[1] else PREEMPTED
  except lease.LeaseLost as error:
    print(f'lease lost: {error}', file=sys.stderr)
    return PREEMPTED
  done = len(measuring.targets) - len([of for of in measuring.targets if of.id in measuring.refused])
  print(f'{done} of {len(measuring.targets)} finished cells have {", ".join(one.NAME for one in wanted)}')
  return 1 if measuring.refused else 0


if __name__ == '__main__':
  main()
