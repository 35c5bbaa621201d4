"""Frees the checkpoints of finished cells: optimizer states that nothing reads again.

python -m sweeps.gc --ledger=DIR [--dry_run]

Results, metrics and the autoencoders in sae/ stay, and so does everything of a cell that is not finished.
"""

import dataclasses

from sae_jax import files, schema
from sae_jax.errors import UserError, one_line_errors
from sweeps import flags, grid, ledger

FOLDERS = (schema.CHECKPOINTS, schema.CORRUPT)


@dataclasses.dataclass(frozen=True)
class Garbage:
  entry: ledger.Entry
  folders: tuple[str, ...]
  size: int  # bytes


def find(store: ledger.Ledger) -> list[Garbage]:
  """What can go, by finished cell. A cell without its sae/ keeps its checkpoints, for they are its only weights.

  Raises `UserError` for a cell whose folder is a link. What is behind it may belong to another ledger.
  """
  found = []
  for s in store.states():
    folder = store.folder(s.entry.id)
    if files.is_link(folder):
      raise UserError(
        f'{folder} is a link, and only folders inside the ledger are cleaned; put the folder itself in its place'
      )
    if s.state == schema.DONE and files.listdir(files.join(folder, schema.ARTIFACT)):
      folders = tuple(p for name in FOLDERS if files.listdir(p := files.join(folder, name)))
      if folders:
        found.append(Garbage(s.entry, folders, sum(files.size(p) for p in folders)))
  return found


def free(garbage: Garbage) -> None:
  """Raises `UserError` when a folder cannot be deleted, for instance a link."""
  for folder in garbage.folders:
    try:
      files.remove_tree(folder)
    except OSError as error:
      raise UserError(f'cannot delete {folder} ({error.strerror or error}); delete it by hand') from error


def printable_size(size: float) -> str:
  """'1.5 GB', in powers of 1,000."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if size < 1000:
      return f'{size:.0f} B' if unit == 'B' else f'{size:.1f} {unit}'
    size /= 1000
  return f'{size:.1f} TB'


@one_line_errors
def main(argv: list[str]) -> int:
  parser = flags.parser('gc', 'Delete the checkpoints of finished cells; results, metrics and autoencoders stay.')
  parser.add_argument('--dry_run', action='store_true', help='list what would go; delete nothing')
  args = parser.parse_args(argv)
  found = find(args.ledger)
  for garbage in found:
    if not args.dry_run:
      free(garbage)
    print(f'{garbage.entry.id} {grid.label(garbage.entry.overrides)}: {printable_size(garbage.size)}', flush=True)
  total = printable_size(sum(garbage.size for garbage in found))
  print(f'{total} {"would be" if args.dry_run else "were"} freed in {len(found)} finished cells')
  return 0


if __name__ == '__main__':
  main()
