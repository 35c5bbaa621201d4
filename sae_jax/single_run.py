"""A single run: one cell trained in a folder of its own, with the lease, the signals and the exit codes of a command."""

import contextlib
import errno
import functools
import signal
import sys
import time
from collections.abc import Callable

import jax

from sae_jax import cell_state, distributed, faults, files, lease, metrics, notes, schema, watchdog
from sae_jax.config import Cell
from sae_jax.errors import HOST_BROKEN, PREEMPTED, BrokenFile, UserError, end_at_once
from sae_jax.member import Diverged


def run(config: Cell, workdir: str, train: Callable[..., str]) -> int:
  """Trains a cell by `train` under the lease of its folder; returns the exit code.

  A failure is recorded in the folder. Raises `UserError` for a cell that cannot be trained here, and what `train` raises.
  """
  held = _claim(workdir)
  try:
    with held or contextlib.nullcontext(), watchdog.Watchdog() as alive:
      for line in notes.of(config) if jax.process_index() == 0 else ():
        print(f'note: {line}', file=sys.stderr)
      flag = distributed.stop_flag()
      asked = alive.beating(flag)

      def should_stop() -> bool:
        if held is not None:
          held.check()
          if held.cancelled:
            flag.ask()
        return asked()

      before_write = functools.partial(held.check, fresh=True) if held is not None else None
      try:
        outcome = train(config, workdir, should_stop=should_stop, before_write=before_write)
      except Exception as error:
        # One attempt, however many processes, and none when another rank died or the machine is at fault.
        blameless = isinstance(error, lease.LeaseLost | BrokenFile) or faults.is_host_error(error)
        if held is not None and not blameless and not distributed.lost_peer(error):
          held.check(fresh=True)
          metrics.record_failure(workdir, error, permanent=isinstance(error, Diverged))
        raise
  except lease.LeaseLost as error:
    print(f'lease lost: {error}', file=sys.stderr)
    end_at_once(PREEMPTED)
  except Exception as error:
    if isinstance(error, Diverged):
      raise UserError(str(error)) from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(f'{workdir}: {error.strerror}; free some space and start again: it resumes') from error
    if faults.is_host_error(error):
      what = cell_state.printable(f'{type(error).__name__}: {error}')
      print(f'error: this machine cannot go on ({what}); mend it and start again: it resumes', file=sys.stderr)
      end_at_once(HOST_BROKEN)
    raise
  if outcome == 'preempted' and held is not None and held.cancelled:
    undo = 'after python -m sweeps.cancel --undo the same command resumes'
    print(f'{config.id}: cancelled, checkpoint saved; {undo}', file=sys.stderr)
    return PREEMPTED
  if outcome == 'preempted':
    print(f'{config.id}: preempted, checkpoint saved; the same command resumes', file=sys.stderr)
    return 128 + signal.SIGINT if flag.signum == signal.SIGINT else PREEMPTED
  print(files.read(files.join(workdir, schema.RESULT)).decode(), end='')
  return 0


def _claim(workdir: str) -> lease.Lease | None:
  """The lease of a cell's folder for this run; None for a finished cell, and in every process but the first.

  Of a holder of this machine it is known whether it lives. One of another machine is watched until its lease changes or is
  stale. Raises `UserError` when another process trains the cell, and when it is cancelled.
  """
  refused, held = '', None
  if jax.process_index() == 0 and not files.exists(files.join(workdir, schema.RESULT)):
    if files.exists(files.join(workdir, schema.CANCEL)):
      refused = f'{workdir} is cancelled; python -m sweeps.cancel --undo takes it up again'
    observer, first = lease.Observer(), None
    while not refused and (held := observer.claim(workdir)) is None:
      holder = observer.holder(workdir)
      elsewhere = holder is not None and (holder['pid_space'] or 'unknown') != lease.pid_space()
      if first is None and holder is not None and elsewhere:
        print(
          f'{workdir}: waiting up to 90 s to see whether {lease.name_of(holder)} still trains it',
          file=sys.stderr,
        )
        first = holder
      elif holder is not None and holder != first:
        refused = f'{workdir} is being trained by {lease.name_of(holder)}; wait for it or stop it'
      else:
        time.sleep(1.0)
  if jax.process_count() > 1:
    key = 'train/refused'
    if jax.process_index() == 0:
      distributed.tell(key, refused or '-')
    while not (said := distributed.hear(key, timeout_s=60)):
      pass
    refused = said.removeprefix('-')
  if refused:
    raise UserError(refused)
  return held
