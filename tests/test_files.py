import errno
import importlib
import os
import sys

import fsspec
import pytest

from sae_jax import files
from sae_jax.errors import UserError


@pytest.fixture(params=['local', 'memory'])
def folder(request, tmp_path):
  if request.param == 'local':
    yield str(tmp_path / 'x')
  else:
    yield 'memory://files'
    if fsspec.filesystem('memory').exists('/files'):
      fsspec.filesystem('memory').rm('/files', recursive=True)


def test_tree_is_weighed_and_removed(folder):
  assert files.size(folder) == 0
  files.create(files.join(folder, 'a', 'b'), b'12345')
  files.replace(files.join(folder, 'c'), b'67')
  assert files.size(folder) == 7
  files.remove_tree(files.join(folder, 'a'))
  assert files.size(folder) == 2 and files.listdir(folder) == ['c']
  files.remove_tree(files.join(folder, 'a'))
  files.create(files.join(folder, 'd', 'e', 'f'), b'8')
  files.move_tree(files.join(folder, 'd'), files.join(folder, 'g', 'h'))
  assert files.listdir(folder) == ['c', 'g'] and files.read(files.join(folder, 'g', 'h', 'e', 'f')) == b'8'


def test_filesystem_without_hard_links_is_refused_with_the_reason(tmp_path, monkeypatch):
  def no_links(*_):
    raise PermissionError(errno.EPERM, 'Operation not permitted')

  monkeypatch.setattr(os, 'link', no_links)
  with pytest.raises(UserError, match=r'no hard links.*use another folder'):
    files.create(str(tmp_path / 'result.json'), b'{}')
  assert list(tmp_path.iterdir()) == []


def test_missing_package_of_a_bucket_names_the_extra(monkeypatch):
  monkeypatch.delitem(importlib.import_module('fsspec.registry')._registry, 'gs', raising=False)
  monkeypatch.setitem(sys.modules, 'gcsfs', None)
  with pytest.raises(UserError, match=r"gs:// needs .* pip install 'sae_jax\[gcs\]'"):
    files.read('gs://bucket/x')


def test_unknown_protocol_is_one_line():
  with pytest.raises(UserError, match='nonsense'):
    files.exists('nonsense://x')


def test_disk_full_is_told_from_other_errors():
  assert files.is_disk_full(OSError(errno.EDQUOT, 'over quota'))
  assert not files.is_disk_full(OSError(errno.EIO, 'bad disk'))
  try:
    try:
      raise ValueError('RESOURCE_EXHAUSTED: [OS error 28: ENOSPC No space left on device]')
    except ValueError as error:
      raise RuntimeError('a save failed') from error
  except RuntimeError as error:
    assert files.is_disk_full(error)
  assert not files.is_disk_full(ValueError('RESOURCE_EXHAUSTED: out of memory while allocating'))


def test_failed_write_leaves_the_old_file_and_no_rest(folder, monkeypatch):
  path = files.join(folder, 'sweep.json')
  files.replace(path, b'old')
  if not files.is_local(path):
    return

  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full)
  for write in (files.replace, files.create):
    with pytest.raises(OSError, match='No space'):
      write(path, b'new')
  assert files.read(path) == b'old' and files.listdir(folder) == ['sweep.json']
