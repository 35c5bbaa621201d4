"""Launches in real processes. The promise: kill anything at any time, start it again, each cell is done once."""

import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from sae_jax import flops, lease, metrics, schema
from sae_jax.errors import HOST_BROKEN
from sweeps import grid, launch, ledger, preview, status
from sweeps.executors import Job, local
from tests import cells

SHORT = """
from experiments import tiny
from sweeps import grid
from sweeps.grids import tiny as six
EXPERIMENT = tiny
def sweep():
  return grid.product(six.sweep(), grid.param('train.tokens', [256 * 20]))
"""
# What is really trained has the one shape of all tests, and is compiled once for them.
SHARED = """
from experiments import tiny
from sweeps import grid
from tests import cells
EXPERIMENT = tiny
def sweep():
  return grid.product([cells.SHARED | MORE], grid.param(VARIES))
"""
SIX = SHARED.replace('MORE', '{}').replace('VARIES', "'train.seed', range(6)")
# Long enough to be hit in the middle, one cell a worker.
LONG = SHARED.replace(
  'cells.SHARED | MORE',
  "cells.SHARED | {'train.tokens': 40 * 600, 'train.checkpoint_every': 50, 'eval.per_decade': 1}",
).replace('VARIES', "'train.seed', range(%d)")
# One cell diverges in its first steps.
DIVERGING = SHARED.replace('MORE', '{}').replace(
  'VARIES', "'optim.learning_rate', [1e30, cells.cell().optim.learning_rate]"
)
ENV = os.environ | {'JAX_PLATFORMS': 'cpu'}


def command(folder, *flags, text=None, name='cells.py'):
  if text is not None:
    (folder / name).write_text(text)
  argv = [sys.executable, '-m', 'sweeps.launch', f'--sweep={folder / name}', f'--ledger={folder / "ledger"}']
  return [*argv, '--executor=local', *flags]


def finish(argv):
  return subprocess.run(argv, env=ENV, capture_output=True, text=True)


def until(condition, what):
  """Waits for something to become true; `what` is for whoever reads the traceback of a hang."""
  del what
  while not (found := condition()):
    time.sleep(0.02)
  return found


def results(store):
  return {
    entry.id: json.loads((pathlib.Path(store.folder(entry.id)) / schema.RESULT).read_text())
    for entry in store.entries()
  }


def saved_steps(folder):
  return [int(p.name) for p in pathlib.Path(folder).glob('ckpt/*') if p.name.isdigit()]


def holders(store):
  """Worker processes by the cell they are training, once a checkpoint of theirs exists."""
  found = {}
  for s in store.states():
    if s.state == 'running' and saved_steps(store.folder(s.entry.id)):
      found[s.entry.id] = int(s.reason.split()[1])
  return found


@pytest.fixture
def start():
  """Starts a driver in a process group of its own, so that a signal to it is as from a terminal."""
  started = []

  def begin(argv):
    started.append(subprocess.Popen(argv, env=ENV, stdout=subprocess.PIPE, text=True, start_new_session=True))
    return started[-1]

  yield begin
  for driver in started:
    driver.kill()
    driver.wait()
    driver.stdout.close()


def alive(pid):
  return lease.process_start(pid) != -1


# ----- whole sweeps


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A folder with the six short cells trained by two workers, and the driver's output."""
  folder = tmp_path_factory.mktemp('finished')
  argv = command(folder, '--workers=2', text=SIX)
  planned = finish([*argv, '--dry_run'])
  assert planned.returncode == 0 and not (folder / 'ledger').exists()
  return folder, planned.stdout, finish(argv)


def test_launch_trains_every_cell(finished):
  folder, _, ran = finished
  assert ran.returncode == 0, ran.stdout + ran.stderr
  store = ledger.Ledger(str(folder / 'ledger'))
  assert all(s.state == 'done' for s in store.states())
  found = results(store)
  assert sorted(r['seed'] for r in found.values()) == list(range(6))
  for entry in store.entries():
    assert [p.name for p in (folder / 'ledger/cells' / entry.id / 'claims').glob('*.json')] == ['1.json']
    assert not (folder / 'ledger/cells' / entry.id / schema.FAILURE).exists()
  assert 'todo 6' in ran.stdout and '6 done, 0 running, 0 failed, 0 waiting' in ran.stdout
  assert {p.name for p in (folder / 'ledger/logs').iterdir()} == {'worker-0.log', 'worker-1.log'}


