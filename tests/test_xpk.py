"""Jobs through xpk: the command, what a shell makes of it, and that a running workload is never overwritten.

The last test asks the real xpk for its manifest, where one is on PATH; nothing here reaches a cluster.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from sae_jax.errors import UserError
from sweeps import executors
from sweeps.executors import jobset, jobset_site, xpk
from tests import fake_cluster

LEDGER = 'gs://bucket/primes'
SITE = jobset_site.Site(
  image='registry.example/sae_jax:7',
  queue='multislice-queue',
  tpu_accelerator='tpu-v5p-slice',
  tpu_topology='2x2x2',
  chips_per_host=4,
  path='/opt/sae jax',
  priority_class='low',
  context='fake',
  namespace='lab',
  env={'XLA_FLAGS': "--xla_dump_to=$(HOME)$$ 'x' {y}"},
  xpk_cluster='pod',
  xpk_project='lab-1',
  xpk_zone='us-east5-a',
)


def job(job_id='cell-0a1b2c3d4e5f', **changes):
  argv = ('/home/me/.venv/bin/python', '-m', 'sweeps.work', f'--ledger={LEDGER}', '--cell=0a1b2c3d4e5f')
  return executors.Job(job_id, argv, **({'hosts': SITE.hosts} | changes))


def flags_of(command):
  assert command[:3] == ['xpk', 'workload', 'create']
  return dict(word.removeprefix('--').split('=', 1) for word in command[3:] if '=' in word)


def test_command_asks_for_one_slice_and_never_to_overwrite():
  command = xpk.command(job(grace_s=77, max_restarts=13), SITE, LEDGER, 3)
  flags = flags_of(command)
  assert flags['workload'] == jobset.name_of(job().id, LEDGER, 3)
  assert (flags['cluster'], flags['project'], flags['zone']) == ('pod', 'lab-1', 'us-east5-a')
  assert (flags['tpu-type'], flags['num-slices'], flags['namespace']) == ('v5p-2x2x2', '1', 'lab')
  assert (flags['docker-image'], flags['priority']) == (SITE.image, 'low')
  assert (flags['max-restarts'], flags['termination-grace-period-seconds']) == ('13', '77')
  assert not {'--quiet', '--force', '--dry-run'}.intersection(command)


def test_command_leaves_out_what_the_site_does():
  site = dataclasses.replace(SITE, priority_class=None, xpk_project=None, xpk_zone=None)
  assert not {'priority', 'project', 'zone'}.intersection(flags_of(xpk.command(job(), site, LEDGER)))


@pytest.mark.parametrize('job_id', ['x' * 200, 'cell-0a1b2c3d4e5f', 'gang-0', 'É', ''])
def test_names_are_what_xpk_takes(job_id):
  name = flags_of(xpk.command(job(job_id), SITE, LEDGER, 99))['workload']
  assert re.fullmatch('[a-z]([-a-z0-9]*[a-z0-9])?', name)
  assert len(name) <= 28  # xpk: 40, for slices of several cubes 28


def stub_python(folder, body):
  """A `python` that writes down how it was called and then runs `body`."""
  (folder / 'python').write_text(
    f'#!{sys.executable} -IS\nimport json, os, signal, sys, time\n'
    f'with open({str(folder / "called.json")!r}, "w") as f:\n'
    '  json.dump([sys.argv[1:], os.getcwd(), os.environ.get("XLA_FLAGS")], f)\n'
    f'os.rename({str(folder / "called.json")!r}, {str(folder / "called")!r})\n{body}\n'
  )
  (folder / 'python').chmod(0o755)
  return {'PATH': f'{folder}:/usr/bin:/bin'}


def as_kubernetes_expands(text):
  """Of a container's command: $$ is a dollar, $(NAME) of no variable stays."""
  return text.replace('$$', '$')


