"""How cells get run. An executor's view is only a hint: what is done stands in the ledger.

An engine starts one command, the same everywhere. This package says how many processes, where and for how long. An engine
that is not used needs nothing installed.
"""

import dataclasses
from typing import Protocol

MAX_PREEMPTIONS = 100


@dataclasses.dataclass(frozen=True)
class Job:
  """A gang of `hosts * processes_per_host` equal processes to keep running until one ends for good.

  Attributes:
    id: names the job for its engine. A second submit of one id does nothing while the first is alive.
    argv: the command of every process.
    env: added to the environment.
    walltime_s: limit of one attempt; None leaves it to the engine.
    grace_s: between SIGTERM and SIGKILL.
    max_restarts: how often the gang may be started again. What counts differs:
      local: restarts after `PREEMPTED`. Of others the driver decides (`launch.Restarts`).
      Slurm: every run but the first, also when Slurm itself requeued the job. The script requeues after `PREEMPTED` and
        after crashes, and of crashes at most `slurm.MAX_CRASHES`.
      JobSet: restarts after crashes and lost nodes. Those after `PREEMPTED` are free and have no limit.
      xpk: every restart, after `PREEMPTED` too.
  """

  id: str
  argv: tuple[str, ...]
  env: dict[str, str] = dataclasses.field(default_factory=dict)
  hosts: int = 1
  processes_per_host: int = 1
  walltime_s: int | None = None
  grace_s: int = 120
  max_restarts: int = MAX_PREEMPTIONS


class Executor(Protocol):
  """How jobs get run."""

  def submit(self, job: Job) -> str:
    """Starts or queues a job and returns its id; nothing happens when a job of that id is alive."""
    ...

  def states(self, ids: list[str]) -> dict[str, str]:
    """'pending', 'running' or 'gone' by id."""
    ...

  def cancel(self, job_id: str) -> None:
    """Asks a job to save and end; asked again, ends it. Nothing happens when it is gone."""
    ...