def test_second_launch_does_nothing(finished):
  folder, _, _ = finished
  before = {p: p.stat().st_mtime_ns for p in (folder / 'ledger').rglob('*') if p.is_file()}
  again = finish(command(folder))
  assert again.returncode == 0 and 'todo 0' in again.stdout
  assert before == {p: p.stat().st_mtime_ns for p in (folder / 'ledger').rglob('*') if p.is_file()}


def test_nothing_to_do_needs_no_jax(finished):
  folder, _, _ = finished
  code = (
    'import sys\nfrom sweeps import launch\n'
    'try: launch.main(sys.argv[1:])\n'
    'except SystemExit as end: sys.exit(end.code or "jax" in sys.modules)'
  )
  assert finish([sys.executable, '-c', code, *command(folder)[3:]]).returncode == 0


def test_dry_run_lists_cells_and_cost(finished):
  folder, planned, _ = finished
  for entry in ledger.Ledger(str(folder / 'ledger')).entries():
    (line,) = [line for line in planned.splitlines() if entry.id in line]
    assert grid.label(entry.overrides) in line and ' 20 ' in line and line.endswith('waiting')
  assert '6 cells, 6 to do' in planned and 'on 2 workers' in planned and 'no cell has finished yet' in planned
  after = finish(command(folder, '--dry_run')).stdout
  assert '6 cells, 0 to do' in after and 'measured on the finished cells' in after


def test_dry_run_takes_a_stated_speed(tmp_path):
  ran = finish(command(tmp_path, '--dry_run', '--flops_per_second=1e6', '--workers=3', text=SHORT))
  sweep = grid.build(str(tmp_path / 'cells.py'))
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  states = preview.states_of(sweep, store, 3)
  assert ran.stdout.strip() == preview.table('cells', store, states, 3, 1e6)
  # Dense FLOPs of the cells are as 1:1:2:2:4:4, so three workers need the largest, then a 2, then none.
  dense = [flops.cell_flops(c)['dense'] for _, c in sweep.cells]
  assert f'about {status.duration(max(max(dense), sum(dense) / 3) / 1e6)} on 3 workers' in ran.stdout


def test_diverging_cell_fails_for_good_and_alone(tmp_path):
  ran = finish(command(tmp_path, text=DIVERGING))
  assert ran.returncode == 1, ran.stdout + ran.stderr
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  assert [s.state for s in store.states()] == ['failed', 'done']
  assert store.states()[0].attempts == 1 and 'Diverged' in store.states()[0].reason
  assert 'sweeps.retry' in ran.stdout and 'learning_rate=1e+30' in ran.stdout
  again = finish(command(tmp_path))
  assert again.returncode == 1 and 'todo 0' in again.stdout


def test_no_workers_fills_the_ledger_for_those_started_by_hand(tmp_path, capsys):
  with pytest.raises(SystemExit) as ended:
    launch.main([*command(tmp_path, text=SHORT)[3:], '--workers=0'])
  assert not ended.value.code and 'python -m sweeps.work --ledger=' in capsys.readouterr().out
  assert [s.state for s in ledger.Ledger(str(tmp_path / 'ledger')).states()] == ['waiting'] * 6


# ----- kills and interrupts


