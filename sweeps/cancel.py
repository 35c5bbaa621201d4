"""Takes cells out of a running sweep: whoever trains one saves a checkpoint and leaves it, and nobody starts it.

python -m sweeps.cancel --ledger=DIR (ID ... | --all) [--undo]

A running worker hears of it when it refreshes its lease, within 30 s. So does a single sae_jax.train in the cell's folder.
With --undo a cell goes on from its checkpoint.
"""

from collections.abc import Callable

from sae_jax import files, schema
from sae_jax.errors import UserError, one_line_errors
from sweeps import flags, grid, ledger


def cancel(store: ledger.Ledger, ids: list[str]) -> list[ledger.EntryState]:
  """Cancels the named cells, or all unfinished ones. Raises `UserError` for an unknown id, and for a cell that is done."""
  chosen = _chosen(store, ids, lambda s: s.state in schema.UNFINISHED)
  for s in chosen:
    if s.state == 'done':
      raise UserError(f'cell {s.entry.id} is done, so there is nothing to cancel; leave it out')
  for s in chosen:
    files.replace(files.join(store.folder(s.entry.id), schema.CANCEL), b'{"cancelled": true}\n')
  return chosen


def undo(store: ledger.Ledger, ids: list[str]) -> list[ledger.EntryState]:
  """Takes up the named cells again, or all. Returns those that were cancelled. Raises `UserError` for an unknown id."""
  cancelled = [
    s for s in _chosen(store, ids, lambda _: True) if files.exists(files.join(store.folder(s.entry.id), schema.CANCEL))
  ]
  for s in cancelled:
    files.remove(files.join(store.folder(s.entry.id), schema.CANCEL))
  return cancelled


def _chosen(
  store: ledger.Ledger, ids: list[str], by_default: Callable[[ledger.EntryState], bool]
) -> list[ledger.EntryState]:
  store.check_known(ids)
  states = {s.entry.id: s for s in store.states()}
  return [states[i] for i in dict.fromkeys(ids)] if ids else [s for s in states.values() if by_default(s)]


@one_line_errors
def main(argv: list[str]) -> int:
  parser = flags.parser(
    'cancel', 'Have cells saved and left alone, by running workers (within 30 s) and by later ones.'
  )
  parser.add_argument('ids', nargs='*', metavar='ID', help='cells, as sweeps.status prints them')
  parser.add_argument('--all', action='store_true', help='every cell that is not finished')
  parser.add_argument('--undo', action='store_true', help='take them up again')
  args = parser.parse_args(argv)
  if bool(args.ids) == args.all:
    raise UserError(f'{len(args.ids)} cells named and --all={args.all}; name cells, or give --all alone')
  for s in (changed := (undo if args.undo else cancel)(args.ledger, args.ids)):
    was = f', now running ({s.reason})' if s.state == 'running' and not args.undo else ''
    print(f'{s.entry.id} {grid.label(s.entry.overrides)}: {"taken up again" if args.undo else "cancelled"}{was}')
  print(f'{len(changed)} cells {"to train again" if args.undo else "cancelled; --undo takes them up again"}')
  return 0


if __name__ == '__main__':
  main()
