"""JobSets: the objects against the published models, and submit, states and cancel through kubectl to a fake server."""

import json
import pathlib
import re
import shutil
import signal
import subprocess

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sae_jax.errors import UserError
from sweeps import executors, launch
from sweeps.executors import jobset, jobset_site
from sweeps.grids import tiny
from tests import fake_bucket, fake_cluster

LEDGER = 'gs://bucket/primes'
SITE = jobset_site.Site(
  image='registry.example/sae_jax:7',
  queue='tpu-queue',
  tpu_accelerator='tpu-v5p-slice',
  tpu_topology='2x2x3',
  chips_per_host=4,
  path='/opt/sae_jax',
  service_account='trainer',
  priority_class='low',
  context='fake',
  env={'XLA_FLAGS': '--xla_dump_to=$(HOME)'},
  secrets=('wandb',),
)


def job(job_id='cell-0a1b2c3d4e5f', **changes):
  argv = ('/home/me/.venv/bin/python', '-m', 'sweeps.work', f'--ledger={LEDGER}', '--cell=0a1b2c3d4e5f')
  return executors.Job(job_id, argv, **({'hosts': SITE.hosts} | changes))


def spec_of(made):
  (replicated,) = made['spec']['replicatedJobs']
  return replicated['template']['spec']


def pod_of(made):
  return spec_of(made)['template']['spec']


@pytest.mark.parametrize(
  'changes',
  [
    {'site': SITE, 'walltime_s': 3600},
    {'site': jobset_site.Site('i', 'q', 'tpu-v5-lite-podslice', '2x2', 4), 'hosts': 1},
  ],
)
def test_manifest_is_a_jobset_of_the_published_models(changes):
  from kubeflow_trainer_api import models

  site = changes.pop('site')
  made = jobset.manifest(job(env={'A': 'b'}, **changes), site, LEDGER)
  # The models drop what they do not know, so a misspelt field does not come back.
  assert models.JobsetV1alpha2JobSet.from_dict(made).to_dict() == made


def test_manifest_asks_for_one_whole_slice_in_the_queue():
  made = jobset.manifest(job(grace_s=77, max_restarts=13, walltime_s=3600), SITE, LEDGER)
  spec, pod = spec_of(made), pod_of(made)
  assert made['metadata']['labels']['kueue.x-k8s.io/queue-name'] == 'tpu-queue'
  assert made['metadata']['annotations'] == {
    'alpha.jobset.sigs.k8s.io/exclusive-topology': 'cloud.google.com/gke-nodepool'
  }
  assert (spec['completions'], spec['parallelism'], spec['completionMode']) == (3, 3, 'Indexed')
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': 'tpu-v5p-slice',
    'cloud.google.com/gke-tpu-topology': '2x2x3',
  }
  assert pod['tolerations'] == [{'key': 'google.com/tpu', 'operator': 'Exists'}]
  (container,) = pod['containers']
  assert container['resources']['limits'] == container['resources']['requests'] == {'google.com/tpu': 4}
  assert pod['terminationGracePeriodSeconds'] == 77 and spec['activeDeadlineSeconds'] == 3600
  assert made['spec']['failurePolicy']['maxRestarts'] == 13
  assert (container['image'], container['workingDir']) == (SITE.image, '/opt/sae_jax')
  assert container['command'] == ['python', '-m', 'sweeps.work', *job().argv[3:]]
  assert container['envFrom'] == [{'secretRef': {'name': 'wandb'}}]


def end_of(made, code, disrupted=False):
  """The action of the JobSet when one pod has ended so, as the Job and JobSet controllers are documented to choose it."""
  reason, message = 'BackoffLimitExceeded', 'Job has reached the specified backoff limit'
  for i, rule in enumerate(spec_of(made)['podFailurePolicy']['rules']):
    if 'onExitCodes' in rule:
      wanted = rule['onExitCodes']
      matches = code != 0 and (code in wanted['values']) == (wanted['operator'] == 'In')
      what = f'Container w for pod default/p-0 failed with exit code {code}'
    else:
      matches = disrupted and rule['onPodConditions'] == [{'type': 'DisruptionTarget', 'status': 'True'}]
      what = 'Pod default/p-0 has condition DisruptionTarget'
    if matches:
      if rule['action'] == 'FailJob':
        reason, message = 'PodFailurePolicy', f'{what} matching FailJob rule at index {i}'
      break
  for rule in made['spec']['failurePolicy']['rules']:
    if reason in rule['onJobFailureReasons'] and any(
      re.search(pattern, message) for pattern in rule['onJobFailureMessagePatterns']
    ):
      return rule['action']
  return 'RestartJobSet'


