"""The Slurm executor with programs that pretend to be Slurm's; test_slurm_cluster.py has the real ones."""

import os
import subprocess

import pytest

from sae_jax.errors import UserError
from sweeps import launch
from sweeps.executors import Job, slurm

TWO_RANKS = """
from experiments import tiny
from sweeps import grid
EXPERIMENT = tiny
def sweep():
  return grid.product(grid.param('sae.k', [3]), grid.param('mesh.data', [2]))
"""


def bash(job_id, code, **asked):
  return Job(job_id, ('bash', '-c', code, job_id), **asked)


# ----- site files


def test_read_site_takes_every_kind_of_key(tmp_path):
  (tmp_path / 'site.toml').write_text(
    'partition = "gpu"\ntasks_per_node = 8\nsetup = ["module load cuda"]\nsbatch = ["--exclusive"]\n[env]\nA = "b c"\n'
  )
  site = slurm.read_site(str(tmp_path / 'site.toml'))
  assert (site.partition, site.tasks_per_node, site.setup, site.sbatch, site.env) == (
    'gpu',
    8,
    ('module load cuda',),
    ('--exclusive',),
    {'A': 'b c'},
  )
  assert slurm.read_site(None) == slurm.Site()


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('partitions = "gpu"', "unknown key 'partitions'; the keys are partition, account"),
    ('partition = 3', 'partition = 3 is not one line of text'),
    ('partition = "a\\nscancel"', 'is not one line of text'),
    ('tasks_per_node = 0', 'is not a whole number of at least 1'),
    ('tasks_per_node = true', 'is not a whole number'),
    ('setup = "module load"', 'is not a list of single lines'),
    ('sbatch = ["exclusive"]', 'is not a list of options'),
    ('env = { "A B" = "c" }', 'is not a table'),
    ('env = { A = 1 }', 'is not a table'),
    ('partition = ', 'site.toml'),
  ],
)
def test_read_site_names_the_mistake(tmp_path, text, said):
  (tmp_path / 'site.toml').write_text(text)
  with pytest.raises(UserError) as error:
    slurm.read_site(str(tmp_path / 'site.toml'))
  assert said in str(error.value)


@pytest.mark.parametrize(
  ('devices', 'per_node', 'shape'),
  [(1, 8, (1, 1)), (8, 8, (1, 8)), (16, 8, (2, 8)), (12, 8, (2, 6)), (3, 1, (3, 1))],
)
def test_shape_makes_one_process_a_device(devices, per_node, shape):
  assert slurm.Site(tasks_per_node=per_node).shape(devices) == shape


def test_shape_refuses_unequal_nodes():
  with pytest.raises(UserError, match='13 devices does not spread evenly over 2 nodes'):
    slurm.Site(tasks_per_node=8).shape(13)


# ----- the batch script, with programs that only pretend


FAKE = {
  # Two ranks, one after the other; like the real one it says the worst code.
  'srun': 'while [[ $1 == --* ]]; do shift; done\nworst=0\n'
  'for i in 0 1; do SLURM_PROCID=$i "$@" || { code=$?; (( code > worst )) && worst=$code; }; done\nexit $worst',
  'scontrol': 'echo "$@" >> requeued',
  'squeue': 'cat queue',
  'sbatch': 'cat > sent\necho "$@" > sent_arguments',
  'scancel': 'echo "$@" >> cancelled',
}


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """A folder with pretended Slurm programs on the PATH, which is also the working folder."""
  for name, text in FAKE.items():
    (tmp_path / name).write_text(f'#!/bin/bash\n{text}\n')
    (tmp_path / name).chmod(0o755)
  (tmp_path / 'queue').write_text('')
  monkeypatch.setenv('PATH', f'{tmp_path}:{os.environ["PATH"]}')
  monkeypatch.chdir(tmp_path)
  return tmp_path


