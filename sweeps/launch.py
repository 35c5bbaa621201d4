"""Runs what a ledger lacks: registers the cells of a grid, starts workers or jobs, and shows progress until all is done.

python -m sweeps.launch --sweep=sweeps/grids/tiny.py --ledger=runs/tiny --executor=local [--dry_run]

Never imports jax, so that a launch with nothing to do takes a moment.
"""

import argparse
import contextlib
import pathlib
import signal
import sys
import tempfile
import time

from sae_jax import cell_state, files, metrics, schema, signals, watchdog
from sae_jax.errors import HOST_BROKEN, UserError, one_line_errors
from sae_jax.flags import positive, whole
from sweeps import extend, flags, grid, groups, jobs, ledger, preview, progress, status, work
from sweeps.executors import Executor, Job, local

GRACE_S = 10.0  # for workers to end once nothing is left to do; a worker that hangs does not
MAX_STRAYS = 3  # ends of workers that held no cell: a broken installation rather than a bad cell
MAX_HOST_ENDS = 3  # ends by errors of this machine, one after another, between which nothing was gained


class WorkerDied(Exception):
  """Stands in failure.json for a process that ended without a Python exception."""


def drive(
  store: ledger.Ledger,
  executor: Executor,
  todo: list[Job],
  received: list[int],
  max_failures: int,
) -> None:
  """Runs jobs until they have all gone.

  `received` grows by one with each signal. The first cancels all jobs, the second kills them.
  """
  names = [executor.submit(job) for job in todo]
  poll_s = 0.5 if files.is_local(store.path) else 15.0
  cancels = 0
  over_since: float | None = None
  states: list[ledger.EntryState] = []
  look_at = 0.0
  with contextlib.closing(progress.Board(store, store.states(max_failures))) as shown:
    while True:
      # A look at the processes costs nothing, one at thousands of cells does.
      running = [name for name, state in executor.states(names).items() if state != 'gone']
      if not running or time.monotonic() >= look_at:
        began = time.process_time()
        states = store.states(max_failures)
        shown.show(states)
        look_at = time.monotonic() + ledger.nap_s(poll_s, time.process_time() - began)
      if not running:
        return
      # Workers notice by themselves that nothing is left, after a nap. This wakes them.
      if any(s.state in schema.UNFINISHED for s in states):
        over_since = None
      elif over_since is None:
        over_since = time.monotonic()
      over = 0 if over_since is None else 1 + (time.monotonic() - over_since >= GRACE_S)
      while cancels < min(2, max(len(received), over)):
        if received:
          shown.say('stopping: workers save a checkpoint; again to kill' if len(received) == 1 else 'killing workers')
        for name in running:
          executor.cancel(name)
        cancels += 1
      _nap(poll_s, received)


def follow(
  store: ledger.Ledger,
  cluster: jobs.Cluster,
  gangs: int | None,
  received: list[int],
  max_failures: int,
  detach: bool = False,
  group: int | None = None,
) -> None:
  """Submits jobs for what waits, and watches them until they have gone. The jobs do not need this process.

  A signal ends the watching only. With `detach` nothing is watched.
  """
  submitted: set[str] = set()
  began = time.process_time()
  states = store.states(max_failures)
  with contextlib.closing(progress.Board(store, states, visible=not detach)) as shown:
    while True:
      for job in jobs.jobs(store, cluster, states, gangs, max_failures, group):
        # Each is submitted once: a job that has gone with its cell undone is for a person to look at.
        if job.id not in submitted and not received:
          submitted.add(cluster.engine.submit(job))
      if detach:
        print(f'{len(submitted)} jobs are with the engine; the same command, or sweeps.status, watches them')
        return
      # Jobs of an earlier launch are watched too: their cells may be running, or wait between two runs of the job.
      names = sorted(submitted.union(jobs.names(states, gangs, group)))
      alive = {name: s for name, s in cluster.engine.states(names).items() if s != 'gone'}
      queued = [name for name, s in alive.items() if s == 'pending']
      shown.show(states, f'; jobs: {len(alive) - len(queued)} running, {len(queued)} pending')
      if not any(s.state in schema.UNFINISHED for s in states):
        for name in queued:
          cluster.engine.cancel(name)  # it would find nothing to do
        return
      if received or not (alive or any(s.state == 'running' for s in states)):
        shown.show(store.states(max_failures))
        return
      _nap(ledger.nap_s(cluster.poll_s, time.process_time() - began), received)
      began = time.process_time()
      states = store.states(max_failures)


def _nap(seconds: float, received: list[int]) -> None:
  """Sleeps, but not past a new signal."""
  heard = len(received)
  work.sleep(seconds, lambda: len(received) != heard)


def _catch_signals() -> list[int]:
  """A list that grows by one a SIGINT or SIGTERM from now on."""
  received: list[int] = []
  for signum in signals.STOP:
    signal.signal(signum, lambda number, _: received.append(number))
  return received


