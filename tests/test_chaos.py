"""A sweep survives what happens to sweeps, and ends with the bits of one that nothing happened to."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from sweeps import grid, ledger
from tests import chaos

pytestmark = pytest.mark.chaos


@pytest.fixture(scope='module')
def truth(tmp_path_factory):
  return chaos.undisturbed(tmp_path_factory.mktemp('undisturbed') / 'sweep', limit_s=300)


def test_twenty_kills_lose_double_and_change_nothing(truth, tmp_path):
  report = chaos.run(tmp_path, truth, kills=20, seed=0, limit_s=900)
  print(report)
  assert report['kills'] >= 20 and chaos.flawless(report), report


@pytest.mark.parametrize('drivers', [2, 4])
def test_drivers_at_once_on_one_ledger_share_the_cells(truth, tmp_path, drivers):
  sweep = chaos.Sweep(tmp_path / 'sweep', workers=1)
  assert [driver.wait() for driver in [sweep.start() for _ in range(drivers)]] == [0] * drivers
  assert sweep.digests() == truth
  assert set(sweep.times_done().values()) == {1} and set(sweep.times_done()) == set(truth)


def test_sigterm_while_compiling_is_kept_until_the_first_step(truth, tmp_path):
  sweep = chaos.Sweep(tmp_path / 'sweep')
  store = ledger.Ledger(str(sweep.path))
  store.register(grid.build(str(sweep.folder / 'cells.py')))
  cell = store.cells()[0]
  argv = [sys.executable, '-m', 'sweeps.work', f'--ledger={store.path}', f'--cell={cell.id}']

  def start() -> subprocess.Popen:
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': ''}  # that it does compile
    return subprocess.Popen(
      argv, cwd=chaos.ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )

  worker = start()
  while not (claims := list(pathlib.Path(store.folder(cell.id)).glob('claims/*.json'))):
    assert worker.poll() is None
    time.sleep(0.005)
  assert claims and not (pathlib.Path(store.folder(cell.id)) / 'metrics.jsonl').exists()
  worker.send_signal(signal.SIGTERM)
  assert worker.wait() == 42
  assert [path.name for path in pathlib.Path(store.folder(cell.id)).glob('ckpt/*')] == ['1']
  state, *others = store.states()
  assert (state.state, state.attempts) == ('waiting', 0)
  assert start().wait() == 0
  assert sweep.digests() == {cell.id: truth[cell.id]}
  assert [s.state for s in others] == ['waiting'] * 3
