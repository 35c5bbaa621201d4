"""Runs what a ledger lacks: registers the cells of a grid, starts workers, shows progress until all is done.

python -m sweeps.launch --sweep=sweeps/grids/tiny.py --ledger=runs/tiny --executor=local [--dry_run]

Never imports jax, so that a launch with nothing to do takes a moment.
"""

import argparse
import heapq
import json
import pathlib
import signal
import sys
import tempfile
import time
from typing import Protocol

import numpy as np
from tqdm import tqdm

from sae_jax import files, flops, metrics
from sae_jax.errors import UserError, one_line_errors
from sweeps import grid, ledger, status, work
from sweeps.executors import local

MAX_STRAYS = 3  # ends of workers that held no cell: a broken installation rather than a bad cell
_UNFINISHED = ('waiting', 'running')


class Executor(Protocol):
  """How jobs get run. Its view is only a hint: what is done stands in the ledger."""

  def submit(self, job: local.Job) -> str:
    """Starts or queues a job and returns its id; nothing happens when a job of that id exists."""
    ...

  def states(self, ids: list[str]) -> dict[str, str]:
    """'pending', 'running' or 'gone' by id."""
    ...

  def cancel(self, job_id: str) -> None:
    """Asks a job to save and end; asked again, ends it."""
    ...


class WorkerDied(Exception):
  """Stands in failure.json for a process that ended without a Python exception."""