def _verdict(store: ledger.Ledger, ids: set[str], max_failures: int) -> int:
  """Prints how the cells of this grid ended, and returns the exit code that says the same."""
  states = [s for s in store.states(max_failures) if s.entry.id in ids]
  if lost := len(ids) - len(states):
    print(f'{lost} cells of this grid are not in {store.path}: sweep.json was replaced; the same command adds them')
  failed = [s for s in states if s.state in (schema.FAILED, schema.INVALID)]
  print(f'{status.summary(status.count(states))} in {store.path}', flush=True)
  for s in failed:
    print(f'{s.state}: {s.entry.id} {grid.label(s.entry.overrides)}: {s.reason}')
  if failed:
    print(f'after the cause is gone: python -m sweeps.retry --ledger={store.path}')
  done = all(s.state in schema.FINISHED for s in states)
  return 0 if done and not lost else work.SOME_FAILED


class Restarts:
  """Says of a local worker that ended whether it may be restarted, and charges its cells for its death.

  It is asked with the process id, `lease.process_start` and the exit code.
  """

  def __init__(self, store: ledger.Ledger, max_failures: int, logs: pathlib.Path):
    self._store, self._max_failures, self._logs = store, max_failures, logs
    self._strays = self._host_ends = 0
    self._gained: list[tuple[bool, list[int]]] = []

  @property
  def host_broken(self) -> bool:
    """Whether this machine ended worker after worker."""
    return self._host_ends >= MAX_HOST_ENDS

  def __call__(self, pid: int, started: int, code: int) -> bool:
    exit_code = 128 - code if code < 0 else code
    states = self._store.states(self._max_failures)
    if not any(s.state in schema.UNFINISHED for s in states):
      return False
    if code == HOST_BROKEN:
      # No cell is charged, whatever the worker still held.
      gained = [(s.state == schema.DONE, groups.saved_steps(self._store, s.entry.id)) for s in states]
      self._host_ends = self._host_ends + 1 if gained == self._gained else 1
      self._gained = gained
      return not self.host_broken
    held = self._store.held_by(pid, started)
    if not held and code == watchdog.STALLED_EXIT:
      return True  # it has charged its cells itself
    if not held:
      self._strays += 1
      return self._strays < MAX_STRAYS
    died = WorkerDied(f'the worker ended with exit code {exit_code}; its output is in {self._logs}')
    for cell_id in held:
      metrics.record_failure(self._store.folder(cell_id), died, exit_code=exit_code)
    return True


def _work_here(
  store: ledger.Ledger, workers: int, max_failures: int, logs: pathlib.Path, group: int | None
) -> list[int]:
  """Trains with processes of this machine; returns the signals received."""
  received = _catch_signals()
  restarts = Restarts(store, max_failures, logs)
  argv = work.command(store, max_failures, group)
  todo = [Job(f'worker-{i}', argv, local.device_env(i, workers)) for i in range(workers)]
  drive(store, local.Local(logs, restarts), todo, received, max_failures)
  if restarts.host_broken:
    print(
      f'error: {MAX_HOST_ENDS} workers in a row ended by errors of this machine and gained nothing; mend it (their '
      f'output is in {logs}) and start again: it resumes',
      file=sys.stderr,
      flush=True,
    )
  return received


def _tail(logs: pathlib.Path, lines: int = 5) -> str:
  texts = map(status.log_tail, sorted(logs.glob('worker-*.log')))
  return '\n'.join(cell_state.printable(line) for text in texts for line in text.splitlines()[-lines:])


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m sweeps.launch',
    description='Train the cells of a grid that the ledger lacks. Started again, it does only what is missing.',
    epilog='Exit codes: 0 all done (or all submitted), 1 some are not, 2 bad input, 130 stopped by Ctrl-C: '
    'local workers have saved, jobs of an engine run on.',
  )
  parser.add_argument('--sweep', required=True, help='grid file, e.g. sweeps/grids/tiny.py')
  parser.add_argument('--ledger', required=True, help='folder or fsspec URL for results, one sweep each')
  parser.add_argument('--executor', choices=('local', 'slurm', 'jobset'), default='local', help='what runs the cells')
  parser.add_argument(
    '--workers',
    type=whole('--workers', least=0),
    help='local: processes that train at once (default 1; 0 fills the ledger for workers started by hand)',
  )
  parser.add_argument('--site', metavar='FILE', help='slurm, jobset: TOML file with what the cluster wants')
  parser.add_argument(
    '--gangs',
    type=whole('--gangs'),
    help='slurm, jobset: so many jobs share all cells, for many short ones (default: a job a cell, or a group of cells)',
  )
  parser.add_argument(
    '--extend',
    action='store_true',
    help="go on from finished cells that differ in train.tokens alone and have a checkpoint; needs recipe.horizon='so far'",
  )
  parser.add_argument('--detach', action='store_true', help='slurm, jobset: submit and leave')
  parser.add_argument('--dry_run', action='store_true', help='list cells, FLOPs, states, time and jobs; write nothing')
  parser.add_argument(
    '--flops_per_second',
    type=positive('--flops_per_second', '1e12'),
    help='of one worker, for the times of --dry_run',
  )
  parser.add_argument('--topology', help='slice, e.g. v5p:2x2x2: --dry_run also prints chip-hours on it')
  parser.add_argument(
    '--dollars_per_chip_hour',
    type=positive('--dollars_per_chip_hour', '1.2'),
    help='price for --topology',
  )
  flags.add_max_failures(parser)
  flags.add_group(parser)
  return parser


