import os
import pathlib
import time

import fsspec
import pytest

from sae_jax import files, metrics
from sae_jax.errors import UserError
from sweeps import gc, ledger
from tests import cells


@pytest.fixture(params=['local', 'memory'])
def store(request, tmp_path):
  """Cells in every state but running, each with a checkpoint; the second of the finished ones has no sae/."""
  store = ledger.Ledger(str(tmp_path / 'ledger') if request.param == 'local' else 'memory://gc')
  store.register(cells.sweep(*({'sae.k': k} for k in (1, 2, 3, 4))))
  done, bare, failed, _ = folders = [store.folder(entry.id) for entry in store.entries()]
  for folder in folders:
    files.create(files.join(folder, 'ckpt', '7', 'array'), b'x' * 1000)
    files.create(files.join(folder, 'corrupt', '5-0', 'array'), b'x' * 500)
    files.create(files.join(folder, 'claims', '1.json'), b'')
    if folder != bare:
      files.create(files.join(folder, 'sae', 'raw.safetensors'), b'x')
  for entry, folder in zip(store.entries(), (done, bare), strict=False):
    cells.finish(folder, entry.cell)
  metrics.record_failure(failed, UserError('bad value'))
  yield store
  if request.param == 'memory':
    fsspec.filesystem('memory').rm('/gc', recursive=True)


def run(*argv):
  with pytest.raises(SystemExit) as ended:
    gc.main(list(argv))
  return ended.value.code


def test_gc_frees_finished_cells_only(store, capsys):
  folders = [store.folder(entry.id) for entry in store.entries()]
  before = [files.listdir(folder) for folder in folders]
  assert run(f'--ledger={store.path}', '--dry_run') == 0
  assert capsys.readouterr().out.splitlines()[-1] == '1.5 kB would be freed in 1 finished cells'
  assert [files.listdir(folder) for folder in folders] == before
  assert run(f'--ledger={store.path}') == 0
  assert capsys.readouterr().out.splitlines()[-1] == '1.5 kB were freed in 1 finished cells'
  assert files.listdir(folders[0]) == ['claims', 'config.json', 'result.json', 'sae']
  assert [files.listdir(folder) for folder in folders[1:]] == before[1:]
  assert gc.find(store) == []


def test_gc_does_not_follow_links(tmp_path):
  outside = tmp_path / 'precious'
  (outside / '7').mkdir(parents=True)
  (outside / '7' / 'array').write_text('x')
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(cells.sweep({}))
  (entry,) = store.entries()
  folder = pathlib.Path(store.folder(entry.id))
  files.create(str(folder / 'sae' / 'x'), b'')
  cells.finish(str(folder), entry.cell)
  (folder / 'ckpt').symlink_to(outside)
  (garbage,) = gc.find(store)
  with pytest.raises(UserError, match='delete it by hand'):
    gc.free(garbage)
  assert (outside / '7' / 'array').exists()


def test_gc_refuses_a_linked_cell(tmp_path, capsys):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(cells.sweep({'sae.k': 1}, {'sae.k': 2}))
  for entry in store.entries():
    cells.finish(store.folder(entry.id), entry.cell)
    for name in ('sae', 'ckpt'):
      files.create(files.join(store.folder(entry.id), name, 'x'), b'x')
  outside, folder = tmp_path / 'precious', pathlib.Path(store.folder(store.entries()[1].id))
  folder.rename(outside)
  folder.symlink_to(outside)
  before = sorted(tmp_path.rglob('*'))
  assert run(f'--ledger={store.path}') == 2
  (said,) = capsys.readouterr().err.splitlines()
  assert f'{folder} is a link' in said
  assert sorted(tmp_path.rglob('*')) == before and (outside / 'ckpt' / 'x').exists()


def left(path, age, data=b'x' * 7):
  """A temporary as of a writer that was killed `age` seconds ago."""
  temporary = files._temporary(pathlib.Path(path))
  temporary.parent.mkdir(parents=True, exist_ok=True)
  temporary.write_bytes(data)
  os.utime(temporary, (time.time() - age,) * 2)
  return temporary


def test_gc_removes_what_killed_writers_left_a_day_ago(tmp_path, capsys):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(cells.sweep({'sae.k': 1}, {'sae.k': 2}))
  done, pending = [pathlib.Path(store.folder(entry.id)) for entry in store.entries()]
  cells.finish(str(done), store.entries()[0].cell)
  files.create(str(done / 'sae' / 'raw.safetensors'), b'x')
  inside = left(done / 'ckpt' / '7' / 'info.json', 2 * gc.DAY, b'x' * 1000)  # goes with its folder, and counts once
  measures = tmp_path / 'ledger' / 'measures' / 'ab'
  old = [left(place / 'a.json', 1.01 * gc.DAY) for place in (done, pending, measures)]
  young = left(pending / 'a.json', 0.99 * gc.DAY)
  other = measures / '.mine.tmp'
  other.write_bytes(b'x')
  outside = left(tmp_path / 'precious' / 'a.json', 2 * gc.DAY)
  linked = measures / old[0].name
  linked.symlink_to(outside)
  (measures / 'more').symlink_to(outside.parent)
  for path in (other, linked):
    os.utime(path, (0, 0), follow_symlinks=False)
  for options, verb in ((['--dry_run'], 'would be'), ([], 'were')):
    assert all(path.exists() for path in old)
    assert run(f'--ledger={store.path}', *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {f'{path}: 7 B, left by a writer that was killed' for path in old} <= {*lines}
    assert lines[-2:] == [
      f'21 B {verb} freed in 3 files that killed writers left',
      f'1.0 kB {verb} freed in 1 finished cells',
    ]
  assert not any(path.exists() for path in (*old, inside))
  assert all(path.exists() for path in (young, other, outside)) and linked.is_symlink()