def test_shell_becomes_the_worker(tmp_path):
  (tmp_path / 'in the image').mkdir()
  site = dataclasses.replace(SITE, path=str(tmp_path / 'in the image'))
  line = as_kubernetes_expands(flags_of(xpk.command(job(), site, LEDGER))['command'])
  # exec: of the shell nothing is left that could swallow a signal, or go on.
  ran = subprocess.run(['bash', '-c', f'{line}; exit 9'], env=stub_python(tmp_path, 'sys.exit(42)'))
  assert ran.returncode == 42
  argv, cwd, xla_flags = json.loads((tmp_path / 'called').read_text())
  assert (argv, cwd) == (['-m', 'sweeps.work', *job().argv[3:]], site.path)
  assert xla_flags == "--xla_dump_to=$(HOME)$$ 'x' {y}"


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'xpk_cluster': None}, 'xpk needs xpk_cluster'),
    ({'context': None}, "xpk_cluster = 'pod' needs context"),
    ({'queue': 'tpu-queue'}, "queue = 'tpu-queue': xpk knows only 'multislice-queue'"),
    ({'tpu_accelerator': 'tpu-v3-device'}, 'tpu_accelerator = .*: known are tpu-v4'),
    ({'priority_class': 'urgent'}, "priority_class = 'urgent': xpk has very-low"),
    ({'secrets': ('wandb',)}, 'with secrets: xpk has no flag'),
    ({'service_account': 'trainer'}, 'with service_account: xpk has no flag'),
  ],
)
def test_sites_that_xpk_cannot_serve_are_refused(changes, message):
  with pytest.raises(UserError, match=message):
    xpk.Xpk(dataclasses.replace(SITE, **changes), LEDGER)


def test_the_guide_shows_a_site_that_xpk_takes(tmp_path):
  guide = pathlib.Path(__file__).parents[1] / 'docs' / 'first_pod_sweep.md'
  site, addition = re.findall('```toml\n(.*?)```', guide.read_text(), re.DOTALL)
  kept = '\n'.join(line for line in site.splitlines() if not re.match('secrets|service_account', line))
  (tmp_path / 'site.toml').write_text(addition + kept)
  read = jobset_site.read_site(str(tmp_path / 'site.toml'))
  (line,) = xpk.Xpk(read, LEDGER).render([job(hosts=read.hosts)]).splitlines()
  assert flags_of(shlex.split(line))['tpu-type'] == 'v5litepod-4x4'


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'hosts': 3}, '2x2x2 is 2 hosts with one'),
    ({'walltime_s': 60}, 'walltime_s = 60, which xpk cannot limit'),
    ({'env': {'HF_TOKEN': 'x'}}, 'reference a Kubernetes secret'),
    ({'env': {'NOTE': 'a\nsecurityContext: {}'}}, 'line break or control character'),
    ({'argv': ('python', '--url=s3://me:hunter2@host/x')}, 'reference a Kubernetes secret'),
  ],
)
def test_jobs_that_xpk_must_not_get_are_refused_before_anybody_is_asked(tmp_path, monkeypatch, changes, message):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(UserError, match=message) as refused:
    xpk.Xpk(SITE, LEDGER).submit(dataclasses.replace(job(), **changes))
  assert 'hunter2' not in str(refused.value)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
  with fake_cluster.Cluster(tmp_path / 'cluster') as cluster:
    for name, value in cluster.env.items():
      monkeypatch.setenv(name, value)
    yield cluster


def test_submit_states_and_cancel(cluster):
  executor = xpk.Xpk(SITE, LEDGER, waits_s=(0,))
  assert executor.submit(job('a')) == 'a'
  (made,) = cluster.jobsets()
  assert made == jobset.name_of('a', LEDGER, 1)
  assert executor.states(['a', 'b']) == {'a': 'pending', 'b': 'gone'}
  assert xpk.Xpk(SITE, 'gs://bucket/squares', waits_s=(0,)).states(['a']) == {'a': 'gone'}

  # Running already: another submit, with whatever settings, does not even start xpk.
  cluster.set_status('lab', made, {'replicatedJobsStatus': [{'name': 'slice-job', 'ready': 1}]})
  before = cluster.jobsets()
  assert executor.submit(job('a', max_restarts=5)) == 'a'
  assert cluster.jobsets() == before and len(cluster.xpk_calls()) == 1
  assert executor.states(['a']) == {'a': 'running'}

  executor.cancel('a')
  executor.cancel('a')
  executor.cancel('never-submitted')
  assert cluster.jobsets() == {} and len(cluster.xpk_calls()) == 1


def test_submit_after_an_end_is_a_new_generation(cluster):
  executor = xpk.Xpk(SITE, LEDGER, waits_s=(0,))
  executor.submit(job('a'))
  cluster.set_status('lab', jobset.name_of('a', LEDGER, 1), {'terminalState': 'Failed'})
  executor.submit(job('a'))
  assert set(cluster.jobsets()) == {jobset.name_of('a', LEDGER, g) for g in (1, 2)}


