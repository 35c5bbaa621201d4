"""Several processes as one program: joining the gang, stopping together, and never leaving a half-dead one.

A Python exception in one rank can leave the others waiting in a collective for ever. So a rank that raises ends at once,
the coordination service ends the others, and the engine restarts the gang.
"""

import atexit
import os
import signal
import socket
import sys
import threading
import traceback
import types
from collections.abc import Mapping
from typing import Any

import jax

# The coordination service's store has no public name yet; jax is pinned to one minor version.
from jax._src import distributed as _jax_distributed
from jax._src.clusters import cloud_tpu_cluster

from sae_jax import flags
from sae_jax.errors import UserError, end_at_once
from sae_jax.signals import Signalled

_ADDRESS, _COUNT, _RANK = 'JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID'
_INDEX = 'JOB_COMPLETION_INDEX'  # what Kubernetes tells the pods of an indexed Job, so of a JobSet
_HEARTBEAT = 'SAE_JAX_HEARTBEAT_S'
# What jax ends a process with when a rank is gone: engines restart the gang, within a budget.
BROKEN = 128 + signal.SIGABRT
_service: list[Any] = []  # the preemption service of a gang of several processes
_START_S = 300  # hosts of one gang may pull their image minutes apart


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
  """Joins the other processes of this run, if there are any; call before any device is used.

  Stated by the arguments, or by JAX_COORDINATOR_ADDRESS=host:port, JAX_NUM_PROCESSES and JAX_PROCESS_ID (in a
  Kubernetes Job the last may be left to JOB_COMPLETION_INDEX). Otherwise a Slurm step of several tasks and a TPU
  machine are detected. A rank that is dead for SAE_JAX_HEARTBEAT_S (20) ends the others. Raises `UserError` for an
  incomplete or impossible statement.
  """
  limits = dict(initialization_timeout=_START_S, heartbeat_timeout_seconds=heartbeat_s(), shutdown_timeout_seconds=20)
  stated = stated_gang(os.environ, coordinator, num_processes, process_id)
  if stated is not None:
    jax.distributed.initialize(**stated, **limits)
  elif int(os.environ.get('SLURM_STEP_NUM_TASKS', '1')) > 1 or _on_tpu_machine():
    jax.distributed.initialize(**limits)
  elif jax.config.jax_num_cpu_devices > 1:
    # One process with several CPU devices would reduce in another order than gloo does between processes: joined to
    # itself it uses gloo too, and one process and many end with the same bits.
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      address = f'127.0.0.1:{free.getsockname()[1]}'
    jax.distributed.initialize(address, num_processes=1, process_id=0, **limits)
  if jax.process_count() > 1:
    _take_preemption_service()
    sys.excepthook = _end_at_once
    threading.excepthook = lambda hook: _end_at_once(hook.exc_type, hook.exc_value, hook.exc_traceback)


def heartbeat_s() -> int:
  """How long a rank may be silent before the others end."""
  return flags.whole(_HEARTBEAT)(os.environ.get(_HEARTBEAT, '20'))


def stated_gang(
  environ: Mapping[str, str],
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
) -> dict[str, Any] | None:
  """The gang that arguments or, where they are missing, variables state, as `jax.distributed.initialize` takes it.

  None when nothing is stated: an address alone names no gang. Raises `UserError` for half a statement.
  """
  address = coordinator or environ.get(_ADDRESS)
  count = environ.get(_COUNT) if num_processes is None else num_processes
  rank = environ.get(_RANK) if process_id is None else process_id
  if count is None and rank is None and not coordinator:
    return None
  rank = environ.get(_INDEX) if rank is None else rank
  missing = [
    f'{flag} ({name})'
    for flag, name, value in (
      ('--coordinator', _ADDRESS, address),
      ('--num_processes', _COUNT, count),
      ('--process_id', _RANK, rank),
    )
    if value is None
  ]
  if address is None or count is None or rank is None:
    raise UserError(f'a gang needs {", ".join(missing)} beside what is given; state all three or none')
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal():
    raise UserError(f'coordinator {address!r} is not HOST:PORT; give e.g. 10.0.0.1:8476')
  count, rank = flags.whole('num_processes')(count), flags.whole('process_id', 0)(rank)
  if rank >= count:
    raise UserError(f'process_id {rank} is not below num_processes {count}; ranks count from 0')
  return {'coordinator_address': address, 'num_processes': count, 'process_id': rank}


