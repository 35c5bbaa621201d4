"""Runs jobs as processes of this machine: pinned to its GPUs, restarted within a budget, gone when the driver goes."""

import ctypes
import dataclasses
import functools
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable

from sae_jax import lease
from sae_jax.errors import PREEMPTED
from sweeps.executors import Job

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == 'linux' else None  # loaded here: little is safe after a fork


@dataclasses.dataclass
class _Running:
  job: Job
  process: subprocess.Popen
  started: int  # `lease.process_start` of the process
  preemptions: int = 0
  cancelled: bool = False


class Local:
  """The executor interface (`submit`, `states`, `cancel`) on subprocesses.

  Args:
    logs: folder for one log a job, appended to.
    may_restart: asked with (pid, `lease.process_start`, exit code) after a process ended other than by 0 or 42. It also
      charges the failure.
  """

  def __init__(self, logs: pathlib.Path, may_restart: Callable[[int, int, int], bool]):
    self._logs, self._may_restart = logs, may_restart
    self._running: dict[str, _Running] = {}

  def submit(self, job: Job) -> str:
    """Starts a job, unless one of that id is known already."""
    if job.id not in self._running:
      self._running[job.id] = _Running(job, *self._start(job))
    return job.id

  def states(self, ids: list[str]) -> dict[str, str]:
    """'running' or 'gone' by id, after restarting what ended and may be restarted."""
    return {job_id: self._state(self._running[job_id]) if job_id in self._running else 'gone' for job_id in ids}

  def cancel(self, job_id: str) -> None:
    """Asks the job to save and end; asked again, kills it."""
    running = self._running.get(job_id)
    if running is not None and running.process.poll() is None:
      running.process.send_signal(signal.SIGKILL if running.cancelled else signal.SIGTERM)
    if running is not None:
      running.cancelled = True

  def log(self, job_id: str) -> pathlib.Path:
    return self._logs / f'{job_id}.log'

  def _state(self, running: _Running) -> str:
    code = running.process.poll()
    if code is None:
      return 'running'
    if running.cancelled or code == 0:
      return 'gone'
    if code == PREEMPTED:
      running.preemptions += 1
      restart = running.preemptions <= running.job.max_restarts
    else:
      restart = self._may_restart(running.process.pid, running.started, code)
    if not restart:
      running.cancelled = True  # asked once: the answer has been charged for
      return 'gone'
    running.process, running.started = self._start(running.job)
    return 'running'

  def _start(self, job: Job) -> tuple[subprocess.Popen, int]:
    self._logs.mkdir(parents=True, exist_ok=True)
    with open(self.log(job.id), 'ab') as log:
      process = subprocess.Popen(
        job.argv,
        env=os.environ | job.env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        # Out of the terminal's process group: Ctrl-C reaches the driver alone, which asks the workers to save.
        start_new_session=True,
        preexec_fn=functools.partial(_end_with_parent, os.getpid()) if _LIBC else None,
      )
    return process, lease.process_start(process.pid)


def device_env(worker: int, workers: int) -> dict[str, str]:
  """Variables that give one of several workers its part of this machine's GPUs; none where there is nothing to share."""
  stated = os.environ.get('CUDA_VISIBLE_DEVICES')
  found = sorted((path.name.removeprefix('nvidia') for path in pathlib.Path('/dev').glob('nvidia[0-9]*')), key=int)
  gpus = found if stated is None else [name for name in stated.split(',') if name.strip()]
  if workers == 1 or not gpus or os.environ.get('JAX_PLATFORMS') == 'cpu':
    return {}
  each = max(1, len(gpus) // workers)
  first = worker * each % len(gpus)
  env = {'CUDA_VISIBLE_DEVICES': ','.join(gpus[first : first + each])}
  sharing = -(-workers // len(gpus))
  # Without this the first of several workers on one GPU takes three quarters of its memory.
  return env | ({'XLA_PYTHON_CLIENT_MEM_FRACTION': f'{0.9 / sharing:.2f}'} if sharing > 1 else {})


def _end_with_parent(parent: int) -> None:
  """In the child: SIGTERM (save and leave) when the driver dies, even by kill -9."""
  assert _LIBC is not None
  _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
  if os.getppid() != parent:  # it died before the line above
    os._exit(128 + signal.SIGTERM)