def test_killed_worker_and_killed_driver_lose_nothing(tmp_path, start):
  argv = command(tmp_path, '--workers=2', text=LONG % 2)
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  driver = start(argv)
  until(lambda: (tmp_path / 'ledger/sweep.json').exists(), 'the ledger')
  (cell_id, victim), *_ = until(lambda: holders(store).items(), 'a cell in training')
  os.kill(victim, signal.SIGKILL)
  failure = pathlib.Path(store.folder(cell_id)) / schema.FAILURE
  until(failure.exists, 'the failure to be charged')
  assert json.loads(failure.read_text())['exit_code'] == 128 + 9
  until(lambda: holders(store).get(cell_id, victim) != victim, 'another worker to take the cell')
  workers = list(holders(store).values())
  driver.kill()
  driver.wait()
  until(lambda: not any(map(alive, workers)), 'the workers to follow their driver')
  assert not all(s.state == 'done' for s in store.states())

  ran = finish(argv)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert all(s.state == 'done' for s in store.states()) and not failure.exists()
  steps = [m['step'] for m in metrics.read_metrics(store.folder(cell_id), cell_id)]
  assert steps[-1] == 600 and len(set(steps)) == len(steps)
  assert all(r['bit_exact'] for r in results(store).values())


def test_ctrl_c_saves_and_the_same_command_resumes(tmp_path, start):
  argv = command(tmp_path, text=LONG % 1)
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  driver = start(argv)
  until(lambda: (tmp_path / 'ledger/sweep.json').exists(), 'the ledger')
  ((cell_id, worker),) = until(lambda: holders(store).items(), 'a cell in training')
  os.killpg(driver.pid, signal.SIGINT)
  said, _ = driver.communicate()
  assert driver.returncode == 130, said
  assert 'the same command resumes' in said and not alive(worker)
  states = {s.entry.id: s for s in store.states()}
  assert all(s.state == 'waiting' and not s.attempts for s in states.values())
  saved = max(saved_steps(store.folder(cell_id)))
  ran = finish(argv)
  assert ran.returncode == 0, ran.stdout + ran.stderr
  assert 0 < saved < 600 and len(results(store)) == 1
  claims = pathlib.Path(store.folder(cell_id)) / 'claims'
  assert sorted(p.name for p in claims.glob('*.json')) == ['1.json', '2.json']


# ----- the local executor


def job(code, name='worker-0'):
  return Job(name, (sys.executable, '-c', code))


def settle(executor, name):
  until(lambda: executor.states([name])[name] == 'gone', f'{name} to end')


def test_local_restarts_after_preemption_and_appends_the_log(tmp_path):
  code = f'import pathlib, sys\np = pathlib.Path({str(tmp_path / "ran")!r})\nprint("hi")\n'
  code += 'n = len(p.read_text()) if p.exists() else 0\np.write_text("x" * (n + 1))\nsys.exit(42 if n < 2 else 0)'
  executor = local.Local(tmp_path / 'logs', lambda pid, started, code: False)
  assert executor.submit(job(code)) == executor.submit(job(code)) == 'worker-0'
  settle(executor, 'worker-0')
  assert (tmp_path / 'ran').read_text() == 'xxx' and executor.log('worker-0').read_text() == 'hi\n' * 3


def test_local_asks_before_restarting_a_crash(tmp_path):
  asked = []
  executor = local.Local(tmp_path, lambda pid, started, code: asked.append((pid, code)) or len(asked) < 3)
  executor.submit(job('import os, signal; os.kill(os.getpid(), signal.SIGKILL)'))
  settle(executor, 'worker-0')
  assert executor.states(['worker-0', 'unknown']) == {'worker-0': 'gone', 'unknown': 'gone'}
  assert [code for _, code in asked] == [-9] * 3 and len({pid for pid, _ in asked}) == 3


def test_local_cancel_asks_and_then_kills(tmp_path):
  executor = local.Local(tmp_path, lambda pid, started, code: True)
  stubborn = 'import signal, time\nsignal.signal(signal.SIGTERM, lambda *_: print("asked", flush=True))\n'
  executor.submit(job(stubborn + 'print("ready", flush=True)\nwhile True: time.sleep(0.1)'))
  log = executor.log('worker-0')
  until(lambda: log.read_text() == 'ready\n', 'the process')
  executor.cancel('worker-0')
  until(lambda: log.read_text() == 'ready\nasked\n', 'the signal')
  executor.cancel('worker-0')
  settle(executor, 'worker-0')
  executor.cancel('worker-0')
  executor.cancel('unknown')


