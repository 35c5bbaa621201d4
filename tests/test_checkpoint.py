"""Checkpoints on a disk that fills up, after an attempt that left one half-written, and by the thousand."""

import gc
import json
import os
import pathlib
import subprocess
import threading

import jax
import numpy as np
import pytest

from sae_jax import checkpoint, files, metrics, schema
from sae_jax import train as training
from sae_jax.errors import UserError
from tests import cells


@pytest.fixture
def small_disk(tmp_path):
  """A filesystem of 1 MB, and a function that takes what is left of it."""
  mount = tmp_path / 'small'
  mount.mkdir()
  if subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', mount], capture_output=True
  ).returncode:
    pytest.skip('needs the right to mount')

  def fill() -> pathlib.Path:
    path = mount / 'of someone else'
    with pytest.raises(OSError, match='No space'), open(path, 'wb', buffering=0) as f:
      while True:
        f.write(bytes(4096))
    return path

  yield mount, fill
  subprocess.run(['umount', '-l', mount], check=True)


def state(value: float) -> dict:
  return {'w_FD': jax.device_put(np.full((101, 13), value, np.float32))}


def restored(workdir) -> tuple | None:
  abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state(0.0))
  checkpoints = checkpoint.Checkpoints(str(workdir), 'cell')
  found = checkpoints.restore(abstract, note=print)
  checkpoints.close()
  return found


def saved(workdir, step: int, value: float) -> None:
  checkpoints = checkpoint.Checkpoints(str(workdir), 'cell')
  checkpoints.save(step, state(value), {'at': step})
  checkpoints.close()


def test_full_disk_during_a_save_keeps_the_one_before(small_disk):
  mount, fill = small_disk
  saved(mount, 1, 1.0)
  others = fill()
  with pytest.raises(UserError, match='no space left') as full:
    saved(mount, 2, 2.0)
  others.unlink()
  metrics.record_failure(str(mount), full.value)
  assert not json.loads((mount / schema.FAILURE).read_text())['permanent']
  found, facts = restored(mount)
  assert facts == {'at': 1} and np.all(np.asarray(found['w_FD']) == 1.0)
  saved(mount, 2, 2.0)
  found, facts = restored(mount)
  assert facts == {'at': 2} and np.all(np.asarray(found['w_FD']) == 2.0)


def test_full_disk_at_metrics_and_result_leaves_no_half_line_and_no_result(small_disk):
  mount, fill = small_disk
  log = metrics.MetricsFile(str(mount), 'cell')
  log.write(1, {'eval/nmse': 0.5})
  others = fill()
  with pytest.raises(OSError, match='No space') as full:
    for step in range(2, 1000):  # what is left of the last block of the file
      log.write(step, {'eval/nmse': 0.5, 'text': 'x' * 100})
  assert files.is_disk_full(full.value)
  with pytest.raises(OSError, match='No space'):
    cells.finish(str(mount), cells.cell(), git_commit='x' * 5000)
  assert files.listdir(str(mount)) == ['metrics.jsonl', 'of someone else']
  metrics.record_failure(str(mount), full.value)  # says so, and raises nothing
  assert not (mount / schema.RESULT).exists()
  others.unlink()
  steps = [line['step'] for line in metrics.read_metrics(str(mount), 'cell')]
  metrics.MetricsFile(str(mount), 'cell').write(7777, {})
  assert [line['step'] for line in metrics.read_metrics(str(mount), 'cell')] == [*steps, 7777]
  cells.finish(str(mount), cells.cell())


def test_attempt_after_an_exception_waits_for_the_save_it_left(tmp_path):
  left = checkpoint.Checkpoints(str(tmp_path), 'cell')
  left.save(1, state(1.0), {'at': 1})
  _, facts = restored(tmp_path)  # no wait, no close: what an exception in a step leaves
  assert facts == {'at': 1}


def test_save_of_one_step_twice_keeps_the_first(tmp_path):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), 'cell')
  checkpoints.save(5, state(1.0), {'at': 5})
  checkpoints.save(5, state(1.0), {'at': 5})
  checkpoints.close()
  assert restored(tmp_path)[1] == {'at': 5}


def test_empty_and_foreign_steps(tmp_path, capsys):
  assert restored(tmp_path) is None
  saved(tmp_path, 3, 1.0)
  (tmp_path / 'ckpt' / '9').mkdir()
  (tmp_path / 'ckpt' / 'notes').mkdir()
  assert restored(tmp_path)[1] == {'at': 3}
  assert 'step 9 is damaged (the folder is empty)' in capsys.readouterr().out
  checkpoints = checkpoint.Checkpoints(str(tmp_path), 'another')
  with pytest.raises(UserError, match='is of cell cell, not another'):
    checkpoints.restore(state(0.0), note=print)
  checkpoints.close()


# ----- what a process keeps


def held() -> tuple[int, int]:
  """Descriptors and threads of this process."""
  gc.collect()
  return len(os.listdir('/proc/self/fd')), threading.active_count()


def resident_mb() -> float:
  return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20


def test_checkpoints_leave_no_descriptor_and_no_thread(tmp_path):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), 'cell')
  found = []
  for step in range(40):
    checkpoints.save(step, state(1.0), {'at': step})
    if step in (5, 39):
      checkpoints.wait()
      found.append(held())
  checkpoints.close()
  assert found[0] == found[1]


def test_attempts_that_ended_with_an_exception_leave_nothing(tmp_path):
  before = held()
  for i in range(5):
    left = checkpoint.Checkpoints(str(tmp_path / str(i)), 'cell')
    left.save(1, state(1.0), {'at': 1})
    del left
  checkpoint.close_abandoned()
  assert held() == before
  assert [restored(tmp_path / str(i))[1] for i in range(5)] == [{'at': 1}] * 5


@pytest.mark.chaos
def test_thousand_checkpoints_keep_a_process_as_it_was(tmp_path):
  checkpoints = checkpoint.Checkpoints(str(tmp_path), 'cell')
  found, memory = [], []
  for step in range(1001):
    checkpoints.save(step, state(1.0), {'at': step})
    if step % 250 == 0 and step:
      checkpoints.wait()
      found.append(held())
      memory.append(resident_mb())
  checkpoints.close()
  print(found, memory)
  assert len(set(found)) == 1
  # 33 kB each. tensorstore never frees the metrics that orbax asks it for at every save: 12 kB.
  assert memory[-1] - memory[0] < 25


@pytest.mark.chaos
def test_fifty_cells_keep_a_process_as_it_was(tmp_path):
  found, memory = [], []
  for seed in range(50):
    one = cells.cell(**{'train.seed': seed})
    assert training.train(one, str(tmp_path / one.id)) == 'done'
    if seed % 10 == 9:
      found.append(held())
      memory.append(resident_mb())
  print(found, memory)
  assert len(set(found)) == 1
  # jax keeps the last 2,048 traced functions; some 19 of a cell are its own.
  assert memory[-1] - memory[0] < 60
