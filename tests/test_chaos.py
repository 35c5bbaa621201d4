"""A sweep survives what happens to sweeps, and ends with the bits of one that nothing happened to."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from sae_jax import metrics, training
from sweeps import grid, ledger, work
from tests import cells, chaos

pytestmark = pytest.mark.chaos
ONE = """
from experiments import tiny
from tests import cells
EXPERIMENT = tiny
def sweep(): return [cells.SHARED | {'train.seed': 0}]
"""


TWO = """
from experiments import tiny
from tests import cells
EXPERIMENT = tiny
def sweep(): return [cells.SHARED | {'train.seed': seed} for seed in (0, 1)]
"""


def digests(path: pathlib.Path) -> dict[str, str]:
  """Of the finished cells of a ledger."""
  results = [json.loads(file.read_text()) for file in path.glob('cells/*/result.json')]
  return {result['id']: result['params_digest'] for result in results}


# Each kills this process at one moment of a cell's life. The first ends the driver, the others a worker.
HOOKS = {
  'config': """
create_missing = files.create_missing
def killed(contents):
  create_missing(contents)
  die()
files.create_missing = killed
""",
  'claim': """
acquire = lease.Lease.acquire
def killed(self):
  acquire(self)
  die()
lease.Lease.acquire = killed
""",
  'first save': """
save = checkpoint.Checkpoints.save
def killed(self, *args):
  save(self, *args)
  die()
checkpoint.Checkpoints.save = killed
""",
  'middle of a save': """
rename = os.rename
def killed(old, new, **named):
  if 'orbax-checkpoint-tmp' in str(old) and '15' in str(old): die()
  rename(old, new, **named)
os.rename = os.replace = killed
""",
  'result': """
create = files.create
def killed(path, data):
  if path.endswith('result.json'): die()
  create(path, data)
files.create = killed
""",
  'release': """
release = lease.Lease.release
lease.Lease.release = lambda self: die()
""",
}
KILLED = """
import os, signal, sys
from sae_jax import checkpoint, files, lease
from sweeps import launch, work
def die(): os.kill(os.getpid(), signal.SIGKILL)
%s
sys.exit((launch if sys.argv[1].startswith('--sweep') else work).main(sys.argv[1:]))
"""


@pytest.mark.parametrize('hook', HOOKS)
def test_kill_at_any_moment_of_a_cell_changes_nothing(hook, trained, tmp_path):
  (tmp_path / 'cells.py').write_text(ONE)
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  launch_it = [f'--sweep={tmp_path / "cells.py"}', f'--ledger={store.path}', '--workers=0']

  def run(*code: str) -> int:
    env = os.environ | {'JAX_PLATFORMS': 'cpu'}
    return subprocess.run([sys.executable, *code], cwd=chaos.ROOT, env=env, capture_output=True).returncode

  if hook == 'config':
    assert run('-c', KILLED % HOOKS[hook], *launch_it) == -signal.SIGKILL
    assert not (tmp_path / 'ledger' / 'sweep.json').exists()
  store.register(grid.build(str(tmp_path / 'cells.py')))
  (entry,) = store.entries()
  folder = pathlib.Path(store.folder(entry.id))
  if hook != 'config':
    assert run('-c', KILLED % HOOKS[hook], f'--ledger={store.path}') == -signal.SIGKILL
    assert (folder / 'result.json').exists() == (hook == 'release')
  assert work.run(store, training.train_group, stop=cells.NeverTold()) == 0
  got, expected = (json.loads((path / 'result.json').read_text()) for path in (folder, trained / 'cells' / entry.id))
  assert got['params_digest'] == expected['params_digest'] and got['bit_exact']
  assert store.states()[0].state == 'done' and store.states()[0].attempts == 0
  steps = [
    [line['step'] for line in metrics.read_metrics(str(path), entry.id)]
    for path in (folder, trained / 'cells' / entry.id)
  ]
  assert steps[0] == steps[1]
  assert not list(folder.rglob('*orbax-checkpoint-tmp*'))


def test_drivers_at_once_on_one_ledger_share_the_cells(trained, tmp_path):
  sweep, truth = chaos.Sweep(tmp_path / 'sweep', workers=1, grid=TWO), digests(trained)
  assert [driver.wait() for driver in [sweep.start() for _ in range(3)]] == [0] * 3
  assert sweep.digests() == truth
  assert set(sweep.times_done().values()) == {1} and set(sweep.times_done()) == set(truth)


def test_sigterm_while_compiling_is_kept_until_the_first_step(trained, tmp_path):
  sweep = chaos.Sweep(tmp_path / 'sweep', grid=TWO)
  store = ledger.Ledger(str(sweep.path))
  store.register(grid.build(str(sweep.folder / 'cells.py')))
  entry = store.entries()[0]
  argv = [sys.executable, '-m', 'sweeps.work', f'--ledger={store.path}', f'--cell={entry.id}']

  def start() -> subprocess.Popen:
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': ''}  # that it does compile
    return subprocess.Popen(argv, cwd=chaos.ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

  worker = start()
  while not (claims := list(pathlib.Path(store.folder(entry.id)).glob('claims/*.json'))):
    assert worker.poll() is None
    time.sleep(0.005)
  assert claims and not (pathlib.Path(store.folder(entry.id)) / 'metrics.jsonl').exists()
  worker.send_signal(signal.SIGTERM)
  assert worker.wait() == 42
  assert [path.name for path in pathlib.Path(store.folder(entry.id)).glob('ckpt/*')] == ['1']
  state, *others = store.states()
  assert (state.state, state.attempts) == ('waiting', 0)
  assert start().wait() == 0
  assert sweep.digests() == {entry.id: digests(trained)[entry.id]}
  assert [s.state for s in others] == ['waiting']
