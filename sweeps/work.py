"""A worker: claims and trains cells until none is left. It is the same command on every host of a pod or cluster.

python -m sweeps.work --ledger=DIR [--cell=ID[,ID...]]

The largest cells come first, so that the sweep does not end waiting for one. A worker also waits for the cells that others
are training: when one of those workers dies, its cell must be picked up.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from sae_jax import faults, files, flops, lease, schema, signals
from sae_jax.errors import HOST_BROKEN, PREEMPTED, USER_ERROR_EXIT, UserError, end_at_once, one_line_errors
from sae_jax.flags import whole
from sweeps import flags, groups, ledger
from sweeps.attempt import Held, TrainGroup, attempt, host_broken

if TYPE_CHECKING:
  from sweeps import gang  # loads jax, which drivers and status do without

SOME_FAILED = 1


class Stop(signals.Signalled):
  """Turns the first SIGTERM or SIGINT into a request to save and leave. The second one kills."""

  def hand_over(self) -> None:
    """Leaves SIGTERM to the vote of a gang, and passes on what came so far and every Ctrl-C."""
    signal.signal(signal.SIGINT, self._pass_on)
    if self.signum is not None:
      self._pass_on(self.signum, None)

  def _hear(self, signum: int, frame: object) -> None:
    self.signum = signum
    for again in signals.STOP:
      signal.signal(again, signal.SIG_DFL)

  def _pass_on(self, signum: int, _: object) -> None:
    self.signum = signum
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


def run(
  store: ledger.Ledger,
  train_group: TrainGroup,
  *,
  stop: Callable[[], bool],
  only: Collection[str] = (),
  permanent: tuple[type[Exception], ...] = (),
  max_failures: int = ledger.MAX_FAILURES,
  poll_s: float = 5.0,
  leader: 'gang.Leader | None' = None,
  group: int | None = None,
) -> int:
  """Trains cells until none is left to train, or `stop` becomes true.

  An exception in one attempt is recorded in its cells, and other cells go on. After a `UserError` or one of `permanent` a
  cell is not tried again. With a `leader` such an exception also ends the whole gang, for a fresh start.

  Args:
    store: the ledger.
    train_group: trains some cells together; see `sae_jax.training.train_group`.
    stop: asked after every step and between cells.
    only: ids of the cells to train; all when empty.
    permanent: exceptions that would come again.
    max_failures: attempts of a cell.
    poll_s: least time between two looks at the ledger while others train what is left.
    leader: of a worker of several processes.
    group: how many cells of one stream train together; see `groups.most` for None.

  Returns:
    The exit code: 0 when all cells are done, 1 when all have ended and some are not done, 42 after `stop`.

  Raises:
    LeaseLost: another worker took over a cell in training. This process must end without touching it again.
    UserError: the disk is full, or `only` names no cell of this ledger.
    Exception: an error of the machine (`faults.is_host_error`), as it is. No cell is charged; this process must end.
  """
  store.check_known(sorted(only))

  def states() -> list[ledger.EntryState]:
    return [s for s in store.states(max_failures) if not only or s.entry.id in only]

  def verdict() -> int | None:
    return _verdict(states())

  # A look at all cells gives the order in which they are tried. The next look is due once all of them have been tried, or
  # when cells were added. With a look before each try the work would grow with the square of the cells.
  waiting: list[ledger.EntryState] = []
  listed: list[ledger.Entry] | None = None
  nap_s = poll_s
  while not stop():
    looked = False
    try:
      if not waiting or store.entries() is not listed:
        looked, began = True, time.process_time()
        listed, found = store.entries(), states()
        nap_s = ledger.nap_s(poll_s, time.process_time() - began)
        if (code := _verdict(found)) is not None:
          return code
        waiting = sorted((s for s in found if s.state == schema.WAITING), key=_precedence)
      held = _claim(store, waiting, group, max_failures)
    except OSError as error:
      if files.is_local(store.path):
        raise
      # A bucket that does not answer for minutes is no reason to give up a slice.
      print(f'{store.path}: {error}; trying again', file=sys.stderr, flush=True)
      looked, held = True, []
    if not held:
      sleep(nap_s if looked else 0.0, stop)
      continue
    broken = attempt(store, train_group, held, stop=stop, permanent=permanent, verdict=verdict, leader=leader)
    if broken and leader is not None:
      code = verdict()
      leader.disband(PREEMPTED if code is None else code)
  return PREEMPTED


def command(store: ledger.Ledger, max_failures: int, group: int | None) -> tuple[str, ...]:
  """What starts a worker."""
  argv = (sys.executable, '-m', 'sweeps.work', f'--ledger={store.path}', f'--max_failures={max_failures}')
  return argv if group is None else (*argv, f'--group={group}')


def _claim(store: ledger.Ledger, waiting: list[ledger.EntryState], group: int | None, max_failures: int) -> Held:
  """The first of `waiting` that can be had, with those that can train beside it; empty when none can be had.

  What was tried is taken off the list.
  """

  def claimed(s: ledger.EntryState) -> lease.Lease | None:
    # The look may be old. A cell that has failed since has another place in the order.
    now = store.state(s.entry, max_failures)
    return store.claim(s.entry.id) if (now.state, now.attempts) == (schema.WAITING, s.attempts) else None

  while waiting:
    first = waiting.pop(0)
    if (taken := claimed(first)) is None:
      continue
    others = groups.companions(store, first, waiting, groups.most(first.entry.cell, group) - 1)
    for s in others:
      waiting.remove(s)
    return [(first.entry, taken)] + [(s.entry, t) for s in others if (t := claimed(s))]
  return []


def _verdict(states: list[ledger.EntryState]) -> int | None:
  """The exit code once nothing is left to do."""
  if any(s.state in schema.UNFINISHED for s in states):
    return None
  return 0 if all(s.state in schema.FINISHED for s in states) else SOME_FAILED


def _precedence(state: ledger.EntryState) -> tuple[int, float, str]:
  """Fresh cells before failed ones, then the most expensive."""
  return state.attempts, -flops.cell_flops(state.entry.cell)['dense'], state.entry.id


def sleep(seconds: float, stop: Callable[[], bool]) -> None:
  """Sleeps, but no longer than until `stop` is true. In short naps: Python sleeps on after a signal handler has run."""
  until = time.monotonic() + seconds
  while time.monotonic() < until and not stop():
    time.sleep(min(0.2, seconds))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m sweeps.work',
    description='Claim and train the unfinished cells of a ledger until none is left. Started with the same command '
    'on every host of a Slurm step, a JobSet or a TPU slice, the processes train each cell together.',
    epilog='Exit codes: 0 all done, 1 some failed for good or were cancelled, 42 stopped by SIGTERM with a checkpoint '
    '(start it again), 130 by Ctrl-C, 142 no progress (SAE_JAX_STALL_S, 600 s), 135 an error of the machine such as too many open files, 128+n another '
    'signal.',
  )
  parser.add_argument('--ledger', required=True, help='folder or fsspec URL that sweeps.launch has filled')
  parser.add_argument('--cell', metavar='ID[,ID...]', default='', help='train these cells only')
  flags.add_group(parser)
  flags.add_max_failures(parser)
  together = parser.add_argument_group(
    'several processes', 'Detected on Slurm and TPU slices; elsewhere stated here or by the variables named.'
  )
  together.add_argument('--coordinator', metavar='HOST:PORT', help='of process 0 (JAX_COORDINATOR_ADDRESS)')
  together.add_argument(
    '--num_processes',
    type=whole('--num_processes'),
    metavar='N',
    help='of the gang (JAX_NUM_PROCESSES)',
  )
  together.add_argument(
    '--process_id',
    type=whole('--process_id', 0),
    metavar='I',
    help='of this one, from 0 (JAX_PROCESS_ID)',
  )
  return parser


@one_line_errors
def main(argv: list[str]) -> int:
  stop = Stop()  # before the heavy imports: a signal in those seconds must not be lost
  args = _parser().parse_args(argv)
  store = ledger.Ledger(args.ledger)
  store.entries()

  import jax

  from sae_jax import distributed, heap, training
  from sweeps import gang

  # Cells of one shape compile once for all workers and restarts. A cache that the environment names is used instead.
  if not jax.config.jax_compilation_cache_dir:
    cache = files.join(store.path, 'compile_cache')
    jax.config.update('jax_compilation_cache_dir', str(files.local(cache)) if files.is_local(cache) else cache)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  heap.one_arena()
  distributed.initialize(args.coordinator, args.num_processes, args.process_id)
  leader, asked = None, stop
  if jax.process_count() > 1:
    stop.hand_over()
    asked = distributed.Vote()
    if jax.process_index():
      return gang.follow(training.train_group, store, asked)
    leader = gang.Leader(asked)
  else:
    stop.listen()  # `jax.distributed.initialize` has a use for SIGTERM of its own
  try:
    code = run(
      store,
      training.train_group,
      stop=asked,
      only=[i for i in args.cell.split(',') if i],
      permanent=(training.Diverged,),
      max_failures=args.max_failures,
      leader=leader,
      group=args.group,
    )
  except Exception as error:
    if isinstance(error, lease.LeaseLost):
      said, code = f'lease lost: {error}', PREEMPTED
    elif faults.is_host_error(error):
      said, code = host_broken(store, error), HOST_BROKEN
    elif leader is not None and isinstance(error, UserError):
      said, code = f'error: {error}', USER_ERROR_EXIT
    else:
      raise
    print(said, file=sys.stderr, flush=True)
    (leader.disband if leader is not None else end_at_once)(code)
  if leader is not None:
    leader.dismiss(code)
  return 128 + signal.SIGINT if code == PREEMPTED and stop.signum == signal.SIGINT else code


if __name__ == '__main__':
  main()
