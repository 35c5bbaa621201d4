"""The Slurm executor on a real Slurm, four nodes on loopback: whatever it does to a job, its cell is done once.

After a lost node and after preemption the final parameters have the bits of an undisturbed run.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from sae_jax import schema
from sweeps import grid, jobs, ledger
from sweeps.executors import Job, slurm
from tests import loopback_slurm

pytestmark = [
  pytest.mark.slurm,
  pytest.mark.skipif(bool(loopback_slurm.missing()), reason=loopback_slurm.missing()),
]

# One cell on two ranks, long enough to be hit in the middle.
GANG = """
from experiments import tiny
from sweeps import grid
from tests import cells
EXPERIMENT = tiny
def sweep():
  more = {'mesh.data': 2, 'train.tokens': 40 * STEPS, 'train.checkpoint_every': 20, 'eval.per_decade': 1}
  return [cells.SHARED | more]
""".replace('STEPS', '800')
SHORT = """
from experiments import tiny
from sweeps import grid
from tests import cells
EXPERIMENT = tiny
def sweep():
  return grid.product([cells.SHARED], grid.param('train.seed', [2, 3, 5]))
"""
SITE = 'poll_s = 1\ngrace_s = 30\n[env]\nJAX_PLATFORMS = "cpu"\n'


def until(condition, what):
  """Waits for something to become true; `what` is for whoever reads the traceback of a hang."""
  del what
  while not (found := condition()):
    time.sleep(0.1)
  return found


@pytest.fixture(scope='module')
def cluster():
  with loopback_slurm.cluster() as found:
    yield found


@pytest.fixture(autouse=True)
def client(cluster, monkeypatch):
  monkeypatch.setenv('SLURM_CONF', cluster.env['SLURM_CONF'])


def launch_command(folder, text, *flags):
  (folder / 'cells.py').write_text(text)
  (folder / 'site.toml').write_text(SITE)
  argv = [
    sys.executable,
    '-m',
    'sweeps.launch',
    f'--sweep={folder / "cells.py"}',
    f'--ledger={folder / "ledger"}',
  ]
  return [*argv, '--executor=slurm', f'--site={folder / "site.toml"}', *flags]


def finish(argv):
  done = subprocess.run(argv, env=os.environ, capture_output=True, text=True)
  return done.returncode, done.stdout + done.stderr


def logs(folder):
  return '\n'.join(path.read_text() for path in sorted((folder / 'ledger/slurm').glob('*.log')))


def queue(cluster):
  """Every job Slurm remembers, with its number of restarts."""
  return [line.split() for line in cluster.call('squeue', '-h', '--states=all', '-o', '%i %j %T').splitlines()]


# ----- what Slurm does with jobs, shown by jobs that only sleep and exit


@pytest.fixture(scope='module')
def small_jobs(cluster, tmp_path_factory):
  """The folder of an executor's jobs that run at once and end each in its own way; `ended` waits for one of them."""
  folder = tmp_path_factory.mktemp("it's 100 % odd")
  sleep = 'echo start >> "$1"; sleep 1; echo stop >> "$1"'
  told = 'import os, signal, sys, time\nif os.environ.get("SLURM_RESTART_COUNT"): sys.exit(0)\n'
  told += 'signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))\nopen(sys.argv[1], "w").close()\ntime.sleep(50)'
  jobs = [
    Job('again', ('bash', '-c', 'exit 42'), max_restarts=1),
    Job('bug', ('bash', '-c', '[ $SLURM_PROCID = 0 ] && exit 1; sleep 60'), hosts=2),
    Job('twice', ('bash', '-c', sleep, 'x', str(folder / 'twice'))),
    Job('limit', (sys.executable, '-c', told, str(folder / 'limit')), walltime_s=60, grace_s=55),
    Job('cancel', (sys.executable, '-c', told, str(folder / 'cancel'))),
  ]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('SLURM_CONF', cluster.env['SLURM_CONF'])
    executor = slurm.Slurm(slurm.Site(), folder, 'small-')
    for job in jobs:
      executor.submit(job)
    cluster.call('sbatch', str(folder / 'twice.sh'))  # as by a launch that has not seen the first
    until((folder / 'cancel').exists, 'the job to cancel')
    executor.cancel('cancel')
  return folder


def ended(folder, name):
  """(run, exit code) of each run of a job, once it is gone."""
  executor = slurm.Slurm(slurm.Site(), folder, 'small-')
  until(lambda: executor.states([name])[name] == 'gone', f'{name} to end')
  lines = (folder / f'{name}.log').read_text().splitlines()
  words = [line.split() for line in lines if 'ended with exit code' in line]
  return [(int(line[2]), int(line[-1])) for line in words]


def test_requeues_stop_when_the_budget_is_used(small_jobs):
  assert ended(small_jobs, 'again') == [(0, 42), (1, 42)]


