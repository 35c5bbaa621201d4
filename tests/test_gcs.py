"""Ledgers in a bucket, through gcsfs and tensorstore as they are, against a fake store on a local port."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from sae_jax import checkpoint, files, lease, metrics, schema, training
from sae_jax.errors import UserError
from sweeps import grid, ledger
from tests import cells, fake_gcs
from tests.test_ledger import Clock, finish, make_sweep

pytest.importorskip('gcsfs', reason="needs gcsfs: pip install 'sae_jax[gcs]'")

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def served():
  with fake_gcs.FakeGCS() as store, pytest.MonkeyPatch.context() as patch:
    patch.setenv('STORAGE_EMULATOR_HOST', store.url)
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', store.url)
    yield store


@pytest.fixture
def store(served):
  """An empty bucket."""
  for name in served.names():
    served.remove(name)
  yield served
  served.before = served.after = lambda method, path: None


def is_upload(method: str, path: str) -> bool:
  """Whether a request finishes an object."""
  return method == 'POST' and '/upload/' in path and ('uploadType=resumable' not in path or 'upload_id' in path)


def test_create_has_one_winner(store):
  won, ready = [], threading.Barrier(13)

  def write(i):
    ready.wait()
    try:
      files.create('gs://bucket/a/claim', b'%d' % i)
      won.append(i)
    except FileExistsError:
      pass

  threads = [threading.Thread(target=write, args=(i,)) for i in range(13)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(won) == 1 and files.read('gs://bucket/a/claim') == b'%d' % won[0]


def test_create_whose_answer_was_lost_has_won(store):
  def lose_one_answer(method, path):
    if is_upload(method, path):
      store.after = lambda method, path: None
      raise fake_gcs.Dropped

  store.after = lose_one_answer
  files.create('gs://bucket/claim', b'mine')
  assert files.read('gs://bucket/claim') == b'mine' and store.after is not lose_one_answer
  with pytest.raises(FileExistsError):
    files.create('gs://bucket/claim', b'mine')


def test_reader_sees_a_whole_file_while_it_is_replaced(store):
  files.replace('gs://bucket/x', b'short')
  store.after = lambda method, path: store.write('x', b'rather long')
  assert files.read('gs://bucket/x') == b'short'
  assert files.read('gs://bucket/x') == b'rather long'


def test_no_more_is_read_than_the_limit_allows(store):
  store.write('empty', b'')
  assert files.read('gs://bucket/empty') == b''
  store.write('large', b'x' * (schema.SMALL + 10))
  with pytest.raises(schema.Broken, match=f'more bytes, more than {schema.SMALL}'):
    files.read('gs://bucket/large')
  with pytest.raises(FileNotFoundError):
    files.read('gs://bucket/nothing')


def test_folders(store):
  for i in range(1003):  # more than a page
    store.write(f'many/{i:04d}/x', b'')
  assert files.listdir('gs://bucket/many') == [f'{i:04d}' for i in range(1003)]
  files.create('gs://bucket/a/b/c', b'123')
  files.create('gs://bucket/a/d', b'45')
  assert files.listdir('gs://bucket/a') == ['b', 'd'] and files.size('gs://bucket/a') == 5
  files.move_tree('gs://bucket/a/b', 'gs://bucket/e/f')
  assert store.names('a') == ['a/d'] and store.names('e') == ['e/f/c'] and store.read('e/f/c') == b'123'
  assert files.listdir('gs://bucket/a/b') == []
  files.move('gs://bucket/e/f/c', 'gs://bucket/a/d')
  files.move('gs://bucket/e/f/c', 'gs://bucket/a/d')
  assert store.names('e') == [] and store.read('a/d') == b'123'
  files.move('gs://bucket/a/d', 'gs://bucket/e/f/c')
  files.create('gs://bucket/a/d', b'45')
  files.remove_tree('gs://bucket/e')
  files.remove_tree('gs://bucket/e')
  files.remove('gs://bucket/e/f/c')
  assert not files.exists('gs://bucket/e') and files.exists('gs://bucket/a')


def test_what_the_store_refuses_is_an_oserror_and_a_users_mistake_one_line(store):
  with pytest.raises(UserError, match=r'cannot write the ledger gs://nowhere/x: .*No such bucket'):
    ledger.Ledger('gs://nowhere/x').register(make_sweep([3]))

  def forbid(method, path):
    raise fake_gcs.Refused(403, 'anonymous has no storage.objects.get access')

  files.create('gs://bucket/x', b'')
  store.before = forbid
  for work in (files.exists, files.read, files.listdir, files.size, files.remove, files.remove_tree):
    with pytest.raises(OSError, match=r'has no storage\.objects\.get access') as error:
      work('gs://bucket/x')
    assert error.value.strerror
  with pytest.raises(UserError, match=r'cannot be read .* credentials'):
    ledger.Ledger('gs://bucket/x')


def test_lease_is_taken_over_once_and_its_holder_hears_of_it(store):
  first = ledger.Ledger('gs://bucket/ledger', clock=Clock())
  first.register(make_sweep([3]))
  cell_id = first.entries()[0].id
  watched = Clock()
  second = ledger.Ledger('gs://bucket/ledger', clock=watched)
  held = first.claim(cell_id)
  assert held is not None and second.claim(cell_id) is None
  assert [s.state for s in second.states()] == ['running']
  watched.now = 90.0
  successor = second.claim(cell_id)
  assert successor is not None and first.claim(cell_id) is None
  held._refreshed = -1e9  # time to look again
  with pytest.raises(lease.LeaseLost):
    held.check()
  finish(second, cell_id)
  successor.release()
  assert [s.state for s in first.states()] == ['done'] and first.claim(cell_id) is None
  with pytest.raises(FileExistsError):
    finish(first, cell_id)


def state(seed: int) -> dict:
  return {'w_FD': jax.device_put(np.random.default_rng(seed).normal(size=(101, 13)).astype(np.float32))}


def saved(workdir: str, step: int) -> None:
  checkpoints = checkpoint.Checkpoints(workdir, 'cell')
  checkpoints.save(step, state(step), {'at': step})
  checkpoints.close()


def restored(workdir: str) -> int | None:
  """The step that comes back, with its arrays."""
  abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state(0))
  checkpoints = checkpoint.Checkpoints(workdir, 'cell')
  found = checkpoints.restore(abstract, note=print)
  checkpoints.close()
  if found is None:
    return None
  at = found[1]['at']
  np.testing.assert_array_equal(found[0]['w_FD'], state(at)['w_FD'])
  return at


def test_unfinished_step_is_not_there(store):
  saved('gs://bucket/a', 1)
  store.remove('a/ckpt/1/commit_success.txt')
  assert restored('gs://bucket/a') is None and store.names('a/') == []
  saved('gs://bucket/a', 1)
  saved('gs://bucket/a', 2)
  store.remove('a/ckpt/2/commit_success.txt')
  assert restored('gs://bucket/a') == 1 and store.names('a/ckpt/2/') == store.names('a/corrupt/') == []
  saved('gs://bucket/a', 2)
  assert restored('gs://bucket/a') == 2


def test_damaged_step_is_set_aside_and_saved_again(store):
  saved('gs://bucket/a', 1)
  saved('gs://bucket/a', 2)
  (name,) = store.names('a/ckpt/2/state/ocdbt.process_0/d/')
  data = bytearray(store.read(name))
  data[len(data) // 2] ^= 1
  store.write(name, bytes(data))
  assert restored('gs://bucket/a') == 1
  assert store.names('a/ckpt/2/') == [] and store.names('a/corrupt/2-0/')
  saved('gs://bucket/a', 2)
  assert restored('gs://bucket/a') == 2


@pytest.mark.chaos
def test_cell_killed_in_the_middle_of_a_save_ends_with_the_bits_of_a_local_one(store, tmp_path):
  cell = cells.cell()
  assert training.train(cell, str(tmp_path)) == 'done'
  flags = [f'--config.{key}={value}' for key, value in cells.SHARED.items()]
  worker = subprocess.Popen(
    [sys.executable, '-m', 'sae_jax.train', '--config=experiments/tiny.py', '--workdir=gs://bucket/cell', *flags],
    cwd=ROOT,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '8'},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )

  def kill_at_step_10(method, path):
    if is_upload(method, path) and 'ckpt%2F10%2Fstate' in path:
      worker.kill()

  store.after = kill_at_step_10
  said, _ = worker.communicate()
  store.after = lambda method, path: None
  assert worker.returncode == -signal.SIGKILL, said
  assert store.names('cell/ckpt/10/') and 'cell/ckpt/10/commit_success.txt' not in store.names()
  assert training.train(cell, 'gs://bucket/cell') == 'done'
  got, expected = (json.loads(files.read(files.join(d, 'result.json'))) for d in ('gs://bucket/cell', str(tmp_path)))
  assert got['params_digest'] == expected['params_digest'] and got['nmse'] == expected['nmse'] and got['bit_exact']
  assert [name for name in files.listdir('gs://bucket/cell') if name.startswith('metrics')] == [
    'metrics.0000.jsonl',
    'metrics.0001.jsonl',
  ]
  curves = [
    [{key: value for key, value in line.items() if key != 'wall_s'} for line in metrics.read_metrics(d, cell.id)]
    for d in ('gs://bucket/cell', str(tmp_path))
  ]
  assert curves[0] == curves[1]


@pytest.mark.chaos
def test_worker_trains_and_keeps_its_compiled_programs_in_the_bucket(store):
  small = cells.cell()
  sweep = grid.Sweep('small', 'experiments/tiny.py', ((cells.SHARED, small),), dropped=0)
  ledger.Ledger('gs://bucket/sweep').register(sweep)
  argv = [sys.executable, '-m', 'sweeps.work', '--ledger=gs://bucket/sweep']
  env = os.environ | {'JAX_COMPILATION_CACHE_DIR': ''}
  assert subprocess.run(argv, cwd=ROOT, env=env, capture_output=True).returncode == 0
  names = list(store.names())
  assert any(name.endswith('/result.json') for name in names)
  assert any(name.startswith('sweep/compile_cache/jit_step') for name in names)
