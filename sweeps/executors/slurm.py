"""Jobs as Slurm batch jobs: sbatch for the gang, srun for its processes, requeued until one ends for good.

The batch script restarts the gang by itself, so the driver that submitted it may die. What differs between clusters
(partition, account, GPUs of a node, modules to load) is in a site file:

    partition = "gpu"
    gres = "gpu:{tasks}"            # {tasks}: processes on the node
    tasks_per_node = 8              # at most; on GPUs the GPUs of a node, for JAX takes one GPU a process
    time = "1-00:00:00"
    setup = ["module load cuda"]
"""

import dataclasses
import os
import pathlib
import shlex
import subprocess
import time
import tomllib

from sae_jax.errors import PREEMPTED, UserError
from sweeps.executors import Job

MAX_CRASHES = 3  # ends by a signal that nobody sent on purpose; so a lost process is tried again, a crash loop is not
_PENDING = {
  'PENDING',
  'CONFIGURING',
  'REQUEUED',
  'REQUEUE_FED',
  'REQUEUE_HOLD',
  'RESV_DEL_HOLD',
  'SPECIAL_EXIT',
}
_ENDED = {
  'BOOT_FAIL',
  'CANCELLED',
  'COMPLETED',
  'DEADLINE',
  'FAILED',
  'NODE_FAIL',
  'OUT_OF_MEMORY',
  'PREEMPTED',
  'REVOKED',
  'TIMEOUT',
}
_WAITS_S = (2, 10, 30)  # a controller that has answered before is given the time to restart
# Variables that the user's shell or an enclosing job may set. They would change what the commands below ask for.
_FOREIGN = ('SBATCH_', 'SRUN_', 'SQUEUE_', 'SCANCEL_', 'SLURM_')

# Each process notes how it ended, because the verdict on the gang is its first bad end. srun would give the largest code,
# and that may be the 143 of a process that it stopped itself.
# The trap lets the noting outlive a SIGTERM to all processes: bash runs a trap only after what it waits for has ended. The
# process itself gets the default reaction to SIGTERM back.
_RANK = 'trap : TERM; "$@"; code=$?; [ $code = 0 ] || echo "${SLURM_RESTART_COUNT:-0} $code" >> "$ENDS"; exit $code'

_SCRIPT = """\
run=${{SLURM_RESTART_COUNT:-0}} told=1 cancelled=
trap 'told=1' TERM
trap 'told=1; cancelled=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
{srun} &
step=$!
while [ "$told" ]; do told=; wait "$step"; code=$?; done  # a signal ends a wait, and the processes are still saving
first=$(awk -v run="$run" '$1 == run {{ print $2; exit }}' "$ENDS" 2>/dev/null)
code=${{first:-$code}}
crashes=$(awk '!seen[$1]++ && $2 > 128 {{ n++ }} END {{ print n + 0 }}' "$ENDS" 2>/dev/null)
echo "$(date -u +%FT%TZ) run $run on $SLURM_JOB_NODELIST ended with exit code $code"
if [ -z "$cancelled" ] && [ "$run" -lt {max_restarts} ]; then
  if [ "$code" = {preempted} ] || {{ [ "$code" -gt 128 ] && [ "${{crashes:-0}}" -lt {max_crashes} ]; }}; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$code"
"""


