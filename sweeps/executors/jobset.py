"""Runs jobs on TPU slices of a Kubernetes cluster: one JobSet a job, queued by Kueue, restarted as a whole gang.

Talks to the cluster through the `kubectl` on PATH. Objects are only ever created: a JobSet that exists is left as it is.
The cluster restarts a gang within its JobSet. A new attempt after the end of a JobSet is another one, of the next
generation.
"""

import hashlib
import json
import re
import subprocess
import time
from typing import Any

from sae_jax import files
from sae_jax.cell_state import printable
from sae_jax.errors import PREEMPTED, UserError
from sweeps import executors
from sweeps.executors.jobset_site import Site, check_no_secrets

KIND = 'jobsets.jobset.x-k8s.io'
LEDGER_LABEL, JOB_LABEL = 'sae-jax/ledger', 'sae-jax/job'
KEEP_FINISHED_S = 7 * 86400  # a failed JobSet and its pods' logs stay readable for a week
# Every other non-zero code is a bug or bad input: the same command would fail again.
RESTART_CODES = (PREEMPTED, *range(128, 256))
_COORDINATOR_PORT = 8482  # jax's own choice on TPU; libtpu uses 8471 to 8479
_WORKER = 'w'
_OVER = ('Completed', 'Failed')
_RENDEZVOUS = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')
_COMPLETION_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def manifest(job: executors.Job, site: Site, ledger: str, generation: int = 1) -> dict[str, Any]:
  """The JobSet (v1alpha2) of a job: one slice, a process a host.

  Exit code 42 restarts the gang each time. Codes of 128 or more and lost nodes restart it within `job.max_restarts`. Any
  other failure ends it. The first word of `job.argv` is an interpreter of this machine; it becomes the image's `python`.
  Raises `UserError` for a job that does not fit the slice or would carry a secret.
  """
  check_fits(job, site)
  name = name_of(job.id, ledger, generation)
  labels = {
    'app.kubernetes.io/name': 'sae-jax',
    LEDGER_LABEL: _digest(ledger.rstrip('/')),
    JOB_LABEL: _job_digest(job.id, ledger),
  }
  spec: dict[str, Any] = {
    'completionMode': 'Indexed',
    'completions': job.hosts,
    'parallelism': job.hosts,
    'backoffLimit': 0,  # one lost host ends the gang: the others would wait for it in a collective
    'podFailurePolicy': {
      'rules': [
        _fail_on('In', [PREEMPTED]),
        # A drained or reclaimed node is never a bug, whatever its process said while it went down. It is not free either:
        # a job that filled memory or disk is evicted under this condition too.
        {'action': 'Count', 'onPodConditions': [{'type': 'DisruptionTarget', 'status': 'True'}]},
        _fail_on('NotIn', list(RESTART_CODES)),
      ]
    },
    'template': {'metadata': {'labels': labels}, 'spec': _pod(job, site, name)},
  }
  if job.walltime_s is not None:
    spec['activeDeadlineSeconds'] = job.walltime_s
  metadata: dict[str, Any] = {
    'name': name,
    'namespace': site.namespace,
    'labels': labels | {'kueue.x-k8s.io/queue-name': site.queue},
  }
  if job.hosts > 1:
    # A node pool is one slice then. Slices of one host share a pool, and this would give all of it to a single job.
    metadata['annotations'] = {'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'}
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': metadata,
    'spec': {
      'ttlSecondsAfterFinished': KEEP_FINISHED_S,
      'failurePolicy': {
        'maxRestarts': job.max_restarts,
        'restartStrategy': 'BlockingRecreate',  # no rank of the old gang may meet the new coordinator
        # Whatever matches neither rule restarts and counts. The stricter rule is first, for a JobSet that does not know
        # the patterns and drops them: then it ends too early rather than never.
        'rules': [
          _after(2, 'bug', 'FailJobSet'),
          _after(0, 'preempted', 'RestartJobSetAndIgnoreMaxRestarts'),
        ],
      },
      'replicatedJobs': [{'name': _WORKER, 'replicas': 1, 'template': {'spec': spec}}],
    },
  }


