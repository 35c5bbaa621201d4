"""Gives cells that failed, or whose files cannot be believed, a fresh set of attempts.

python -m sweeps.retry --ledger=DIR [ID ...]

failure.json of a failed cell is deleted. A broken file of an invalid cell is moved to its corrupt/, an autoencoder together
with its result. The cell then waits to be trained again, from its last checkpoint on. The autoencoders of named cells are
read to the last byte, so that a changed one is found, too.
"""

import dataclasses

from sae_jax import cell_state, files, product, schema
from sae_jax.errors import UserError, one_line_errors
from sweeps import flags, grid, ledger


@dataclasses.dataclass(frozen=True)
class Retried:
  """A cell that is tried again.

  Attributes:
    entry: which.
    reason: why it had come to an end.
    moved: what was set aside: its name, and its new one from the cell's folder on.
  """

  entry: ledger.Entry
  reason: str
  moved: tuple[tuple[str, str], ...] = ()


def retry(store: ledger.Ledger, ids: list[str], max_failures: int = ledger.MAX_FAILURES) -> list[Retried]:
  """Clears the failures and the broken files of the named cells, or of all that failed for good or are invalid.

  Raises `UserError` for an unknown id, and for a named cell that has nothing to clear or is running.
  """
  store.check_known(ids)
  states = {s.entry.id: s for s in store.states(max_failures)}
  damaged: dict[str, str] = {}
  for cell_id in ids:
    state = states[cell_id]
    finished = state.state in schema.FINISHED
    if finished and (why := _damaged_artifact(store.folder(cell_id))):
      damaged[cell_id] = why
    elif state.state != schema.INVALID and (finished or state.state == schema.RUNNING or not state.attempts):
      raise UserError(f'cell {cell_id} is {state.state}, with no failure to clear; leave it out')
  chosen = (
    [states[cell_id] for cell_id in ids]
    if ids
    else [s for s in states.values() if s.state in (schema.FAILED, schema.INVALID)]
  )
  return [_clear(store, s, damaged.get(s.entry.id, '')) for s in chosen]


def _clear(store: ledger.Ledger, state: ledger.EntryState, damaged: str) -> Retried:
  folder = store.folder(state.entry.id)
  if damaged:
    return Retried(state.entry, damaged, _set_product_aside(folder))
  if state.state != schema.INVALID:
    files.remove(files.join(folder, schema.FAILURE))
    return Retried(state.entry, state.reason)
  moved = ()
  while (found := cell_state.read(folder, state.entry.id)).state == schema.INVALID:
    if not found.broken:
      raise UserError(f'{folder} is a file and not a folder; move it away')
    if found.broken == schema.ARTIFACT and schema.RESULT in files.listdir(folder):
      moved += _set_product_aside(folder)
      continue
    moved += ((found.broken, _set_aside(folder, found.broken)),)
    if found.broken == schema.CONFIG:
      files.create(files.join(folder, schema.CONFIG), state.entry.cell.to_json())
  return Retried(state.entry, state.reason, moved)


def _set_product_aside(folder: str) -> tuple[tuple[str, str], ...]:
  # The result first: from then on the cell is unfinished, whatever happens here.
  there = files.listdir(folder)
  return tuple((name, _set_aside(folder, name)) for name in (schema.RESULT, schema.ARTIFACT) if name in there)


def _set_aside(folder: str, name: str) -> str:
  """Moves a file or folder of a cell to its corrupt/, and returns where it is now."""
  taken = files.listdir(files.join(folder, schema.CORRUPT))
  number = next(i for i in range(len(taken) + 1) if f'{name}-{i}' not in taken)
  to = files.join(schema.CORRUPT, f'{name}-{number}')
  try:
    files.move_tree(files.join(folder, name), files.join(folder, to))
  except OSError as error:
    raise UserError(
      f'{files.join(folder, name)} cannot be moved ({error.strerror or error}); move it away by hand'
    ) from error
  return to


def _damaged_artifact(folder: str) -> str:
  """Why the autoencoder of a finished cell cannot be believed; empty when it can be, or when there is none."""
  if schema.ARTIFACT not in files.listdir(folder):
    return ''
  try:
    product.check(folder)
  except (schema.Broken, OSError) as error:
    return cell_state.printable(product.why(error))
  return ''


@one_line_errors
def main(argv: list[str]) -> int:
  parser = flags.parser(
    'retry',
    'Clear the failures of cells and move files aside that cannot be believed, so that the next launch or a '
    'running worker tries these cells again.',
  )
  parser.add_argument(
    'ids', nargs='*', metavar='ID', help='cells to clear (default: all that failed for good or are invalid)'
  )
  flags.add_max_failures(parser)
  args = parser.parse_args(argv)
  cleared = retry(args.ledger, args.ids, args.max_failures)
  for one in cleared:
    what = ', '.join(f'moved {name} to {to}' for name, to in one.moved)
    print(
      f'{one.entry.id} {cell_state.printable(grid.label(one.entry.overrides))}: '
      + (f'{what} ({one.reason})' if what else f'cleared {one.reason}')
    )
  print(f'{len(cleared)} cells to try again' if cleared else 'no failed or invalid cell')
  return 0


if __name__ == '__main__':
  main()
