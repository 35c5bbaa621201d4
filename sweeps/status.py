"""What a ledger's cells are doing, and why: done, running, failed, cancelled, waiting.

python -m sweeps.status --ledger=DIR [--watch | --verify] [--json]
"""

import collections
import json
import os
import pathlib
import shutil
import sys
import time
from typing import Any

from sae_jax import cell_state, files, flops, metrics, schema
from sae_jax.errors import one_line_errors
from sae_jax.measures import results
from sweeps import flags, grid, ledger, verify

# The states in summaries, in their order. The first four are always said.
_COUNTED = (
  schema.DONE,
  schema.RUNNING,
  schema.FAILED,
  schema.WAITING,
  schema.CANCELLED,
  schema.INVALID,
  schema.IMPORTED,
)
_CLEAR = '\033[H\033[2J'
_TAIL = 1 << 16  # bytes of a log that are searched for the last words of cells


def last_line(store: ledger.Ledger, cell_id: str) -> dict[str, Any] | None:
  """The last line of a cell's metrics, or None before the first."""
  lines = metrics.read_metrics(store.folder(cell_id), cell_id)
  return lines[-1] if lines else None


def count(states: list[ledger.EntryState]) -> dict[str, int]:
  found = collections.Counter(s.state for s in states)
  return {state: found[state] for state in _COUNTED}


def summary(counts: dict[str, int]) -> str:
  """'3 done, 1 running, 0 failed, 2 waiting', and the rarer states where there are any."""
  return ', '.join(f'{number} {state}' for state, number in counts.items() if number or state in _COUNTED[:4])


def report(store: ledger.Ledger, max_failures: int, every_byte: bool = False) -> dict[str, Any]:
  """Name, counts, seconds left and one row a cell, as JSON would have it.

  Of finished autoencoders it sees what `product.glance` does, and with `every_byte` what `product.check` does. A speed is
  that of the last line of the metrics, over all of the cell's training time. Before the first line there is none.
  """
  states = store.states(max_failures)
  if every_byte:
    states = verify.verify(store, states)
  any_measured = files.exists(files.join(store.path, schema.MEASURES))
  words = last_words(store) if any(s.state == schema.FAILED for s in states) else {}
  rows = []
  speed = left = 0.0  # dense FLOPs a second of what runs now, and what is left to do
  for s in states:
    row: dict[str, Any] = {
      'id': s.entry.id,
      'overrides': s.entry.overrides,
      'state': s.state,
      'attempts': s.attempts,
      'reason': s.reason,
      'steps': s.entry.cell.train.steps if s.result is None else s.result['steps'],
    }
    cost = 0.0 if s.result is not None else flops.cell_flops(s.entry.cell)['dense']
    if s.result is not None:
      row |= {'step': s.result['steps'], 'nmse': s.result['nmse']}
      row |= measured(store.folder(s.entry.id), s.entry.id) if any_measured else {}
    elif last := last_line(store, s.entry.id):
      row |= {'step': last['step'], 'nmse': last.get('eval/nmse')}
      cost *= 1 - min(1.0, last['step'] / row['steps'])
      if s.state == 'running' and all(last.get(key) for key in ('wall_s', 'step', 'tokens', 'flops_dense')):
        row['tokens_per_s'] = last['tokens'] / last['wall_s']
        row['left_s'] = last['wall_s'] * (row['steps'] / last['step'] - 1)
        speed += last['flops_dense'] / last['wall_s']
    if s.state in schema.UNFINISHED:
      left += cost
    if s.state == schema.FAILED and s.entry.id in words:
      row |= {'log': cell_state.printable(words[s.entry.id])}
    rows.append(row)
  found = {'name': store.name(), 'counts': count(states), 'cells': rows}
  return found | ({'left_s': left / speed} if speed and left else {})


def measured(folder: str, cell_id: str) -> dict[str, Any]:
  """What is measured of a finished cell, by name: why it no longer counts, or '' while it does. Nothing where there is nothing."""
  try:
    found = results.read(folder, cell_id)
    said = {name: result.stale(results.tensors(folder, result.key.weights)) for name, result in found.items()}
    return {'measures': said} if said else {}
  except (schema.Broken, OSError) as error:
    return {'measures': {}, 'reason': cell_state.printable(f'{schema.MEASURES}/{schema.MEASURES_INFO}: {error}')}