def end(folder, codes, restarts=0, **asked):
  """Runs a job's script once, its two ranks ending with these codes; its exit code, and whether it was requeued."""
  job = bash('j', f'exit $(( SLURM_PROCID ? {codes[1]} : {codes[0]} ))', **asked)
  script = slurm.Slurm(slurm.Site(), folder / "it's a % folder", 'sae-').script(job)
  (folder / "it's a % folder").mkdir(exist_ok=True)
  env = os.environ | {'SLURM_JOB_ID': '7', 'SLURM_JOB_NODELIST': 'n1', 'SLURM_RESTART_COUNT': str(restarts)}
  (folder / 'requeued').unlink(missing_ok=True)
  done = subprocess.run(['bash', '-s'], input=script, env=env, capture_output=True, text=True)
  assert f'run {restarts} on n1 ended with exit code {done.returncode}' in done.stdout, done.stderr
  return done.returncode, (folder / 'requeued').exists() and (folder / 'requeued').read_text() == 'requeue 7\n'


@pytest.mark.parametrize(
  ('codes', 'asked', 'ended'),
  [
    ((0, 0), {}, (0, False)),
    ((42, 42), {}, (42, True)),
    ((42, 143), {}, (42, True)),  # srun says 143 of the rank that it stopped itself
    ((1, 143), {}, (1, False)),
    ((0, 2), {}, (2, False)),
    ((137, 143), {}, (137, True)),
    ((42, 42), {'restarts': 2, 'max_restarts': 2}, (42, False)),
    ((42, 42), {'restarts': 1, 'max_restarts': 2}, (42, True)),
    ((137, 0), {'restarts': 2, 'max_restarts': 2}, (137, False)),
  ],
)
def test_script_goes_by_the_first_bad_end(fake, codes, asked, ended):
  assert end(fake, codes, **asked) == ended


def test_script_ends_a_crash_loop_but_not_preemptions(fake):
  assert all(end(fake, (42, 143), restarts=i)[1] for i in range(5))
  assert [end(fake, (139, 139), restarts=i)[1] for i in range(5, 8)] == [True, True, False]


def test_script_passes_arguments_and_environment_unchanged(fake):
  odd = 'a\'b "c" $HOME `id` \\ * #%j'
  job = Job('j', ('bash', '-c', 'printf "%s\\n" "$1" "$ODD" > said', 'x', odd), {'ODD': odd})
  site = slurm.Site(setup=('export FROM_SETUP=1',), env={'ODD': 'replaced', 'FROM_SITE': '2'})
  text = slurm.Slurm(site, fake, 'sae-').script(job)
  subprocess.run(['bash', '-s'], input=text, check=True, capture_output=True, text=True)
  assert (fake / 'said').read_text() == f'{odd}\n{odd}\n'
  assert 'export FROM_SITE=2' in text and text.index('FROM_SETUP') < text.index('srun ')


def test_script_asks_for_what_job_and_site_say(fake):
  site = slurm.Site(
    partition='gpu',
    gres='gpu:{tasks}',
    cpus_per_task=4,
    time='1-0',
    sbatch=('--exclusive',),
    srun=('--label',),
  )
  executor = slurm.Slurm(site, fake, 'sae-')
  lines = executor.script(bash('j', '', hosts=2, processes_per_host=8, grace_s=60)).splitlines()
  asked = {line.removeprefix('#SBATCH --') for line in lines if line.startswith('#SBATCH --')}
  assert asked >= {
    'job-name=sae-j',
    'dependency=singleton',
    'nodes=2',
    'ntasks-per-node=8',
    'signal=TERM@60',
    'requeue',
    'open-mode=append',
    'partition=gpu',
    'gres=gpu:8',
    'cpus-per-task=4',
    'time=1-0',
    'exclusive',
  }
  assert not any(line.startswith(('account', 'qos', 'mem')) for line in asked)
  (step,) = [line for line in lines if line.startswith('srun ')]
  assert '--kill-on-bad-exit=1 --cpus-per-task=4 --label ' in step
  assert '#SBATCH --time=2' in executor.script(bash('j', '', walltime_s=61))


# ----- the queue


