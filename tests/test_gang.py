"""Gangs of two real processes on one ledger: one lease, one outcome, and no rank left behind."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from sae_jax import schema, training
from sweeps import cancel, grid, ledger, work
from tests import cells

pytestmark = pytest.mark.chaos
# One device a rank, and no AuxK: every rank of every test compiles what it runs.
CELL = cells.SHARED | {'mesh.data': 2, 'loss.aux_coefficient': 0.0, 'train.tokens': 40 * 30}
ROOT = pathlib.Path(__file__).parents[1]
# A worker in whose 11th step something happens.
DISTURBED = """
import os, signal, sys, time
from sae_jax import files, training
from sweeps import ledger, work
ledger.Ledger.__init__.__kwdefaults__['refresh_s'] = 0.1
undisturbed = training.train_group
def train(cells, should_stop, **named):
  steps = []
  def disturbed():
    steps.append(1)
    if len(steps) == 11:
      %s
    elif len(steps) > 11:
      time.sleep(0.2)  # the ranks agree on a step in the background, and a cell this small would end meanwhile
    return should_stop()
  return undisturbed(cells, should_stop=disturbed, **named)
training.train_group = train
work.main(sys.argv[1:])
"""


def make_ledger(folder, *overrides) -> ledger.Ledger:
  resolved = tuple((o, cells.cell(**CELL | o)) for o in overrides)
  store = ledger.Ledger(str(folder))
  store.register(grid.Sweep('gang', 'experiments/tiny.py', resolved, dropped=0))
  return store


@pytest.fixture
def start():
  """Starts the ranks of a gang as an engine would; `disturb` gives one of them a line to run in its 11th step."""
  started = []

  def begin(store, *flags, disturb=None, **env):
    with socket.socket() as s:
      s.bind(('127.0.0.1', 0))
      port = s.getsockname()[1]
    gang = []
    for rank in range(2):
      code = ['-c', DISTURBED % disturb[1]] if disturb and disturb[0] == rank else ['-m', 'sweeps.work']
      argv = [sys.executable, *code, f'--ledger={store.path}', *flags]
      argv += [f'--coordinator=127.0.0.1:{port}', '--num_processes=2', f'--process_id={rank}']
      devices = {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'}
      gang.append(
        subprocess.Popen(
          argv,
          cwd=ROOT,
          env=os.environ | devices | env,
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
        )
      )
    started.extend(gang)
    return gang

  yield begin
  for process in started:
    process.kill()
    process.communicate()


def finish(gang) -> list[int]:
  said = [process.communicate() for process in gang]
  print(*[err[-3000:] for _, err in said])
  return [process.returncode for process in gang]


def finish_here(store) -> int:
  """Trains the rest in this process: on the same mesh the processes do not matter. What a worker would exit with."""
  return work.run(store, training.train_group, stop=cells.NeverTold())


def digests(store) -> dict[str, str]:
  found = {}
  for entry in store.entries():
    path = pathlib.Path(store.folder(entry.id)) / schema.RESULT
    if path.exists():
      found[entry.id] = json.loads(path.read_text())['params_digest']
  return found


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """Digests of two cells as one process trains them on the same mesh, by seed."""
  store = make_ledger(tmp_path_factory.mktemp('one') / 'ledger', {}, {'train.seed': 5})
  assert finish_here(store) == 0
  found = digests(store)
  return {entry.cell.train.seed: {entry.id: found[entry.id]} for entry in store.entries()}


@pytest.fixture
def undisturbed(alone):
  return alone[0]


def test_gang_leaves_a_diverging_cell_and_finishes_the_other(undisturbed, start, tmp_path):
  store = make_ledger(tmp_path / 'ledger', {}, {'optim.learning_rate': 1e30})
  assert finish(start(store)) == [1, 1]
  good, bad = store.states()
  assert digests(store) == undisturbed and good.entry.id in undisturbed
  assert (bad.state, bad.attempts) == ('failed', 1) and 'Diverged: not finite' in bad.reason


def test_gang_trains_a_group_to_the_bits_of_each_cell_alone(alone, start, tmp_path):
  store = make_ledger(tmp_path / 'ledger', {}, {'train.seed': 5}, {'optim.learning_rate': 1e30})
  sigterm = (1, 'os.kill(os.getpid(), signal.SIGTERM); time.sleep(3)')
  assert finish(start(store, '--group=3', disturb=sigterm)) == [42, 42]
  found = start(store, '--group=3')
  assert finish(found) == [1, 1]
  assert digests(store) == alone[0] | alone[5]
  assert [s.state for s in store.states()] == ['done', 'done', 'failed']
  assert 'Diverged: not finite' in store.states()[2].reason


def hurt(rank, happens, codes, **env):
  return pytest.param(rank, happens, env, codes, id=f'rank {rank}: {happens[:40]}')


@pytest.mark.parametrize(
  ('rank', 'happens', 'env', 'codes'),
  [
    # The rank that sleeps and the one that waits for it may both be the first to notice; -6 is jax's abort.
    hurt(1, 'time.sleep(1000)', {142, 134, -6}, SAE_JAX_STALL_S='4'),
    # The preemption service agrees on a step in the background; meanwhile a cell this small would end.
    hurt(1, 'os.kill(os.getpid(), signal.SIGTERM); time.sleep(3)', {42}),
    hurt(1, 'os.kill(os.getpid(), signal.SIGSTOP)', {134, -6}, SAE_JAX_HEARTBEAT_S='3'),
    # A rank that is gone is no fault of the cell, whatever the others' collectives raise.
    hurt(1, 'os.kill(os.getpid(), signal.SIGKILL)', {-9, 134, -6}, SAE_JAX_HEARTBEAT_S='3'),
    hurt(0, 'os.kill(os.getpid(), signal.SIGKILL)', {-9, 134, -6}, SAE_JAX_HEARTBEAT_S='3'),
    hurt(1, 'raise ValueError("in one rank")', {42}, SAE_JAX_HEARTBEAT_S='3'),
    hurt(1, 'raise OSError(28, "No space left on device")', {2}, SAE_JAX_HEARTBEAT_S='3'),
    hurt(1, 'raise OSError(24, "Too many open files")', {135}, SAE_JAX_HEARTBEAT_S='3'),
    hurt(0, 'raise OSError(24, "Too many open files")', {135}, SAE_JAX_HEARTBEAT_S='3'),
    hurt(0, 'raise work.lease.LeaseLost("taken")', {42}),
  ],
)
def test_disturbed_gang_ends_and_resumes_to_the_same_bits(undisturbed, start, tmp_path, rank, happens, env, codes):
  store = make_ledger(tmp_path / 'ledger', {})
  gang = start(store, disturb=(rank, happens), **env)
  if 'SIGSTOP' in happens:
    found = gang[1 - rank].wait()
    gang[rank].kill()  # as engines do on the first exit other than 0
    gang[rank].wait()
    found = {found}
  else:
    found = set(finish(gang))
  assert found <= codes
  assert not digests(store)
  (state,) = store.states()
  assert state.state == 'waiting'
  charged = {'raise ValueError': 'in one rank', 'sleep(1000)': 'Stalled: stalled: no step for'}
  expected = [reason for what, reason in charged.items() if what in happens]
  assert state.attempts == len(expected)
  assert all(reason in state.reason for reason in expected)
  if 'raise ValueError' in happens:  # rank 0 writes down where rank 1 was
    record = json.loads(pathlib.Path(store.folder(state.entry.id), 'failure.json').read_text())
    assert record['kind'] == 'RankFailed' and 'in disturbed' in record['traceback']
  assert finish_here(store) == 0
  assert digests(store) == undisturbed


def test_gang_that_waited_for_work_stops_together_idle_or_training(undisturbed, start, tmp_path):
  store = make_ledger(tmp_path / 'ledger', {})
  held = store.claim(store.entries()[0].id)
  gang = start(store)
  time.sleep(10)
  assert [process.poll() for process in gang] == [None, None]
  gang[1].send_signal(signal.SIGTERM)
  assert finish(gang) == [42, 42]
  gang = start(store, disturb=(1, 'os.kill(os.getpid(), signal.SIGTERM); time.sleep(3)'))
  time.sleep(10)  # rank 0 has asked for a stop many times, rank 1 never
  held.release()
  assert finish(gang) == [42, 42]
  assert finish_here(store) == 0
  assert digests(store) == undisturbed


def test_cancelled_cell_is_left_by_all_ranks_at_one_step(undisturbed, start, tmp_path):
  store = make_ledger(tmp_path / 'ledger', {})
  (entry,) = store.entries()
  write = 'files.replace(cells[0][1] + "/cancel.json", b"{}"); time.sleep(3)'
  assert finish(start(store, disturb=(0, write))) == [42, 42]
  assert store.states()[0].state == 'cancelled'
  assert [state.entry.id for state in cancel.undo(store, [])] == [entry.id]
  assert finish_here(store) == 0
  assert digests(store) == undisturbed