@dataclasses.dataclass(frozen=True)
class Site:
  """What a cluster wants to be asked; an empty value is not asked for."""

  partition: str = ''
  account: str = ''
  qos: str = ''
  constraint: str = ''
  time: str = ''  # limit of one attempt, as sbatch reads it; a job near it saves, and is requeued
  mem: str = ''
  gres: str = ''  # of one node
  cpus_per_task: int = 0
  tasks_per_node: int = 1
  grace_s: int = 120  # between SIGTERM and the time limit
  max_restarts: int = 100  # see `Job.max_restarts`
  poll_s: float = 15.0  # between two looks at the queue
  env: dict[str, str] = dataclasses.field(default_factory=dict)  # goes into the script: no secrets
  setup: tuple[str, ...] = ()  # shell lines before the processes start
  sbatch: tuple[str, ...] = ()  # more options, each --name=value
  srun: tuple[str, ...] = ()

  def shape(self, devices: int) -> tuple[int, int]:
    """Nodes, and processes on each, that make one process a device. Raises `UserError` when nodes stay unequal."""
    nodes = -(-devices // self.tasks_per_node)
    if devices % nodes:
      raise UserError(
        f'a mesh of {devices} devices does not spread evenly over {nodes} nodes of tasks_per_node = '
        f'{self.tasks_per_node}; change mesh.data x mesh.latent or the site file'
      )
    return nodes, devices // nodes


def read_site(path: str | None) -> Site:
  """The site in a TOML file; plain Slurm without one. Raises `UserError` for an unknown key or a wrong type."""
  if path is None:
    return Site()
  try:
    found = tomllib.loads(pathlib.Path(path).read_text())
  except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
    raise UserError(f'--site={path}: {error}; see sweeps/executors/slurm.py for an example') from None
  known = {f.name: f.default for f in dataclasses.fields(Site)}
  for key, value in found.items():
    if key not in known:
      raise UserError(f'--site={path}: unknown key {key!r}; the keys are {", ".join(known)}')
    if problem := _problem(key, value, known[key]):
      raise UserError(f'--site={path}: {key} = {value!r} is not {problem}')
  return Site(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})


def _problem(key: str, value: object, default: object) -> str:
  """What the value of a site key should have been; empty when it is fine."""

  def line(text: object) -> bool:
    return isinstance(text, str) and text.isprintable()

  if isinstance(default, str):
    return '' if line(value) else 'one line of text'
  if isinstance(default, tuple):
    if not isinstance(value, list) or not all(map(line, value)):
      return 'a list of single lines'
    dashed = key == 'setup' or all(text.startswith('--') for text in value)
    return '' if dashed else "a list of options such as '--exclusive'"
  if isinstance(default, int | float):
    least = 0 if key in ('cpus_per_task', 'max_restarts') else 1
    good = isinstance(value, int) and not isinstance(value, bool) and value >= least
    return '' if good else f'a whole number of at least {least}'
  names = isinstance(value, dict) and all(name.isidentifier() and line(text) for name, text in value.items())
  return '' if names else 'a table of NAME = "one line of text"'