def last_words(store: ledger.Ledger) -> dict[str, str]:
  """The last line that a worker's log has of each cell, by id. Nothing where the logs are not beside the ledger."""
  found: dict[str, str] = {}
  if not files.is_local(store.path):
    return found
  logs = files.local(files.join(store.path, 'logs'))
  for path in sorted(logs.glob('**/*.log'), key=lambda path: path.stat().st_mtime):
    cell_id = ''
    for line in filter(str.strip, log_tail(path).splitlines()):
      if line.startswith('cell '):
        cell_id = line.split(' ')[1]
      if cell_id:
        found[cell_id] = f'{path.name}: {line}'
  return found


def log_tail(path: pathlib.Path) -> str:
  """The end of a log, which may have grown for weeks."""
  with open(path, 'rb') as f:
    f.seek(max(0, f.seek(0, os.SEEK_END) - _TAIL))
    return f.read(_TAIL).decode(errors='replace')


def text(found: dict[str, Any]) -> str:
  """A plain table by state, running and failed cells first and with their reasons."""
  rows = [('id', 'cell', 'state', 'step', 'nmse', 'measured', 'tokens/s', 'left', 'why')]
  for row in sorted(found['cells'], key=lambda row: schema.STATES.index(row['state'])):
    rows.append(
      (
        row['id'],
        cell_state.printable(grid.label(row['overrides'])),
        row['state'],
        f'{row["step"]}/{row["steps"]}' if 'step' in row else '',
        f'{row["nmse"]:.4f}' if isinstance(row.get('nmse'), float) else '',
        ', '.join(f'{name} (stale)' if stale else name for name, stale in row.get('measures', {}).items()),
        f'{row["tokens_per_s"]:,.0f}' if 'tokens_per_s' in row else '',
        duration(row['left_s']) if 'left_s' in row else '',
        ' | '.join(part for part in (row['reason'], row.get('log')) if part),
      )
    )
  head = f'sweep {cell_state.printable(found["name"])}: {summary(found["counts"])}'
  if 'left_s' in found:
    head += f', {duration(found["left_s"])} left at this speed'
  return '\n'.join([head, *table(rows)])


def table(rows: list[tuple[str, ...]]) -> list[str]:
  """Rows as lines with aligned columns. The first row is the header. Columns without any entry are left out."""
  kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
  widths = {i: max(len(row[i]) for row in rows) for i in kept}
  return ['  '.join(f'{row[i]:<{widths[i]}}' for i in kept).rstrip() for row in rows]


def duration(seconds: float) -> str:
  """'8.1 s', '42 s', '5 min', '3 h 07 min'."""
  if seconds < 60:
    return f'{seconds:.1f} s' if seconds < 10 else f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  return f'{minutes} min' if minutes < 60 else f'{minutes // 60} h {minutes % 60:02d} min'


def fitted(shown: str, columns: int, lines: int) -> str:
  """As much of a table as a screen holds, with a last line that says how much does not."""
  kept = shown.splitlines()
  if len(kept) >= lines:
    kept = [*kept[: lines - 2], f'... {len(kept) - lines + 2} more; python -m sweeps.status | less shows all']
  return '\n'.join(line[:columns] for line in kept)


@one_line_errors
def main(argv: list[str]) -> int:
  parser = flags.parser(
    'status',
    'Show what the cells of a ledger are doing, with reasons.',
    epilog='A lease held on another machine counts as running until --watch has seen it unchanged for 90 s.',
  )
  how = parser.add_mutually_exclusive_group()
  how.add_argument(
    '--watch',
    action='store_true',
    help='refresh every 2 s until nothing is left to do; on a terminal, in place',
  )
  how.add_argument(
    '--verify',
    action='store_true',
    help='read every byte of the finished autoencoders, too; exit code 1 if a cell is invalid',
  )
  parser.add_argument('--json', action='store_true', help='print one JSON object instead of a table')
  flags.add_max_failures(parser)
  args = parser.parse_args(argv)
  shown = ''
  try:
    while True:
      began = time.process_time()
      found = report(args.ledger, args.max_failures, args.verify)
      now = json.dumps(found) if args.json else text(found)
      if sys.stdout.isatty() and args.watch:
        print(f'{_CLEAR}{fitted(now, *shutil.get_terminal_size())}', flush=True)
      elif now != shown:
        print(now, flush=True)
      shown = now
      if not args.watch or not (found['counts']['running'] or found['counts']['waiting']):
        return 1 if args.verify and found['counts'][schema.INVALID] else 0
      time.sleep(ledger.nap_s(2.0, time.process_time() - began))
  except KeyboardInterrupt:
    return 0


if __name__ == '__main__':
  main()