def test_manifest_restarts_freely_once_saved_counts_signals_and_lost_nodes_and_stops_on_bugs():
  made = jobset.manifest(job(), SITE, LEDGER)
  ends = {code: end_of(made, code) for code in range(1, 256)}
  assert [c for c, end in ends.items() if end == 'RestartJobSetAndIgnoreMaxRestarts'] == [42]
  assert [c for c, end in ends.items() if end == 'RestartJobSet'] == list(range(128, 256))
  assert {end for c, end in ends.items() if c < 128 and c != 42} == {'FailJobSet'}
  # Of a drained or lost node: saved in time or not, but no bug. The message of another version counts too.
  lost = [end_of(made, code, disrupted=True) for code in (42, 1, 137)]
  assert lost == ['RestartJobSetAndIgnoreMaxRestarts', 'RestartJobSet', 'RestartJobSet']


def test_manifest_policies_are_as_kubernetes_demands():
  made = jobset.manifest(job(), SITE, LEDGER)
  spec = spec_of(made)
  for rule in spec['podFailurePolicy']['rules']:
    if wanted := rule.get('onExitCodes'):
      assert wanted['containerName'] == pod_of(made)['containers'][0]['name']
      assert wanted['values'] == sorted(set(wanted['values'])) and len(wanted['values']) <= 255
  # One failed pod fails the Job.
  assert (spec['backoffLimit'], pod_of(made)['restartPolicy']) == (0, 'Never')
  names = [rule['name'] for rule in made['spec']['failurePolicy']['rules']]
  assert len(set(names)) == len(names)
  assert all(re.fullmatch('[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?', name) for name in names)


def test_manifest_tells_every_host_who_it_is():
  made = jobset.manifest(job(env={'JAX_PROCESS_ID': '5', 'LOUD': '1'}), SITE, LEDGER)
  env = {v['name']: v for v in pod_of(made)['containers'][0]['env']}
  name = made['metadata']['name']
  assert env['JAX_COORDINATOR_ADDRESS']['value'].startswith(f'{name}-w-0-0.{name}:')
  assert env['JAX_NUM_PROCESSES']['value'] == '3'
  field = env['JAX_PROCESS_ID']['valueFrom']['fieldRef']['fieldPath']
  assert field == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  assert env['LOUD']['value'] == '1'
  # Kubernetes would put a value for $(HOME); a doubled dollar stays one.
  assert env['XLA_FLAGS']['value'] == '--xla_dump_to=$$(HOME)'


def test_manifest_of_one_host_has_no_rendezvous_and_shares_its_node_pool():
  site = jobset_site.Site('i', 'q', 'tpu-v5-lite-podslice', '2x2', 4)
  made = jobset.manifest(job(hosts=1), site, LEDGER)
  assert pod_of(made)['containers'][0]['env'] == [] and 'annotations' not in made['metadata']


@pytest.mark.parametrize('changes', [{'hosts': 2}, {'processes_per_host': 4}])
def test_manifest_refuses_a_job_that_is_not_the_slice(changes):
  with pytest.raises(UserError, match='2x2x3 is 3 hosts with one'):
    jobset.manifest(job(**changes), SITE, LEDGER)


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=200), st.integers(1, 999))
@example('x' * 200, 999)
def test_names_are_dns_labels_that_leave_room_for_pods(job_id, generation):
  made = jobset.manifest(job(job_id), SITE, LEDGER, generation)
  label = re.compile(r'[a-z]([-a-z0-9]*[a-z0-9])?')
  assert label.fullmatch(made['metadata']['name'])
  pod = f'{made["metadata"]["name"]}-w-0-99999-abcde'
  assert label.fullmatch(pod) and len(pod) <= 63
  for value in made['metadata']['labels'].values():
    assert re.fullmatch(r'[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?', value)