def test_submit_that_loses_a_race_overwrites_nothing(cluster, monkeypatch):
  executor = xpk.Xpk(SITE, LEDGER, waits_s=(0,))
  executor.submit(job('a'))
  cluster.set_status('lab', jobset.name_of('a', LEDGER, 1), {'replicatedJobsStatus': [{'ready': 1}]})
  before = cluster.jobsets()
  look, looks = executor._generations, []

  def late(*args):  # at first as seen before the other launch was done
    looks.append(args)
    return look(*args) if looks[1:] else {}

  monkeypatch.setattr(executor, '_generations', late)
  assert executor.submit(job('a', max_restarts=5)) == 'a'
  assert cluster.jobsets() == before and len(cluster.xpk_calls()) == 2


def test_failure_of_xpk_is_said_unless_the_workload_is_there(cluster, monkeypatch):
  executor = xpk.Xpk(SITE, LEDGER, waits_s=(0,))
  monkeypatch.setenv('FAKE_XPK_EXIT', '1')
  assert executor.submit(job('a')) == 'a'
  binaries = pathlib.Path(os.environ['PATH'])
  (binaries / 'xpk').write_text('#!/bin/sh\necho "[XPK] Error: no such cluster"; exit 1\n')
  with pytest.raises(UserError, match=r'xpk ended with 1 .*has no sae-b-\w+-1: \[XPK\] Error: no such cluster'):
    executor.submit(job('b'))
  (binaries / 'xpk').write_text('#!/bin/sh\n')  # content, but on another cluster
  with pytest.raises(UserError, match="xpk ended with 0 and context 'fake', which must be that of 'pod'"):
    executor.submit(job('b'))
  (binaries / 'xpk').unlink()
  with pytest.raises(UserError, match='xpk is not on PATH'):
    executor.submit(job('b'))


def test_render_is_the_commands_that_submit_runs(cluster):
  executor = xpk.Xpk(SITE, LEDGER, waits_s=(0,))
  first, second = executor.render([job('a'), job('b')]).splitlines()
  executor.submit(job('b'))
  assert cluster.xpk_calls() == [shlex.split(second)[1:]] and first != second


@pytest.mark.skipif(shutil.which('xpk') is None, reason='xpk is not installed')
def test_the_real_xpk_makes_the_jobset_we_mean(tmp_path):
  import yaml

  (tmp_path / '.config/xpk').mkdir(parents=True)
  (tmp_path / '.config/xpk/config.yaml').write_text('version: v1\nconfigs: {send-telemetry: "false"}\n')
  site = dataclasses.replace(SITE, path=str(tmp_path))
  command = xpk.command(job(grace_s=77, max_restarts=13), site, LEDGER)
  subprocess.run(
    [*command, '--dry-run', '--output-manifest-file=made.yaml'],
    cwd=tmp_path,
    env=os.environ | {'HOME': str(tmp_path)},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    check=True,
  )
  made = yaml.safe_load((tmp_path / 'made.yaml').read_text())
  labels = made['metadata']['labels']
  assert labels['kueue.x-k8s.io/queue-name'] == site.queue and xpk.LABEL in labels
  assert made['metadata']['name'] == jobset.name_of(job().id, LEDGER, 1)
  assert made['spec']['failurePolicy']['maxRestarts'] == 13
  (replicated,) = made['spec']['replicatedJobs']
  spec = replicated['template']['spec']
  assert replicated['replicas'] == 1 and spec['parallelism'] == spec['completions'] == site.hosts
  (rule,) = spec['podFailurePolicy']['rules']
  assert (rule['action'], rule['onExitCodes']['operator']) == ('FailJob', 'NotIn')
  # 127, a command that is not there, restarts too.
  assert set(rule['onExitCodes']['values']) == {127, *jobset.RESTART_CODES}
  pod = spec['template']['spec']
  assert (pod['terminationGracePeriodSeconds'], pod['priorityClassName']) == (77, 'low')
  assert pod['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': site.tpu_accelerator,
    'cloud.google.com/gke-tpu-topology': site.tpu_topology,
  }
  (container,) = pod['containers']
  assert container['image'] == site.image
  assert container['resources']['limits'] == {'google.com/tpu': site.chips_per_host}

  # Its shell around our command passes SIGTERM on and ends with our exit code.
  body = 'signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\ntime.sleep(30)'
  words = [as_kubernetes_expands(word) for word in container['command']]
  ran = subprocess.Popen(words, env=stub_python(tmp_path, body), stdout=subprocess.DEVNULL)
  while not (tmp_path / 'called').exists():
    time.sleep(0.05)
  time.sleep(0.5)  # for its handler
  ran.send_signal(signal.SIGTERM)
  assert ran.wait(20) == 42
  assert json.loads((tmp_path / 'called').read_text())[0] == ['-m', 'sweeps.work', *job().argv[3:]]