class Board:
  """One bar over the cells when a person watches, one plain line a change otherwise."""

  def __init__(self, store: ledger.Ledger, states: list[ledger.CellState]):
    self._store, self._begin = store, time.monotonic()
    self._cost = {s.cell.id: flops.cell_flops(s.cell.config)['dense'] for s in states}
    self._at_start: float | None = None
    self._line = ''
    self._told: dict[str, int] = {s.cell.id: s.attempts for s in states}
    self._bar = None
    if sys.stderr.isatty():
      tqdm.monitor_interval = 0  # no thread of its own: workers are forked from this process
      self._bar = tqdm(total=len(states), bar_format='{n_fmt}/{total_fmt} cells |{bar}|{postfix} [{elapsed}]')

  def show(self, states: list[ledger.CellState]) -> None:
    for s in states:
      if s.attempts > self._told.get(s.cell.id, 0):
        self.say(f'cell {s.cell.id} {grid.label(s.cell.overrides)}: {s.reason}')
      self._told[s.cell.id] = s.attempts
    counts = status.count(states)
    line = status.summary(counts)
    if self._bar is not None:
      self._bar.total, self._bar.n = len(states), counts['done']
      self._bar.set_postfix_str(f'{line}{self._left(states)}')
    elif line != self._line:
      print(f'{line}{self._left(states)}', flush=True)
    self._line = line

  def say(self, line: str) -> None:
    if self._bar is not None:
      self._bar.write(line, file=sys.stderr)
    else:
      print(line, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _left(self, states: list[ledger.CellState]) -> str:
    """Part of the work done, and time left at the speed of this launch so far; cells weigh by their FLOPs."""
    spent = left = 0.0
    for s in states:
      cost = self._cost.setdefault(s.cell.id, flops.cell_flops(s.cell.config)['dense'])
      last = status.progress(self._store.folder(s.cell.id)) if s.state == 'running' else None
      ready = min(1.0, last['step'] / s.cell.config.train.steps) if last else float(s.state == 'done')
      spent += ready * cost
      left += (1 - ready) * cost if s.state in _UNFINISHED else 0.0
    self._at_start = spent if self._at_start is None else self._at_start
    gained = spent - self._at_start
    part = f', {100 * spent / max(1.0, spent + left):.0f} % of the work'
    if not left or gained <= 0:
      return part
    return f'{part}, {_duration((time.monotonic() - self._begin) * left / gained)} left'


def drive(
  store: ledger.Ledger,
  executor: Executor,
  jobs: list[local.Job],
  received: list[int],
  max_failures: int,
) -> None:
  """Runs jobs until they have all gone. `received` grows by one a signal: the first cancels, the second kills."""
  names = [executor.submit(job) for job in jobs]
  board = Board(store, store.states(max_failures))
  poll_s = 0.5 if files.is_local(store.path) else 15.0
  cancels = 0
  try:
    while True:
      running = [name for name, state in executor.states(names).items() if state != 'gone']
      states = store.states(max_failures)
      board.show(states)
      if not running:
        return
      # Workers notice by themselves that nothing is left; this spares them their last nap.
      over = not any(s.state in _UNFINISHED for s in states)
      while cancels < min(2, max(len(received), over)):
        if received:
          board.say(
            'stopping: workers save a checkpoint; again to kill' if len(received) == 1 else 'killing workers'
          )
        for name in running:
          executor.cancel(name)
        cancels += 1
      until = time.monotonic() + poll_s
      heard = len(received)
      while time.monotonic() < until and len(received) == heard:
        time.sleep(0.1)
  finally:
    board.close()


def plan(
  sweep: grid.Sweep, store: ledger.Ledger, workers: int, max_failures: int, stated: float | None
) -> str:
  """What a launch would do: a line a cell, and the time it should take. Writes nothing."""
  states = [store.state(ledger.Cell(c.id, overrides, c), max_failures) for overrides, c in sweep.cells]
  costs = {s.cell.id: flops.cell_flops(s.cell.config) for s in states}
  rate, source = _rate(store, states, stated)
  rows = [('id', 'cell', 'steps', 'useful FLOPs', 'dense FLOPs', 'time', 'state')]
  for s in states:
    cost = costs[s.cell.id]
    rows.append(
      (
        s.cell.id,
        grid.label(s.cell.overrides),
        str(s.cell.config.train.steps),
        f'{cost["useful"]:.2e}',
        f'{cost["dense"]:.2e}',
        _duration(cost['dense'] / rate),
        f'{s.state}: {s.reason}' if s.reason else s.state,
      )
    )
  todo = [costs[s.cell.id] for s in states if s.state in _UNFINISHED]
  busy = [0.0] * workers  # as the workers do it: the largest cell next, to whoever is free
  for dense in sorted((cost['dense'] for cost in todo), reverse=True):
    heapq.heapreplace(busy, busy[0] + dense / rate)
  total = {key: sum(cost[key] for cost in todo) for key in ('useful', 'dense')}
  return '\n'.join(
    [
      *status.table(rows),
      f'{sweep.name}: {len(states)} cells, {len(todo)} to do, {total["useful"]:.2e} useful and '
      f'{total["dense"]:.2e} dense FLOPs, about {_duration(max(busy))} on {workers} worker{"s"[: workers > 1]}',
      f'time at {rate:.2e} dense FLOP/s a worker, {source}',
    ]
  )


def _rate(store: ledger.Ledger, states: list[ledger.CellState], stated: float | None) -> tuple[float, str]:
  spent = seconds = 0.0
  for s in states:
    if s.state == 'done':
      result = json.loads(files.read(files.join(store.folder(s.cell.id), metrics.RESULT)))
      spent, seconds = spent + result['flops_dense'], seconds + result['wall_s']
  if seconds > 0:
    return spent / seconds, 'measured on the finished cells of this ledger'
  if stated is not None:
    return stated, 'as stated by --flops_per_second'
  x = np.ones((1024, 1024), np.float32)
  products, begin = 0, time.monotonic()
  while (elapsed := time.monotonic() - begin) < 1:
    x @ x
    products += 1
  return products * 2.0 * 1024**3 / elapsed, 'that of a numpy matrix product here: no cell has finished yet'


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f'{seconds:.1f} s' if seconds < 10 else f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  return f'{minutes} min' if minutes < 60 else f'{minutes // 60} h {minutes % 60:02d} min'


def _verdict(store: ledger.Ledger, ids: set[str], max_failures: int) -> int:
  """Prints how the cells of this grid ended, and returns the exit code that says the same."""
  states = [s for s in store.states(max_failures) if s.cell.id in ids]
  failed = [s for s in states if s.state == 'failed']
  left = sum(s.state in _UNFINISHED for s in states)
  print(f'{status.summary(status.count(states))} in {store.path}', flush=True)
  for s in failed:
    print(f'failed: {s.cell.id} {grid.label(s.cell.overrides)}: {s.reason}')
  if failed:
    print(f'after the cause is gone: python -m sweeps.retry --ledger={store.path}')
  return work.SOME_FAILED if failed or left else 0


def _run_locally(store: ledger.Ledger, workers: int, max_failures: int, logs: pathlib.Path) -> list[int]:
  """Trains with processes of this machine; returns the signals received."""
  received: list[int] = []
  for signum in (signal.SIGINT, signal.SIGTERM):
    signal.signal(signum, lambda number, _: received.append(number))
  strays = 0

  def may_restart(pid: int, code: int) -> bool:
    nonlocal strays
    exit_code = 128 - code if code < 0 else code
    if not any(s.state in _UNFINISHED for s in store.states(max_failures)):
      return False
    cell_id = store.held_by(pid)
    if cell_id is None:
      strays += 1
      return strays < MAX_STRAYS
    died = WorkerDied(f'the worker ended with exit code {exit_code}; its output is in {logs}')
    metrics.record_failure(store.folder(cell_id), died, exit_code=exit_code)
    return True

  argv = (sys.executable, '-m', 'sweeps.work', f'--ledger={store.path}', f'--max_failures={max_failures}')
  jobs = [local.Job(f'worker-{i}', argv, local.device_env(i, workers)) for i in range(workers)]
  drive(store, local.Local(logs, may_restart), jobs, received, max_failures)
  return received


def _tail(logs: pathlib.Path, lines: int = 5) -> str:
  texts = [path.read_text(errors='replace') for path in sorted(logs.glob('worker-*.log'))]
  return '\n'.join(ledger.printable(line) for text in texts for line in text.splitlines()[-lines:])


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m sweeps.launch',
    description='Train the cells of a grid that the ledger lacks. Started again, it does only what is missing.',
    epilog='Exit codes: 0 all done, 1 some failed for good, 2 bad input, 130 stopped by Ctrl-C with all saved.',
  )
  parser.add_argument('--sweep', required=True, help='grid file, e.g. sweeps/grids/tiny.py')
  parser.add_argument('--ledger', required=True, help='folder or fsspec URL for results, one sweep each')
  parser.add_argument('--executor', choices=('local',), default='local', help='what runs the cells')
  parser.add_argument(
    '--workers', type=int, default=1, help='processes that train at once (default %(default)s)'
  )
  parser.add_argument(
    '--dry_run', action='store_true', help='list cells, FLOPs, states and time; write nothing'
  )
  parser.add_argument('--flops_per_second', type=float, help='of one worker, for the times of --dry_run')
  work.add_max_failures(parser)
  return parser