def test_names_differ_between_jobs_and_between_ledgers():
  def name(job_id, ledger):
    return jobset.manifest(job(job_id), SITE, ledger)['metadata']['name']

  ids = ['cell-a', 'cell_a', 'CELL-A', 'cell-a ', 'x' * 30, 'x' * 31]
  assert len({name(i, ledger) for i in ids for ledger in (LEDGER, 'gs://bucket/squares')}) == 12
  assert name('cell-a', LEDGER) == name('cell-a', LEDGER + '/')


def test_secrets_in_variables_and_arguments_are_refused():
  with pytest.raises(UserError, match='reference a Kubernetes secret'):
    jobset.manifest(job(env={'HF_TOKEN': 'x'}), SITE, LEDGER)
  with pytest.raises(UserError, match='reference a Kubernetes secret'):
    jobset.manifest(executors.Job('a', ('python', '--url=s3://me:hunter2@host/x'), hosts=3), SITE, LEDGER)


def test_executor_refuses_a_ledger_that_pods_cannot_see(tmp_path):
  with pytest.raises(UserError, match='pods cannot see the local ledger'):
    jobset.JobSet(SITE, str(tmp_path))


@pytest.fixture(params=['fake', 'real'])
def cluster(request, tmp_path, monkeypatch):
  """A fake API server, reached by a fake kubectl and, where it is installed, by the real one. Never a real cluster."""
  if request.param == 'real' and shutil.which('kubectl') is None:
    pytest.skip('kubectl is not installed')
  with fake_cluster.Cluster(tmp_path / 'cluster', request.param == 'real') as cluster:
    for name, value in cluster.env.items():
      monkeypatch.setenv(name, value)
    yield cluster


def test_submit_states_and_cancel(cluster):
  executor = jobset.JobSet(SITE, LEDGER, waits_s=(0,))
  assert executor.submit(job('a')) == 'a'
  ((name, made),) = cluster.jobsets().items()
  assert made == jobset.manifest(job('a'), SITE, LEDGER)
  assert jobset.JobSet(SITE, 'gs://bucket/squares', waits_s=(0,)).states(['a']) == {'a': 'gone'}

  # Running already: another submit, with whatever settings, leaves it alone.
  status = {'replicatedJobsStatus': [{'name': 'w', 'ready': 1, 'active': 1}]}
  cluster.set_status('default', name, status)
  assert executor.submit(job('a', max_restarts=5)) == 'a'
  assert cluster.jobsets() == {name: made | {'status': status}}
  assert executor.states(['a', 'b']) == {'a': 'running', 'b': 'gone'}

  executor.cancel('a')
  executor.cancel('a')
  executor.cancel('never-submitted')
  assert cluster.jobsets() == {}


def test_render_is_what_kubectl_creates(cluster):
  rendered = jobset.JobSet(SITE, LEDGER).render([job('a'), job('b')])
  subprocess.run(
    ['kubectl', '--namespace=default', '--request-timeout=30s', 'create', '-f', '-'],
    input=rendered,
    text=True,
    check=True,
  )
  assert list(cluster.jobsets().values()) == [jobset.manifest(job(name), SITE, LEDGER) for name in 'ab']


def test_submit_after_an_end_is_a_new_generation(cluster):
  executor = jobset.JobSet(SITE, LEDGER, waits_s=(0,))
  executor.submit(job('a'))
  (first,) = cluster.jobsets()
  cluster.set_status('default', first, {'conditions': [{'type': 'Failed', 'status': 'True'}]})
  executor.submit(job('a'))
  assert set(cluster.jobsets()) == {first, first.removesuffix('1') + '2'}
  assert executor.states(['a']) == {'a': 'pending'}


def test_submit_that_loses_a_race_is_already_there(cluster, monkeypatch):
  executor = jobset.JobSet(SITE, LEDGER, waits_s=(0,))
  executor.submit(job('a', max_restarts=5))
  before = cluster.jobsets()
  monkeypatch.setattr(executor, '_generations', lambda *_: {})  # as seen before the other launch was done
  assert executor.submit(job('a')) == 'a'
  assert cluster.jobsets() == before