def _check(args: argparse.Namespace) -> None:
  """Raises `UserError` for flags that do not go together."""
  given = {'--site': args.site, '--gangs': args.gangs, '--detach': args.detach or None}
  if args.executor != 'local':
    given = {'--workers': args.workers}
  for flag, value in given.items():
    if value is not None:
      raise UserError(f'{flag} has no meaning with --executor={args.executor}; leave it out')
  if args.topology and not args.dry_run:
    raise UserError(f'--topology={args.topology} only tells what --dry_run would cost; add --dry_run')
  if args.dollars_per_chip_hour and not args.topology:
    raise UserError('--dollars_per_chip_hour needs --topology=NAME, e.g. v5p:2x2x2; add it')


@one_line_errors
def main(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  _check(args)
  sweep = grid.build(args.sweep)
  store = ledger.Ledger(args.ledger)
  clusters = {'slurm': jobs.slurm_cluster, 'jobset': jobs.jobset_cluster}
  cluster = clusters[args.executor](args.site, store.path) if args.executor in clusters else None
  if sweep.dropped:
    print(f'{sweep.dropped} cells of {args.sweep} equal an earlier one and were dropped', file=sys.stderr)
  if args.extend:
    sweep, said = extend.extended(sweep, store, args.max_failures)
    print(said, file=sys.stderr)
  if args.dry_run:
    _dry_run(args, sweep, store, cluster)
    return 0
  store.register(sweep)
  ids = {c.id for _, c in sweep.cells}
  states = store.states(args.max_failures)
  todo = [s for s in states if s.state in schema.UNFINISHED]
  print(f'sweep {sweep.name}: {len(ids)} cells, todo {len(todo)}', flush=True)
  if others := sum(s.entry.id not in ids for s in todo):
    print(f'{others} of them come from an earlier version of the grid; they are run too')
  if not todo:
    return _verdict(store, ids, args.max_failures)
  if cluster is not None:
    return _run_on(cluster, args, store, ids)
  if args.workers == 0:
    print(f'on every host that is to train: python -m sweeps.work --ledger={store.path}')
    return 0
  return _run_here(args, store, ids, len(todo))


def _dry_run(args: argparse.Namespace, sweep: grid.Sweep, store: ledger.Ledger, cluster: jobs.Cluster | None) -> None:
  store.check_free_for(sweep)
  states = preview.states_of(sweep, store, args.max_failures)
  workers, out = args.workers or 1, sys.stdout
  if cluster is not None:
    planned = jobs.jobs(store, cluster, states, args.gangs, args.max_failures, args.group)
    print(cluster.engine.render(planned))
    workers, out = max(1, len(planned)), sys.stderr  # stdout holds what can be given to the engine by hand
  print(preview.table(sweep.name, store, states, workers, args.flops_per_second), file=out)
  if args.topology:
    print(preview.cost_table(states, args.topology, args.dollars_per_chip_hour), file=out)


def _run_on(cluster: jobs.Cluster, args: argparse.Namespace, store: ledger.Ledger, ids: set[str]) -> int:
  """Trains with jobs of an engine; returns the exit code."""
  received = _catch_signals()
  print(f'output of the jobs: {cluster.logs}', flush=True)
  follow(store, cluster, args.gangs, received, args.max_failures, args.detach, args.group)
  if args.detach:
    return 0
  again = f'the same command watches them again, python -m sweeps.cancel --ledger={store.path} stops cells'
  left = f'the jobs ended with cells left to do; see their output in {cluster.logs}'
  return _end(args, store, ids, received, f'the jobs run on; {again}', left)


def _run_here(args: argparse.Namespace, store: ledger.Ledger, ids: set[str], todo: int) -> int:
  """Trains with processes of this machine; returns the exit code."""
  at_home = files.is_local(store.path)
  logs = files.local(files.join(store.path, 'logs')) if at_home else pathlib.Path(tempfile.mkdtemp(prefix='sweep-'))
  print(f'output of the workers: {logs}', flush=True)
  received = _work_here(store, min(args.workers or 1, todo), args.max_failures, logs, args.group)
  left = f'the workers ended with cells left to do; their last words:\n{_tail(logs)}'
  return _end(args, store, ids, received, 'interrupted: the same command resumes', left)


def _end(
  args: argparse.Namespace, store: ledger.Ledger, ids: set[str], received: list[int], stopped: str, left: str
) -> int:
  """Says how the cells of this grid ended, and whether the launch was `stopped` or cells are `left`."""
  code = _verdict(store, ids, args.max_failures)
  if received:
    print(stopped)
    return 128 + received[0]
  if any(s.state in schema.UNFINISHED for s in store.states(args.max_failures)):
    print(left)
  return code


if __name__ == '__main__':
  main()
