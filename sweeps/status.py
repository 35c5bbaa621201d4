"""What a ledger's cells are doing, and why: done, running, failed, waiting.

python -m sweeps.status --ledger=DIR [--watch] [--json]
"""

import argparse
import collections
import json
import sys
import time
from typing import Any

from sae_jax import files, metrics
from sae_jax.errors import one_line_errors
from sweeps import grid, ledger, work

STATES = ('done', 'running', 'failed', 'waiting')
_CLEAR = '\033[H\033[2J'


def progress(folder: str) -> dict[str, Any] | None:
  """The last line of a cell's metrics, or None before the first."""
  lines = metrics.read_metrics(folder)
  return lines[-1] if lines else None


def count(states: list[ledger.CellState]) -> dict[str, int]:
  found = collections.Counter(s.state for s in states)
  return {state: found[state] for state in STATES}


def summary(counts: dict[str, int]) -> str:
  """'3 done, 1 running, 0 failed, 2 waiting'."""
  return ', '.join(f'{number} {state}' for state, number in counts.items())


def report(store: ledger.Ledger, max_failures: int) -> dict[str, Any]:
  """Name, counts and one row a cell, as JSON would have it."""
  states = store.states(max_failures)
  rows = []
  for s in states:
    row: dict[str, Any] = {
      'id': s.cell.id,
      'overrides': s.cell.overrides,
      'state': s.state,
      'attempts': s.attempts,
    }
    row |= {'reason': s.reason, 'steps': s.cell.config.train.steps}
    if s.state == 'done':
      result = json.loads(files.read(files.join(store.folder(s.cell.id), metrics.RESULT)))
      row |= {'step': result['steps'], 'nmse': result['nmse']}
    elif last := progress(store.folder(s.cell.id)):
      row |= {'step': last['step'], 'nmse': last.get('eval/nmse')}
    rows.append(row)
  return {'name': store.name(), 'counts': count(states), 'cells': rows}


def text(found: dict[str, Any]) -> str:
  """A plain table, failures and running cells with their reasons."""
  rows = [('id', 'cell', 'state', 'step', 'nmse', 'why')]
  for row in found['cells']:
    rows.append(
      (
        row['id'],
        ledger.printable(grid.label(row['overrides'])),
        row['state'],
        f'{row["step"]}/{row["steps"]}' if 'step' in row else '',
        f'{row["nmse"]:.4f}' if isinstance(row.get('nmse'), float) else '',
        row['reason'],
      )
    )
  head = f'sweep {ledger.printable(found["name"])}: {summary(found["counts"])}'
  return '\n'.join([head, *table(rows)])


def table(rows: list[tuple[str, ...]]) -> list[str]:
  """Rows as lines with aligned columns; the first row is the header."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  return [
    '  '.join(f'{text:<{width}}' for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
  ]


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m sweeps.status',
    description='Show what the cells of a ledger are doing, with reasons.',
    epilog='A lease held on another machine counts as running until --watch has seen it unchanged for 90 s.',
  )
  parser.add_argument('--ledger', required=True, help='folder or fsspec URL of the sweep')
  parser.add_argument('--watch', action='store_true', help='refresh every 2 s until nothing is left to do')
  parser.add_argument('--json', action='store_true', help='print one JSON object instead of a table')
  work.add_max_failures(parser)
  return parser


@one_line_errors
def main(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  work.check_max_failures(args.max_failures)
  store = ledger.Ledger(args.ledger)
  shown = ''
  try:
    while True:
      found = report(store, args.max_failures)
      now = json.dumps(found) if args.json else text(found)
      if sys.stdout.isatty() and args.watch:
        print(f'{_CLEAR}{now}', flush=True)
      elif now != shown:
        print(now, flush=True)
      shown = now
      if not args.watch or not (found['counts']['running'] or found['counts']['waiting']):
        return 0
      time.sleep(2)
  except KeyboardInterrupt:
    return 0


if __name__ == '__main__':
  main()