@pytest.fixture
def signals():
  """Puts back the handlers that a launch replaces."""
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.usefixtures('signals')
def test_launch_submits_each_job_once_and_says_when_jobs_end_early(cluster, tmp_path, monkeypatch, capsys):
  fake_bucket.use(monkeypatch)
  site = tmp_path / 'site.toml'
  site.write_text(
    'image = "i"\nqueue = "q"\ntpu_accelerator = "tpu-v6e-slice"\ntpu_topology = "1x1"\nchips_per_host = 1\n'
  )
  flags = [
    f'--sweep={pathlib.Path(tiny.__file__)}',
    f'--ledger={LEDGER}',
    '--executor=jobset',
    f'--site={site}',
    '--gangs=2',
  ]

  def run(*more):
    with pytest.raises(SystemExit) as ended:
      launch.main([*flags, *more])
    return ended.value.code

  assert run('--detach') == 0
  made = cluster.jobsets()
  assert run('--detach') == 0
  assert cluster.jobsets() == made and len(made) == 2
  command = pod_of(next(iter(made.values())))['containers'][0]['command']
  assert command[:4] == ['python', '-m', 'sweeps.work', f'--ledger={LEDGER}']
  for name in made:
    cluster.set_status('default', name, {'terminalState': 'Failed'})
  monkeypatch.setattr(jobset.JobSet, 'submit', lambda _, job: job.id)  # this launch makes no new generation
  assert run() == 1
  assert 'the jobs ended with cells left to do' in capsys.readouterr().out


@pytest.mark.parametrize(
  'status, state',
  [
    ({}, 'pending'),
    ({'replicatedJobsStatus': [{'active': 1, 'ready': 0}]}, 'pending'),
    ({'replicatedJobsStatus': [{'active': 1, 'ready': 1}]}, 'running'),
    ({'terminalState': 'Completed', 'replicatedJobsStatus': [{'ready': 1}]}, 'gone'),
    ({'conditions': [{'type': 'Failed', 'status': 'True'}]}, 'gone'),
    (
      {'conditions': [{'type': 'Suspended', 'status': 'True'}, {'type': 'Failed', 'status': 'False'}]},
      'pending',
    ),
    (None, 'pending'),
  ],
)
def test_states_follow_the_status(monkeypatch, status, state):
  executor = jobset.JobSet(SITE, LEDGER)
  item = jobset.manifest(job('a'), SITE, LEDGER) | {'status': status}
  answer = json.dumps({'items': [item, {'metadata': {'name': 'someone-elses'}}]})
  monkeypatch.setattr(executor, '_kubectl', lambda *_: fake_answer(stdout=answer))
  assert executor.states(['a']) == {'a': state}


def fake_answer(returncode=0, stdout='', stderr=''):
  return subprocess.CompletedProcess([], returncode, stdout, stderr)


def test_states_never_call_a_job_gone_because_the_cluster_is_silent(monkeypatch):
  executor = jobset.JobSet(SITE, LEDGER, waits_s=(0, 0))
  silent, nothing = fake_answer(1, stderr='dial\x1b[2J tcp: timeout\n'), fake_answer(stdout='{"items": []}')
  answers = []
  monkeypatch.setattr(executor, '_kubectl', lambda *_: answers.pop(0))

  def refused():
    with pytest.raises(UserError, match=r'dial\?\[2J tcp: timeout; what runs goes on'):
      executor.states(['a'])
    return answers == []

  answers += [silent]  # never reached: no reason to wait
  assert refused()
  answers += [nothing, silent, silent, nothing]
  assert executor.states(['a']) == executor.states(['a']) == {'a': 'gone'} and answers == []
  answers += [silent, silent, silent]
  assert refused()


def test_refusals_of_the_cluster_are_said(tmp_path, monkeypatch):
  executor = jobset.JobSet(SITE, LEDGER, waits_s=(0,))
  monkeypatch.setattr(
    executor,
    '_kubectl',
    lambda verb, *_, **__: (
      fake_answer(stdout='{"items": []}') if verb == 'get' else fake_answer(1, stderr='Error (Forbidden): no\n')
    ),
  )
  with pytest.raises(UserError, match=r'cannot create JobSet sae-a-.*-1: Error \(Forbidden\): no'):
    executor.submit(job('a'))


def test_kubectl_missing_is_said(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(UserError, match='kubectl is not on PATH'):
    jobset.JobSet(SITE, LEDGER).states(['a'])