@pytest.mark.parametrize(
  ('gpus', 'workers', 'seen'),
  [
    ('', 2, [None, None]),
    ('0,1,2,3', 1, [None]),
    ('0,1,2,3', 2, ['0,1', '2,3']),
    ('4,5,6', 2, ['4', '5']),
    ('4,5', 3, ['4', '5', '4']),
  ],
)
def test_device_env_shares_the_gpus_out(monkeypatch, gpus, workers, seen):
  monkeypatch.setenv('CUDA_VISIBLE_DEVICES', gpus)
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  envs = [local.device_env(i, workers) for i in range(workers)]
  assert [env.get('CUDA_VISIBLE_DEVICES') for env in envs] == seen
  shared = [e for e in envs if 'XLA_PYTHON_CLIENT_MEM_FRACTION' in e]
  assert len(shared) == (workers if workers > max(1, len(gpus.split(','))) and gpus else 0)


# ----- a machine at fault


def test_worker_that_its_machine_ends_is_restarted_while_something_is_gained(tmp_path):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(cells.sweep({'sae.k': 4}, {'sae.k': 5}))
  restarts = launch.Restarts(store, 3, tmp_path)
  first, second = (s.entry for s in store.states())
  held = store.claim(first.id)  # what a worker may leave that could not even release its lease
  assert restarts(os.getpid(), 0, HOST_BROKEN) and restarts(os.getpid(), 0, HOST_BROKEN)
  (tmp_path / 'ledger/cells' / first.id / 'ckpt/5').mkdir(parents=True)
  assert restarts(os.getpid(), 0, HOST_BROKEN) and restarts(os.getpid(), 0, HOST_BROKEN)
  cells.finish(store.folder(second.id), second.cell)
  assert restarts(os.getpid(), 0, HOST_BROKEN) and restarts(os.getpid(), 0, HOST_BROKEN)
  assert not restarts.host_broken
  assert not restarts(os.getpid(), 0, HOST_BROKEN) and restarts.host_broken
  assert [s.attempts for s in store.states()] == [0, 0]
  held.release()


def test_launch_gives_up_on_a_machine_that_stays_broken(tmp_path, monkeypatch, capsys):
  # sitecustomize is run before the worker, and stands for a machine that cannot even start it.
  (tmp_path / 'sitecustomize.py').write_text(f'import os\nos._exit({HOST_BROKEN})\n')
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(cells.sweep({'sae.k': 4}))
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  monkeypatch.setattr(launch, '_catch_signals', list)
  launch._work_here(store, 1, 3, tmp_path / 'logs', None)
  said = capsys.readouterr().err.splitlines()[-1]
  assert said.startswith('error: 3 workers in a row ended by errors of this machine')
  assert [(s.state, s.attempts) for s in store.states()] == [('waiting', 0)]


def test_sweep_of_many_checkpoints_ends_clean_under_a_low_limit_of_open_files(tmp_path):
  text = SHARED.replace('MORE', "{'train.checkpoint_every': 1, 'eval.per_decade': 1}").replace(
    'VARIES', "'train.seed', range(2)"
  )
  limited = subprocess.run(
    command(tmp_path, text=text),
    env=ENV,
    capture_output=True,
    text=True,
    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (100, 100)),
  )
  assert limited.returncode == 0, limited.stdout + limited.stderr
  states = ledger.Ledger(str(tmp_path / 'ledger')).states()
  assert [(s.state, s.attempts) for s in states] == [('done', 0)] * 2
  assert 'ends after' not in (tmp_path / 'ledger/logs/worker-0.log').read_text()


# ----- mistakes


