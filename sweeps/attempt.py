"""One attempt at the cells that a worker holds: it trains them under their leases and records how each ended."""

import contextlib
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from sae_jax import cell_state, faults, lease, metrics, watchdog
from sae_jax.errors import HOST_BROKEN, PREEMPTED, USER_ERROR_EXIT, UserError
from sweeps import grid, ledger

if TYPE_CHECKING:
  from sweeps import gang  # loads jax, which drivers and status do without

TrainGroup = Callable[..., list]  # sae_jax.training.train_group
Held = Sequence[tuple[ledger.Entry, lease.Lease]]


class Stalled(Exception):
  """Stands in failure.json for the end of a worker whose training no longer moved."""


def attempt(
  store: ledger.Ledger,
  train_group: TrainGroup,
  held: Held,
  *,
  stop: Callable[[], bool],
  permanent: tuple[type[Exception], ...],
  verdict: Callable[[], int | None],
  leader: 'gang.Leader | None' = None,
) -> bool:
  """Trains cells together under their leases, and records the failure of each that fails. The leases end here.

  When one cell is cancelled, all save and stop, and the rest form a new group. An error of the whole attempt counts for
  each of its cells; they are then tried alone. A stall is recorded and ends the process.

  Returns:
    Whether there was an error of the whole attempt. A gang (`leader`) has to be ended then: its ranks may be anywhere.

  Raises:
    LeaseLost: another worker took over.
    UserError: the disk is full. No cell is charged for that.
    Exception: an error of the machine (`faults.is_host_error`), as it is. No cell is charged; this process must end.
  """
  group = f' in a group of {len(held)}' if len(held) > 1 else ''
  label = f'{len(held)} cells' if group else grid.label(held[0][0].overrides)
  once = threading.Lock()  # taken by whichever thread ends this process first, and never released

  def say(entry: ledger.Entry, what: str) -> None:
    print(f'cell {entry.id} {grid.label(entry.overrides)}: {what}', flush=True)

  def record(entry: ledger.Entry, lease_: lease.Lease, error: Exception) -> None:
    lease_.check(fresh=True)
    metrics.record_failure(store.folder(entry.id), error, permanent=isinstance(error, permanent))
    say(entry, f'failed, {type(error).__name__}: {cell_state.printable(str(error))}')

  def charge(error: Exception) -> int:
    """Records an error of the whole attempt, and returns the exit code. This process ends after it."""
    once.acquire()
    if faults.is_disk_full(error):
      print(f'error: {_disk_full(store)}', file=sys.stderr, flush=True)
      return USER_ERROR_EXIT
    if faults.is_host_error(error):
      print(host_broken(store, error), file=sys.stderr, flush=True)
      for _, lease_ in held:
        lease_.release()
      return HOST_BROKEN
    try:
      for entry, lease_ in held:
        record(entry, lease_, error)
    except lease.LeaseLost:
      return PREEMPTED
    for _, lease_ in held:
      lease_.release()
    code = verdict()
    return PREEMPTED if code is None else code

  def stalled(why: str) -> None:
    # In a thread of its own: what hangs may be the filesystem of the ledger.
    recording = threading.Thread(target=charge, args=(Stalled(why),), daemon=True)
    recording.start()
    recording.join(timeout=10.0)
    watchdog.end(why, leader and leader.disband)

  with contextlib.ExitStack() as leases:
    for entry, lease_ in held:
      leases.enter_context(lease_)
      say(entry, f'starts{group}')
    together = leader.training([entry for entry, _ in held], label, charge) if leader else contextlib.nullcontext()
    try:
      with together, watchdog.Watchdog(stalled) as alive:

        def should_stop() -> bool:
          alive.beat()
          for _, lease_ in held:
            lease_.check()
          cancelled = any(lease_.cancelled for _, lease_ in held)
          if cancelled and leader is not None:
            leader.call_vote()
          return stop() or (cancelled and leader is None)

        def before_write() -> None:
          for _, lease_ in held:
            lease_.check(fresh=True)

        outcomes = train_group(
          [(entry.cell, store.folder(entry.id)) for entry, _ in held],
          should_stop=should_stop,
          before_write=before_write,
          label=label,
        )
    except lease.LeaseLost:
      raise
    except Exception as error:  # whatever cells raise is theirs: the sweep goes on
      if leader is not None:
        leader.outlive(error)
      if faults.is_disk_full(error):
        raise UserError(_disk_full(store)) from error
      if faults.is_host_error(error):
        raise
      for entry, lease_ in held:
        record(entry, lease_, error)
      return True
    for (entry, lease_), outcome in zip(held, outcomes, strict=True):
      if isinstance(outcome, Exception):
        record(entry, lease_, outcome)
      else:
        say(entry, f'{outcome}, cancelled' if lease_.cancelled and outcome == 'preempted' else outcome)
  return False


def host_broken(store: ledger.Ledger, error: BaseException) -> str:
  """The last line of a worker that ends after an error of its machine."""
  what = cell_state.printable(f'{type(error).__name__}: {error}')
  return (
    f'{store.path}: this worker ends after an error of its machine, which no cell is charged for ({what}); ended with '
    f'exit code {HOST_BROKEN} for a fresh start'
  )


def _disk_full(store: ledger.Ledger) -> str:
  return f'{store.path}: no space left on the device; free some (python -m sweeps.gc) and start again: it resumes'