def stop_flag() -> 'Vote | Signalled':
  """A function to poll after every step: true once the run was asked to stop (SIGTERM, or SIGINT on one process).

  Among several processes it is a vote: all see true at the same step, whichever of them got the signal. Call from
  the main thread, and poll equally often on every process.
  """
  if jax.process_count() > 1:
    return Vote()
  return Signalled()


class Vote:
  """Asks whether this gang was told to stop; every rank hears yes at the same `polls`.

  The preemption service that `initialize` started has SIGTERM; a handler of ours would take it away. A rank that
  polls while the others do not must bring them to its `polls` before they go on together.
  """

  signum: int | None = None  # which signal it was is not part of the vote

  def __init__(self) -> None:
    self.polls = 0
    self._stopped = self._asked = False

  def __call__(self) -> bool:
    self.polls += 1
    self._stopped = self._stopped or _service[0].reached_sync_point(self.polls)
    return self._stopped

  def ask(self) -> None:
    """Has all ranks stop at one step, as a SIGTERM to this one would."""
    if not self._asked:
      self._asked = True
      os.kill(os.getpid(), signal.SIGTERM)


def tell(key: str, value: str) -> None:
  """Says something to every rank of the gang, once a key; no device takes part, so that a hung one does not matter."""
  _store().key_value_set(key, value)


def hear(key: str, timeout_s: float = 0.0) -> str | None:
  """What a rank told under `key`, or None when nothing came within the timeout."""
  try:
    if timeout_s <= 0:
      return _store().key_value_try_get(key)
    return _store().blocking_key_value_get(key, round(1000 * timeout_s))
  except jax.errors.JaxRuntimeError as error:
    if any(status in str(error) for status in ('DEADLINE_EXCEEDED', 'NOT_FOUND')):
      return None
    raise


def _take_preemption_service() -> None:
  """Keeps the service from Orbax, whose thread that ends a save polls it too, with the number of the saved step.

  The service takes every number for how far this rank is. After such a poll a SIGTERM stopped the ranks at different
  steps, and the gang crashed in its next collective.
  """
  state = _jax_distributed.global_state
  _service.append(state.preemption_sync_manager)
  state.preemption_sync_manager = None  # Orbax then sees a service that is switched off

  def give_back() -> None:
    state.preemption_sync_manager = _service.pop()  # jax shuts it down before the client that it depends on

  atexit.register(give_back)  # runs before jax's own, which was registered earlier


def _store() -> Any:
  client = _jax_distributed.global_state.client
  assert client is not None, 'initialize() makes the gang'
  return client


def _on_tpu_machine() -> bool:
  """Whether jax finds the gang itself: from GKE's variables, or from the metadata of a TPU machine."""
  if (os.environ.get('JAX_PLATFORMS') or 'tpu').split(',')[0] != 'tpu':
    return False
  return any(cluster.is_env_present() for cluster in (cloud_tpu_cluster.GkeTpuCluster, cloud_tpu_cluster.GceTpuCluster))


def lost_peer(error: BaseException | None) -> bool:
  """Whether an error speaks of a rank that is gone rather than of this program.

  'Gloo AllGather failed: ... Connection reset by peer', status UNKNOWN, is what a survivor on CPUs raises at once when
  another rank is killed, before the coordination service has noticed. The other words have not been seen here.
  """
  words = ('Gloo', 'NCCL', 'Connection reset', 'UNAVAILABLE', 'DEADLINE_EXCEEDED')
  return isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in words)


def _end_at_once(kind: type[BaseException], error: BaseException | None, trace: types.TracebackType | None) -> None:
  traceback.print_exception(kind, error, trace)
  end_at_once(BROKEN if lost_peer(error) else 1)