@pytest.mark.parametrize(
  ('flags', 'line'),
  [
    (['--workers=-1'], '--workers=-1 is not a whole number of at least 0'),
    (['--workers=x'], '--workers=x is not a whole number'),
    (['--gangs=0', '--executor=slurm'], '--gangs=0 is not a whole number of at least 1'),
    (['--gangs=2'], '--gangs has no meaning with --executor=local'),
    (['--executor=slurm', '--workers=2'], '--workers has no meaning with --executor=slurm'),
    (['--executor=slurm', '--site=missing.toml'], '--site=missing.toml'),
    (['--executor=jobset'], '--executor=jobset needs --site=FILE.toml'),
    (['--topology=v5e:2x2'], 'add --dry_run'),
    (['--dollars_per_chip_hour=1', '--dry_run'], '--dollars_per_chip_hour needs --topology'),
    (['--topology=v9:2x2', '--dry_run', '--flops_per_second=1'], "topology 'v9:2x2' is of no known chip"),
    (['--max_failures=0'], '--max_failures=0 is not a whole number of at least 1'),
    (['--flops_per_second=nan', '--dry_run'], '--flops_per_second=nan is not a positive number'),
    (['--ledger=s3://bucket/x'], 'no exclusive create'),
    (['--sweep=missing.py'], "no grid file at 'missing.py'"),
  ],
)
def test_launch_says_what_is_wrong_in_one_line(tmp_path, capsys, flags, line):
  with pytest.raises(SystemExit) as ended:
    launch.main([*command(tmp_path, text=SHORT)[3:], *flags])
  assert ended.value.code == 2
  (said,) = capsys.readouterr().err.splitlines()
  assert said.startswith('error: ') and line in said
  assert not (tmp_path / 'ledger').exists()


@pytest.mark.parametrize('flags', [[], ['--dry_run']])
def test_launch_refuses_the_ledger_of_another_sweep(tmp_path, capsys, flags):
  argv = command(tmp_path, text=SHORT)
  ledger.Ledger(str(tmp_path / 'ledger')).register(grid.build(str(tmp_path / 'cells.py')))
  other = command(tmp_path, *flags, text=SHORT, name='other.py')
  assert argv != other
  with pytest.raises(SystemExit) as ended:
    launch.main(other[3:])
  assert ended.value.code == 2
  assert "holds the sweep 'cells'" in capsys.readouterr().err


# ----- two at once


def test_local_tells_a_process_from_a_later_one_with_its_id(tmp_path):
  asked = []
  executor = local.Local(tmp_path, lambda pid, started, code: asked.append(started) or False)
  executor.submit(job('import sys; sys.stdin.read(); import time; time.sleep(0.2); sys.exit(3)'))
  (running,) = executor._running.values()
  assert running.started == lease.process_start(running.process.pid) > 0
  settle(executor, 'worker-0')
  assert asked == [running.started]


def test_launch_ends_although_a_worker_is_stopped(tmp_path, monkeypatch):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  sweep = cells.sweep({})
  store.register(sweep)
  (entry,) = store.entries()
  executor = local.Local(tmp_path / 'logs', lambda *_: False)
  executor.submit(job('import os, signal; os.kill(os.getpid(), signal.SIGSTOP)'))
  (running,) = executor._running.values()
  stat = pathlib.Path(f'/proc/{running.process.pid}/stat')
  until(lambda: stat.read_text().rpartition(')')[2].split()[0] == 'T', 'the worker to stop')
  cells.finish(store.folder(entry.id), entry.cell)
  monkeypatch.setattr(launch, 'GRACE_S', 0.0, raising=False)
  received = []
  monkeypatch.setattr(launch, '_nap', until_two(received))
  launch.drive(store, executor, [job('')], received, 3)
  assert not received and running.process.returncode == -signal.SIGKILL


def until_two(received):
  """A nap that gives up, as a person would, after many looks."""
  looks = []

  def nap(*_):
    time.sleep(0.02)
    looks.append(1)
    if len(looks) > 200:
      received.extend([signal.SIGINT] * 2)

  return nap


def test_launch_says_when_cells_it_asked_for_are_not_there(tmp_path, capsys):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(cells.sweep({}))
  (entry,) = store.entries()
  cells.finish(store.folder(entry.id), entry.cell)
  assert launch._verdict(store, {entry.id}, 3) == 0
  assert launch._verdict(store, {entry.id, 'f' * 12}, 3) == 1
  assert '1 cells of this grid are not in' in capsys.readouterr().out
