"""How cells get run. An executor's view is only a hint: what is done stands in the ledger.

One command, the same everywhere, is all that an engine ever starts; this package says how many processes, where and
for how long. An engine that is not used needs nothing installed.
"""

import dataclasses
from typing import Protocol

MAX_PREEMPTIONS = 100


@dataclasses.dataclass(frozen=True)
class Job:
  """A gang of `hosts * processes_per_host` equal processes to keep running until one ends for good.

  `id` names the job for its engine: a second submit of the same id does nothing while the first is alive. `env` is
  added to the environment. `walltime_s` None leaves the limit to the engine. `grace_s` is the time between SIGTERM
  and SIGKILL. `max_restarts` bounds the restarts after `PREEMPTED`; on JobSets, where these are free, all others.
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