class Slurm:
  """The executor interface (`submit`, `states`, `cancel`) on sbatch, squeue and scancel.

  Args:
    site: what to ask the cluster for.
    folder: on a filesystem that all nodes share; gets a script, a log and the ends of processes for each job.
    prefix: distinguishes the jobs of this ledger in the queue.
  """

  def __init__(self, site: Site, folder: pathlib.Path, prefix: str):
    self._site, self._folder, self._prefix = site, folder, prefix
    self._asked: set[str] = set()
    self._answered = False

  def render(self, jobs: list[Job]) -> str:
    """The batch scripts that `submit` would send."""
    return '\n'.join(self.script(job) for job in jobs)

  def submit(self, job: Job) -> str:
    """Queues a job, unless one of that id is alive. Raises `UserError` with the words of sbatch when refused."""
    if self.states([job.id])[job.id] != 'gone':
      return job.id
    self._folder.mkdir(parents=True, exist_ok=True)
    self._ends(job.id).unlink(missing_ok=True)
    script = self.script(job)
    (self._folder / f'{job.id}.sh').write_text(script)
    _call('sbatch', '--parsable', text=script)
    self._asked.discard(job.id)
    return job.id

  def states(self, ids: list[str]) -> dict[str, str]:
    """'pending', 'running' or 'gone' by id, from the queue."""
    found = self._queue()
    return {job_id: found[job_id][1] if job_id in found else 'gone' for job_id in ids}

  def cancel(self, job_id: str) -> None:
    """Asks the job to save and end; asked again, ends it by Slurm's own means. One that still waits just goes."""
    number, state = self._queue().get(job_id, ('', 'gone'))
    if state == 'gone':
      return
    gently = state == 'running' and job_id not in self._asked
    self._asked.add(job_id)
    _call('scancel', *(('--batch', '--signal=USR1') if gently else ()), number)

  def log(self, job_id: str) -> pathlib.Path:
    return self._folder / f'{job_id}.log'

  def script(self, job: Job) -> str:
    """The batch script; its comments are the options of sbatch."""
    site = self._site
    asked = {
      'job-name': self._prefix + job.id,
      'dependency': 'singleton',  # of two launches at once, the second's job waits and finds nothing to do
      'nodes': job.hosts,
      'ntasks-per-node': job.processes_per_host,
      'chdir': os.getcwd(),
      'output': str(self.log(job.id)).replace('%', '%%'),
      'open-mode': 'append',
      'signal': f'TERM@{job.grace_s}',
      'time': site.time if job.walltime_s is None else str(-(-job.walltime_s // 60)),
      'partition': site.partition,
      'account': site.account,
      'qos': site.qos,
      'constraint': site.constraint,
      'mem': site.mem,
      'gres': site.gres.replace('{tasks}', str(job.processes_per_host)),
      'cpus-per-task': site.cpus_per_task or '',
    }
    options = [f'--{name}={value}' for name, value in asked.items() if value != '']
    # srun does not take it from the job since Slurm 22.05.
    cpus = [f'--cpus-per-task={site.cpus_per_task}'] if site.cpus_per_task else []
    rank = ['bash', '-c', _RANK, job.argv[0], *job.argv]
    body = _SCRIPT.format(
      srun=shlex.join(['srun', '--kill-on-bad-exit=1', *cpus, *site.srun, *rank]),
      preempted=PREEMPTED,
      max_restarts=job.max_restarts,
      max_crashes=MAX_CRASHES,
    )
    env = site.env | job.env | {'ENDS': str(self._ends(job.id))}
    lines = ['#!/bin/bash']
    lines += [f'#SBATCH {shlex.quote(option)}' for option in [*options, '--requeue', *site.sbatch]]
    lines += [f'export {name}={shlex.quote(value)}' for name, value in env.items()]
    return '\n'.join([*lines, *site.setup, body])

  def _ends(self, job_id: str) -> pathlib.Path:
    return self._folder / f'{job_id}.ends'

  def _queue(self) -> dict[str, tuple[str, str]]:
    """Slurm's job number and the state, by id, of this user's jobs of this ledger that are alive."""
    found: dict[str, tuple[str, str]] = {}
    for line in self._listing().splitlines():
      number, state, name = line.split(' ', 2)
      job_id = name.removeprefix(self._prefix)
      if job_id == name or state in _ENDED:
        continue
      if state not in _PENDING or job_id not in found:  # of a running job and its waiting twin, the running one
        found[job_id] = number, 'pending' if state in _PENDING else 'running'
    return found

  def _listing(self) -> str:
    command = ('squeue', '--noheader', f'--user={os.getuid()}', '--states=all', '--format=%i %T %j')
    for wait_s in _WAITS_S if self._answered else ():
      try:
        return _call(*command)
      except UserError:
        time.sleep(wait_s)
    listing = _call(*command)
    self._answered = True
    return listing


def _call(*argv: str, text: str = '') -> str:
  env = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN) or k == 'SLURM_CONF'}
  try:
    done = subprocess.run(
      argv,
      input=text,
      env=env,
      capture_output=True,
      text=True,
      timeout=120,
      start_new_session=True,  # Ctrl-C is for the driver, not for a submission under way
    )
  except FileNotFoundError:
    raise UserError(f'{argv[0]} is not on the PATH; run this on a login node of the Slurm cluster') from None
  except subprocess.TimeoutExpired:
    raise UserError(f'{argv[0]} did not answer in 120 s; jobs run on without this command, start it again') from None
  if done.returncode:
    raise UserError(f'{argv[0]} refused: {" ".join(done.stderr.split())}; see --site')
  return done.stdout
