"""Frees the checkpoints of finished cells, which only `sweeps.launch --extend` reads again. Also what killed writers left.

python -m sweeps.gc --ledger=DIR [--dry_run]

Results, metrics and the autoencoders in sae/ stay, and so does everything of a cell that is not finished. A file is
written under another name first, and a process that is killed there leaves it. On a local disk such files go when they
are a day old, wherever they are in the ledger.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

from sae_jax import files, schema
from sae_jax.errors import UserError, one_line_errors
from sweeps import flags, grid, ledger

FOLDERS = (schema.CHECKPOINTS, schema.CORRUPT)
DAY = 24 * 3600.0  # seconds; no writer takes as long for one file


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
    _delete(folder, files.remove_tree)


def litter(store: ledger.Ledger, found: Sequence[Garbage]) -> dict[str, int]:
  """Bytes by path of the files that killed writers left in the ledger, without those in folders that go as a whole."""
  gone = tuple(str(files.local(folder)) + '/' for garbage in found for folder in garbage.folders)
  left = files.temporaries(store.path, time.time() - DAY)
  return {path: size for path, size in left.items() if not path.startswith(gone)}


def _delete(path: str, how: Callable[[str], None]) -> None:
  try:
    how(path)
  except OSError as error:
    raise UserError(f'cannot delete {path} ({error.strerror or error}); delete it by hand') from error


def printable_size(size: float) -> str:
  """'1.5 GB', in powers of 1,000."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if size < 1000:
      return f'{size:.0f} B' if unit == 'B' else f'{size:.1f} {unit}'
    size /= 1000
  return f'{size:.1f} TB'


@one_line_errors
def main(argv: list[str]) -> int:
  parser = flags.parser(
    'gc',
    'Delete the checkpoints of finished cells, and what killed writers left; results, metrics and autoencoders stay.',
  )
  parser.add_argument('--dry_run', action='store_true', help='list what would go; delete nothing')
  args = parser.parse_args(argv)
  found = find(args.ledger)
  left = litter(args.ledger, found)
  for garbage in found:
    if not args.dry_run:
      free(garbage)
    print(f'{garbage.entry.id} {grid.label(garbage.entry.overrides)}: {printable_size(garbage.size)}', flush=True)
  for path, size in left.items():
    if not args.dry_run:
      _delete(path, files.remove)
    print(f'{path}: {printable_size(size)}, left by a writer that was killed', flush=True)
  verb = 'would be' if args.dry_run else 'were'
  if left:
    print(f'{printable_size(sum(left.values()))} {verb} freed in {len(left)} files that killed writers left')
  total = printable_size(sum(garbage.size for garbage in found))
  print(f'{total} {verb} freed in {len(found)} finished cells')
  return 0


if __name__ == '__main__':
  main()