class JobSet:
  """The executor interface (`submit`, `states`, `cancel`) on JobSets.

  Args:
    site: cluster and slice.
    ledger: of the jobs. It is part of their names, so that sweeps do not meet. Raises `UserError` for a local one.
    waits_s: pauses before a cluster that has answered before is asked for states again.
  """

  def __init__(self, site: Site, ledger: str, waits_s: tuple[float, ...] = (2.0, 10.0, 30.0)):
    if files.is_local(ledger):
      raise UserError(f'pods cannot see the local ledger {ledger}; use a bucket, e.g. gs://bucket/sweep')
    self._site, self._ledger, self._waits_s = site, ledger, waits_s
    self._answered = False

  def render(self, jobs: list[executors.Job]) -> str:
    """What `submit` would create the first time, as YAML documents (each is JSON) that `kubectl create -f` takes.

    Raises `UserError` for a job that does not fit the slice or would carry a secret.
    """
    made = [manifest(job, self._site, self._ledger) for job in jobs]
    return ''.join(f'---\n{json.dumps(document, indent=2)}\n' for document in made)

  def submit(self, job: executors.Job) -> str:
    """Queues a job, unless one of that id is pending or running."""
    self.render([job])  # refuse a bad job before anybody is asked
    generations = self._generations(job.id).get(stem(job.id, self._ledger), [])
    if all(state == 'gone' for _, state in generations):
      self._create(job, 1 + max((generation for generation, _ in generations), default=0))
    return job.id

  def states(self, ids: list[str]) -> dict[str, str]:
    """'pending' (queued, or some host not ready), 'running' or 'gone' by id."""
    found = self._generations()
    live = {name: state for name, made in found.items() for _, state in reversed(made) if state != 'gone'}
    return {job_id: live.get(stem(job_id, self._ledger), 'gone') for job_id in ids}

  def cancel(self, job_id: str) -> None:
    """Deletes the job. Its pods get SIGTERM and their grace, also when asked again. Once they have gone, it is 'gone'."""
    name = stem(job_id, self._ledger)
    for generation, state in self._generations(job_id).get(name, []):
      if state != 'gone':
        one = f'{name}-{generation}'
        done = self._kubectl('delete', KIND, one, '--ignore-not-found', '--cascade=foreground', '--wait=false')
        if done.returncode:
          raise UserError(f'cannot delete JobSet {one}: {said(done.stderr)}')

  def _create(self, job: executors.Job, generation: int) -> None:
    made = manifest(job, self._site, self._ledger, generation)
    done = self._kubectl('create', '-f', '-', stdin=json.dumps(made))
    if done.returncode and '(AlreadyExists)' not in done.stderr:  # another launch was faster
      raise UserError(f'cannot create JobSet {made["metadata"]["name"]}: {said(done.stderr)}')

  def _selector(self, job_id: str | None) -> str:
    """Labels of this ledger's JobSets, or of one job's."""
    one = '' if job_id is None else f',{JOB_LABEL}={_job_digest(job_id, self._ledger)}'
    return f'{LEDGER_LABEL}={_digest(self._ledger.rstrip("/"))}{one}'

  def _generations(self, job_id: str | None = None) -> dict[str, list[tuple[int, str]]]:
    """(generation, state) of the JobSets that `_selector` finds, by their name without it; strangers may be among them."""
    selector = self._selector(job_id)
    for wait_s in (*(self._waits_s if self._answered else ()), None):
      done = self._kubectl('get', KIND, '--selector', selector, '--output', 'json')
      if done.returncode == 0:
        break
      if wait_s is None:
        raise UserError(
          f'kubectl get {KIND}: {said(done.stderr)}; what runs goes on, and the same command finds it again'
        )
      time.sleep(wait_s)
    self._answered = True
    found: dict[str, list[tuple[int, str]]] = {}
    for item in json.loads(done.stdout)['items']:
      name, _, generation = item['metadata']['name'].rpartition('-')
      if generation.isdecimal():
        found.setdefault(name, []).append((int(generation), _state(item)))
    return found

  def _kubectl(self, *args: str, stdin: str = '') -> subprocess.CompletedProcess[str]:
    where = [f'--namespace={self._site.namespace}', '--request-timeout=30s']
    if self._site.context is not None:
      where.append(f'--context={self._site.context}')
    try:
      return subprocess.run(['kubectl', *where, *args], input=stdin, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
      raise UserError(
        'kubectl is not on PATH; install it, or save what --dry_run prints and create it elsewhere'
      ) from None
    except subprocess.TimeoutExpired as error:
      return subprocess.CompletedProcess(error.cmd, 1, '', 'no answer within 120 s')


def check_fits(job: executors.Job, site: Site) -> None:
  """Raises `UserError` for a job that is not one process on each host of the slice."""
  if job.hosts != site.hosts or job.processes_per_host != 1:
    raise UserError(
      f'job {job.id[:80]!r} wants {job.hosts} hosts with {job.processes_per_host} processes each, but '
      f'{site.tpu_topology} is {site.hosts} hosts with one; change the topology in the site file'
    )


def environment(job: executors.Job, site: Site) -> dict[str, str]:
  """The variables of every process. Raises `UserError` when one of them, or an argument, would show a secret."""
  env = site.env | job.env
  check_no_secrets(env | {f'argument_{i}': word for i, word in enumerate(job.argv)})
  return env


def name_of(job_id: str, ledger: str, generation: int) -> str:
  """The JobSet's name: a DNS label of at most 28 characters up to generation 99."""
  return f'{stem(job_id, ledger)}-{generation}'


def _fail_on(operator: str, codes: list[int]) -> dict[str, Any]:
  return {
    'action': 'FailJob',
    'onExitCodes': {'containerName': _WORKER, 'operator': operator, 'values': codes},
  }


def _after(index: int, name: str, action: str) -> dict[str, Any]:
  """What the JobSet does when this rule of the pod failure policy has failed its Job.

  All those rules give the same reason. They differ in the index that ends the message; JobSet reads it from 0.10 on.
  """
  return {
    'name': name,
    'action': action,
    'onJobFailureReasons': ['PodFailurePolicy'],
    'onJobFailureMessagePatterns': [f'matching FailJob rule at index {index}$'],
  }


def _pod(job: executors.Job, site: Site, name: str) -> dict[str, Any]:
  """The pod of one host, in the JobSet of this name."""
  env = environment(job, site)
  variables: list[dict[str, Any]] = [{'name': key, 'value': literal(env[key])} for key in sorted(env)]
  if job.hosts > 1:
    variables = [v for v in variables if v['name'] not in _RENDEZVOUS] + [
      {'name': 'JAX_COORDINATOR_ADDRESS', 'value': f'{name}-{_WORKER}-0-0.{name}:{_COORDINATOR_PORT}'},
      {'name': 'JAX_NUM_PROCESSES', 'value': str(job.hosts)},
      {'name': 'JAX_PROCESS_ID', 'valueFrom': {'fieldRef': {'fieldPath': _COMPLETION_INDEX}}},
    ]
  chips = {'google.com/tpu': site.chips_per_host}
  container = {
    'name': _WORKER,
    'image': site.image,
    'command': ['python', *map(literal, job.argv[1:])],
    'env': variables,
    'resources': {'limits': chips, 'requests': dict(chips)},
  }
  if site.path is not None:
    container['workingDir'] = site.path
  if site.secrets:
    container['envFrom'] = [{'secretRef': {'name': secret}} for secret in site.secrets]
  pod: dict[str, Any] = {
    'restartPolicy': 'Never',
    'terminationGracePeriodSeconds': job.grace_s,
    'nodeSelector': {
      'cloud.google.com/gke-tpu-accelerator': site.tpu_accelerator,
      'cloud.google.com/gke-tpu-topology': site.tpu_topology,
    },
    'tolerations': [{'key': 'google.com/tpu', 'operator': 'Exists'}],  # the taint of GKE's TPU nodes
    'containers': [container],
  }
  if site.service_account is not None:
    pod['serviceAccountName'] = site.service_account
  if site.priority_class is not None:
    pod['priorityClassName'] = site.priority_class
  return pod


def _state(item: dict[str, Any]) -> str:
  status = item.get('status') or {}
  conditions = status.get('conditions') or []
  if status.get('terminalState') in _OVER or any(
    c.get('type') in _OVER and c.get('status') == 'True' for c in conditions
  ):
    return 'gone'
  jobs = status.get('replicatedJobsStatus') or []
  return 'running' if any(job.get('ready') for job in jobs) else 'pending'


def stem(job_id: str, ledger: str) -> str:
  """A DNS label that differs for different jobs and leaves room for what JobSet appends to name its pods (63).

  With its generation it is no longer than xpk allows for the largest slices, 28 characters.
  """
  readable = re.sub('[^a-z0-9]+', '-', job_id.lower())[:10].strip('-')
  return '-'.join(part for part in ('sae', readable, _job_digest(job_id, ledger)) if part)


def _job_digest(job_id: str, ledger: str) -> str:
  return _digest(f'{ledger.rstrip("/")}\n{job_id}')


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:10]


def literal(text: str) -> str:
  """Text that Kubernetes leaves as it is: it would replace $(NAME) in commands and variables, but not $$(NAME)."""
  return text.replace('$', '$$')


def said(stderr: str) -> str:
  return printable(stderr) or 'no message'
