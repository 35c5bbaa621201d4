"""Submits jobs through xpk, on clusters that xpk made; looks at them and deletes them as the JobSets they become.

Written for xpk 1.16. Asked for a name that exists, xpk offers to delete the running workload. With --quiet or --force it
does so unasked. So jobs are looked for first, neither flag is ever given, and its question finds no answer on stdin.
"""

import shlex
import subprocess

from sae_jax.errors import UserError
from sweeps import executors
from sweeps.executors import jobset
from sweeps.executors.jobset_site import Site

LABEL = 'xpk.google.com/workload'
QUEUE = 'multislice-queue'
PRIORITIES = ('very-low', 'low', 'medium', 'high', 'very-high')
# xpk's word for an accelerator label. Followed by the topology it is a --tpu-type.
TPU_TYPES = {
  'tpu-v4-podslice': 'v4',
  'tpu-v5-lite-podslice': 'v5litepod',
  'tpu-v5p-slice': 'v5p',
  'tpu-v6e-slice': 'v6e',
  'tpu7x': 'tpu7x',
}
_TIMEOUT_S = 600


def command(job: executors.Job, site: Site, ledger: str, generation: int = 1) -> list[str]:
  """The xpk command of a job: one slice, a process a host.

  Raises `UserError` for a job that does not fit the slice, would carry a secret or asks for what xpk has no flag for.
  """
  jobset.check_fits(job, site)
  if job.walltime_s is not None:
    raise UserError(f'job {job.id[:80]!r} has walltime_s = {job.walltime_s}, which xpk cannot limit; leave it out')
  flags = {
    'workload': jobset.name_of(job.id, ledger, generation),
    'cluster': site.xpk_cluster,
    'project': site.xpk_project,
    'zone': site.xpk_zone,
    'namespace': site.namespace,
    'tpu-type': f'{TPU_TYPES[site.tpu_accelerator]}-{site.tpu_topology}',
    'num-slices': 1,
    'docker-image': site.image,
    'priority': site.priority_class,
    'max-restarts': job.max_restarts,
    'termination-grace-period-seconds': job.grace_s,
    'ttl-seconds-after-finished': jobset.KEEP_FINISHED_S,
    'command': _shell(job, site),
  }
  # Without the last flag xpk asks for docker, which an image that exists does not need.
  given = [f'--{flag}={value}' for flag, value in flags.items() if value is not None]
  return ['xpk', 'workload', 'create', *given, '--skip-validation']


class Xpk(jobset.JobSet):
  """The executor interface (`submit`, `states`, `cancel`) on xpk workloads.

  Args:
    site, ledger, waits_s: as for `JobSet`. Raises `UserError` for a site that asks for what xpk cannot do.
  """

  def __init__(self, site: Site, ledger: str, waits_s: tuple[float, ...] = (2.0, 10.0, 30.0)):
    _check(site)
    super().__init__(site, ledger, waits_s)

  def render(self, jobs: list[executors.Job]) -> str:
    """The commands that `submit` would run the first time, a line each; with --dry-run xpk prints their manifests."""
    return ''.join(shlex.join(command(job, self._site, self._ledger)) + '\n' for job in jobs)

  def _create(self, job: executors.Job, generation: int) -> None:
    argv = command(job, self._site, self._ledger, generation)
    try:
      done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except FileNotFoundError:
      raise UserError(
        'xpk is not on PATH; install it, or take xpk_cluster out of the site file to submit with kubectl'
      ) from None
    except subprocess.TimeoutExpired as error:
      done = subprocess.CompletedProcess(error.cmd, 1, '', f'no answer within {_TIMEOUT_S} s')
    # Its exit code does not tell: another launch may have been faster, and xpk has steps after the one that counts.
    made = self._generations(job.id).get(jobset.stem(job.id, self._ledger), [])
    if generation not in [number for number, _ in made]:
      last = '; '.join(line for line in (done.stdout + done.stderr).splitlines()[-5:] if line.strip())
      raise UserError(
        f'xpk ended with {done.returncode} and context {self._site.context!r}, which must be that of '
        f'{self._site.xpk_cluster!r}, has no {jobset.name_of(job.id, self._ledger, generation)}: {jobset.said(last)}'
      )

  def _selector(self, job_id: str | None) -> str:
    return LABEL  # its workloads have no labels of ours


def _check(site: Site) -> None:
  """Raises `UserError` for a site that is not one of xpk's."""
  if site.xpk_cluster is None:
    raise UserError('xpk needs xpk_cluster in the site file; give the name of a cluster that xpk made')
  where = f'xpk_cluster = {site.xpk_cluster!r}'
  if site.context is None:
    raise UserError(
      f'{where} needs context, as kubectl config get-contexts prints it: jobs are looked for there before one is made'
    )
  if site.queue != QUEUE:
    raise UserError(f'{where} with queue = {site.queue!r}: xpk knows only {QUEUE!r}; give that')
  if site.tpu_accelerator not in TPU_TYPES:
    raise UserError(
      f'{where} with tpu_accelerator = {site.tpu_accelerator!r}: known are {", ".join(TPU_TYPES)}; give one of them'
    )
  if site.priority_class is not None and site.priority_class not in PRIORITIES:
    raise UserError(
      f'{where} with priority_class = {site.priority_class!r}: xpk has {", ".join(PRIORITIES)}; give one of them'
    )
  for key, value in (('secrets', site.secrets), ('service_account', site.service_account)):
    if value:
      raise UserError(f'{where} with {key}: xpk has no flag for it; leave {key} or xpk_cluster out')


def _shell(job: executors.Job, site: Site) -> str:
  """The job as one line of shell.

  `exec` leaves no shell between the SIGTERM that xpk's wrapper passes on and the worker.
  """
  env = jobset.environment(job, site)
  words = ['env', *(f'{name}={env[name]}' for name in sorted(env))] if env else []
  line = shlex.join([*words, 'python', *job.argv[1:]])
  line = f'exec {line}' if site.path is None else f'cd {shlex.quote(site.path)} && exec {line}'
  if not line.isprintable():
    raise UserError(
      f'job {job.id[:80]!r} has a line break or control character in an argument or variable, which xpk would '
      'write into its manifest as it is; take it out'
    )
  return jobset.literal(line)