@one_line_errors
def main(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  work.check_max_failures(args.max_failures)
  if args.workers < 1:
    raise UserError(f'--workers={args.workers} is below 1; at least one process must train')
  if args.flops_per_second is not None and not 0 < args.flops_per_second < float('inf'):
    raise UserError(f'--flops_per_second={args.flops_per_second} is not a positive number; give e.g. 1e12')
  sweep = grid.build(args.sweep)
  store = ledger.Ledger(args.ledger)
  if sweep.dropped:
    print(f'{sweep.dropped} cells of {args.sweep} equal an earlier one and were dropped')
  if args.dry_run:
    store.check_free_for(sweep)
    print(plan(sweep, store, args.workers, args.max_failures, args.flops_per_second))
    return 0
  store.register(sweep)
  ids = {c.id for _, c in sweep.cells}
  states = store.states(args.max_failures)
  todo = [s for s in states if s.state in _UNFINISHED]
  print(f'sweep {sweep.name}: {len(ids)} cells, todo {len(todo)}', flush=True)
  if others := sum(s.cell.id not in ids for s in todo):
    print(f'{others} of them come from an earlier version of the grid; they are run too')
  if not todo:
    return _verdict(store, ids, args.max_failures)
  at_home = files.is_local(store.path)
  logs = (
    files.local(files.join(store.path, 'logs'))
    if at_home
    else pathlib.Path(tempfile.mkdtemp(prefix='sweep-'))
  )
  print(f'output of the workers: {logs}', flush=True)
  received = _run_locally(store, min(args.workers, len(todo)), args.max_failures, logs)
  code = _verdict(store, ids, args.max_failures)
  if received:
    print('interrupted: the same command resumes')
    return 128 + received[0]
  if any(s.state in _UNFINISHED for s in store.states(args.max_failures)):
    print(f'the workers ended with cells left to do; their last words:\n{_tail(logs)}')
  return code


if __name__ == '__main__':
  main()