def test_states_come_from_the_queue_by_name(fake):
  (fake / 'queue').write_text(
    '1 COMPLETED sae-a\n2 RUNNING sae-a\n3 PENDING sae-a\n4 PENDING sae-b\n5 COMPLETING sae-c\n6 TIMEOUT sae-d\n'
    '7 RUNNING other-e\n8 SUSPENDED sae-f g\n'
  )
  executor = slurm.Slurm(slurm.Site(), fake, 'sae-')
  assert executor.states(['a', 'b', 'c', 'd', 'e', 'f g', 'other-e']) == {
    'a': 'running',
    'b': 'pending',
    'c': 'running',
    'd': 'gone',
    'e': 'gone',
    'f g': 'running',
    'other-e': 'gone',
  }


def test_submit_sends_a_job_only_when_none_of_that_id_is_alive(fake, monkeypatch):
  for name in ('SBATCH_JOB_NAME', 'SQUEUE_FORMAT', 'SLURM_NTASKS'):
    monkeypatch.setenv(name, 'x')
  (fake / 'sbatch').write_text('#!/bin/bash\ncat > sent\nenv > sent_environment\n')
  executor = slurm.Slurm(slurm.Site(), fake / 'jobs', 'sae-')
  (fake / 'queue').write_text('1 PENDING sae-a\n')
  assert executor.submit(bash('a', 'true')) == 'a' and not (fake / 'sent').exists()
  (fake / 'queue').write_text('1 FAILED sae-a\n')
  assert executor.submit(bash('a', 'true')) == 'a'
  assert (fake / 'sent').read_text() == (fake / 'jobs/a.sh').read_text() == executor.script(bash('a', 'true'))
  names = {line.partition('=')[0] for line in (fake / 'sent_environment').read_text().splitlines()}
  assert not names & {'SBATCH_JOB_NAME', 'SQUEUE_FORMAT', 'SLURM_NTASKS'}


def test_cancel_asks_first_and_ends_what_only_waits(fake):
  executor = slurm.Slurm(slurm.Site(), fake, 'sae-')
  (fake / 'queue').write_text('1 RUNNING sae-a\n2 PENDING sae-b\n3 FAILED sae-c\n')
  for job_id in ('a', 'a', 'b', 'c', 'unknown'):
    executor.cancel(job_id)
  assert (fake / 'cancelled').read_text() == '--batch --signal=USR1 1\n1\n2\n'


def test_a_controller_that_answered_before_is_given_time(fake, monkeypatch):
  monkeypatch.setattr(slurm, '_WAITS_S', (0, 0))
  executor = slurm.Slurm(slurm.Site(), fake, 'sae-')
  flaky = '#!/bin/bash\nn=$(cat calls 2>/dev/null || echo 0); echo $((n + 1)) > calls\n'
  (fake / 'squeue').write_text(flaky + '[ $n = 1 ] || [ $n = 2 ] && { echo no answer >&2; exit 1; }; exit 0\n')
  assert executor.states(['a']) == executor.states(['a']) == {'a': 'gone'}
  (fake / 'calls').write_text('1')
  with pytest.raises(UserError, match='squeue refused: no answer'):
    slurm.Slurm(slurm.Site(), fake, 'sae-').states(['a'])


def test_no_slurm_is_said_in_one_line(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(UserError, match='squeue is not on the PATH'):
    slurm.Slurm(slurm.Site(), tmp_path, 'sae-').states(['a'])


def test_dry_run_prints_scripts_and_sends_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv('PATH', str(tmp_path))
  (tmp_path / 'cells.py').write_text(TWO_RANKS)
  argv = [
    f'--sweep={tmp_path / "cells.py"}',
    f'--ledger={tmp_path / "ledger"}',
    '--executor=slurm',
    '--dry_run',
  ]
  with pytest.raises(SystemExit) as ended:
    launch.main([*argv, '--flops_per_second=1e9'])
  told = capsys.readouterr()
  assert not ended.value.code and not (tmp_path / 'ledger').exists()
  assert '#SBATCH --nodes=2' in told.out and '-m sweeps.work' in told.out and 'exit "$code"' in told.out
  assert '1 cells, 1 to do' in told.err