def test_a_bug_in_one_rank_ends_the_gang_for_good(small_jobs):
  assert ended(small_jobs, 'bug') == [(0, 1)]


def test_the_same_id_never_runs_twice_at_once(small_jobs):
  ended(small_jobs, 'twice')
  assert (small_jobs / 'twice').read_text().split() == ['start', 'stop'] * 2


def test_a_cancelled_job_saves_and_is_not_requeued(small_jobs):
  assert ended(small_jobs, 'cancel') == [(0, 42)]


# ----- sweeps


def results(folder):
  store = ledger.Ledger(str(folder / 'ledger'))
  return {
    entry.id: json.loads((pathlib.Path(store.folder(entry.id)) / schema.RESULT).read_text())
    for entry in store.entries()
  }


def test_launch_finds_its_jobs_again_and_a_third_does_nothing(cluster, tmp_path):
  argv = launch_command(tmp_path, SHORT, '--gangs=2')
  code, said = finish([*argv, '--detach'])
  assert code == 0 and '2 jobs are with the engine' in said, said
  code, said = finish(argv)
  assert code == 0 and '3 done' in said, said + logs(tmp_path)
  names = [name for _, name, _ in queue(cluster) if name.endswith(('gang-0', 'gang-1'))]
  assert len(names) == len(set(names)) == 2
  assert len(results(tmp_path)) == 3
  for entry in ledger.Ledger(str(tmp_path / 'ledger')).entries():
    assert [p.name for p in (tmp_path / 'ledger/cells' / entry.id / 'claims').glob('*.json')] == ['1.json']
  before = queue(cluster)
  assert 'todo 0' in finish(argv)[1] and len(queue(cluster)) == len(before)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """The result of the gang's cell from one process with two devices, without Slurm."""
  folder = tmp_path_factory.mktemp('undisturbed')
  (folder / 'cells.py').write_text(GANG)
  store = ledger.Ledger(str(folder / 'ledger'))
  store.register(grid.build(str(folder / 'cells.py')))
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '2'}
  subprocess.run([sys.executable, '-m', 'sweeps.work', f'--ledger={store.path}'], env=env, check=True)
  (result,) = results(folder).values()
  return result


def test_near_the_time_limit_a_job_is_told_and_requeued(small_jobs, undisturbed):
  # Slurm looks at time limits every 30 s: meanwhile the tests above have run.
  assert ended(small_jobs, 'limit') == [(0, 42), (1, 0)]


class Gang:
  """The gang's cell, launched with `--detach` and in the middle of its training."""

  def __init__(self, cluster, folder):
    self.cluster, self.folder = cluster, folder
    self.command = launch_command(folder, GANG)
    code, said = finish([*self.command, '--detach'])
    assert code == 0, said
    self.store = ledger.Ledger(str(folder / 'ledger'))
    (self.entry,) = self.store.entries()
    self.engine = jobs.slurm_cluster(str(folder / 'site.toml'), self.store.path).engine
    until(self.saved, 'a checkpoint')
    assert self.engine.states([self.entry.id]) == {self.entry.id: 'running'}

  def saved(self):
    return [int(p.name) for p in pathlib.Path(self.store.folder(self.entry.id)).glob('ckpt/*') if p.name.isdigit()]

  def nodes(self):
    listing = self.cluster.call('squeue', '-h', '--states=running', '-o', '%N')
    return self.cluster.call('scontrol', 'show', 'hostnames', listing.strip()).split()

  def restarts(self):
    return int(self.cluster.call('squeue', '-h', '-O', 'RestartCnt', '--states=all', '--name', self.name).split()[-1])

  def finish(self):
    code, said = finish(self.command)
    assert code == 0, said + logs(self.folder)
    # The cell is done a moment before its processes have ended.
    until(lambda: self.engine.states([self.entry.id])[self.entry.id] == 'gone', 'the job to end')
    (result,) = results(self.folder).values()
    return result


def test_a_preempted_gang_saves_and_ends_with_the_same_bits(cluster, undisturbed, tmp_path):
  gang = Gang(cluster, tmp_path)
  cluster.call('sbatch', '--partition=high', '--nodes=4', '--exclusive', '--output=/dev/null', '--wrap=true')
  result = gang.finish()
  assert result['params_digest'] == undisturbed['params_digest'] and result['bit_exact']
  assert [int(line.split()[-1]) for line in logs(tmp_path).splitlines() if 'ended with' in line] == [42, 0]


def test_a_lost_node_costs_nothing_but_time(cluster, undisturbed, tmp_path):
  gang = Gang(cluster, tmp_path)
  first, _ = gang.nodes()
  cluster.lose_node(first)
  try:
    result = gang.finish()
    assert result['params_digest'] == undisturbed['params_digest'] and result['bit_exact']
    assert f'run 1 on {first}' not in logs(tmp_path) and 'run 1 on' in logs(tmp_path)
  finally:
    cluster.start_node(first)
    cluster.wait_idle(4)
