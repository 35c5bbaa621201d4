"""Gives failed cells a fresh set of attempts by clearing their failure.json.

python -m sweeps.retry --ledger=DIR [ID ...]
"""

import argparse

from sae_jax import files, schema
from sae_jax.errors import UserError, one_line_errors
from sweeps import grid, ledger, work


def retry(
  store: ledger.Ledger, ids: list[str], max_failures: int = ledger.MAX_FAILURES
) -> list[ledger.CellState]:
  """Clears the failures of the named cells, or of all that failed for good. Raises `UserError` for an unknown id,
  and for a named cell that has no failure to clear or is running."""
  states = {s.cell.id: s for s in store.states(max_failures)}
  for cell_id in ids:
    if cell_id not in states:
      raise UserError(f'no cell {cell_id!r} in {store.path}; python -m sweeps.status lists the ids')
    if states[cell_id].state in ('done', 'running') or not states[cell_id].attempts:
      raise UserError(f'cell {cell_id} is {states[cell_id].state}, with no failure to clear; leave it out')
  chosen = (
    [states[cell_id] for cell_id in ids] if ids else [s for s in states.values() if s.state == 'failed']
  )
  for s in chosen:
    files.remove(files.join(store.folder(s.cell.id), schema.FAILURE))
  return chosen


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m sweeps.retry',
    description='Clear the failures of cells, so that the next launch or a running worker tries them again.',
  )
  parser.add_argument('--ledger', required=True, help='folder or fsspec URL of the sweep')
  parser.add_argument(
    'ids', nargs='*', metavar='ID', help='cells to clear (default: all that failed for good)'
  )
  work.add_max_failures(parser)
  return parser


@one_line_errors
def main(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  cleared = retry(ledger.Ledger(args.ledger), args.ids, args.max_failures)
  for s in cleared:
    print(f'{s.cell.id} {grid.label(s.cell.overrides)}: cleared {s.reason}')
  print(f'{len(cleared)} cells to try again' if cleared else 'no failed cell')
  return 0


if __name__ == '__main__':
  main()
