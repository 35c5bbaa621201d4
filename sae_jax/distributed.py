"""Several processes as one program: joining the gang, stopping together, and never leaving a half-dead one.

One process is joined too many when something fails: a Python exception in one rank leaves the others waiting in a
collective (3 of 5 trials past 50 s), so a rank that raises ends at once and the engine restarts the gang.
"""

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable

import jax
from jax.experimental import multihost_utils

from sae_jax.errors import UserError

_ADDRESS, _COUNT, _RANK = 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'


def initialize() -> None:
  """Joins the other processes of this run, if there are any; call before any device is used.

  Explicit: JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Otherwise a Slurm step of
  several tasks is detected. Raises `UserError` for an incomplete explicit address.
  """
  limits = dict(initialization_timeout=60, heartbeat_timeout_seconds=20, shutdown_timeout_seconds=20)
  if _COUNT in os.environ or _RANK in os.environ:
    missing = [name for name in (_ADDRESS, _COUNT, _RANK) if name not in os.environ]
    if missing:
      raise UserError(
        f'{", ".join(missing)} not set beside the other JAX_* variables of this run; set all three'
      )
    jax.distributed.initialize(
      os.environ[_ADDRESS], num_processes=int(os.environ[_COUNT]), process_id=int(os.environ[_RANK]), **limits
    )
  elif int(os.environ.get('SLURM_STEP_NUM_TASKS', '1')) > 1:
    jax.distributed.initialize(**limits)
  elif jax.config.jax_num_cpu_devices > 1:
    # One process with several CPU devices would reduce in another order than gloo does between processes: joined to
    # itself it uses gloo too, and one process and many end with the same bits.
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{free.getsockname()[1]}'
    jax.distributed.initialize(address, num_processes=1, process_id=0, **limits)
  if jax.process_count() > 1:
    sys.excepthook = _end_at_once
    threading.excepthook = lambda hook: _end_at_once(hook.exc_type, hook.exc_value, hook.exc_traceback)


def stop_flag() -> Callable[[], bool]:
  """A function to poll after every step: true once the run was asked to stop (SIGTERM, or SIGINT on one process).

  Among several processes it is a vote: all see true at the same step, whichever of them got the signal. Call from
  the main thread, and poll equally often on every process.
  """
  if jax.process_count() > 1:
    # The preemption service that `initialize` started has SIGTERM; a handler of ours would take it away.
    polls = iter(range(1, sys.maxsize))
    return lambda: multihost_utils.reached_preemption_sync_point(next(polls))
  stopping = threading.Event()
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: stopping.set())
  return stopping.is_set


def _end_at_once(kind, error, trace) -> None:
  traceback.print_exception(kind, error, trace)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(1)
