import errno
import importlib
import os
import sys
import tracemalloc

import fsspec
import pytest

from sae_jax import faults, files, schema
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
  for _ in range(2):  # what is not there leaves the other alone
    files.move(files.join(folder, 'g', 'h', 'e', 'f'), files.join(folder, 'c'))
    assert files.listdir(folder)[0] == 'c' and files.read(files.join(folder, 'c')) == b'8'
  assert files.listdir(files.join(folder, 'g', 'h', 'e')) == []


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
  assert faults.is_disk_full(OSError(errno.EDQUOT, 'over quota'))
  assert not faults.is_disk_full(OSError(errno.EIO, 'bad disk'))
  try:
    try:
      raise ValueError('RESOURCE_EXHAUSTED: [OS error 28: ENOSPC No space left on device]')
    except ValueError as error:
      raise RuntimeError('a save failed') from error
  except RuntimeError as error:
    assert faults.is_disk_full(error)
  assert not faults.is_disk_full(ValueError('RESOURCE_EXHAUSTED: out of memory while allocating'))


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


def wrapped(cause: BaseException) -> Exception:
  """As a library that catches an error and raises its own."""
  try:
    try:
      raise cause
    except BaseException:
      raise RuntimeError('cannot save')  # noqa: B904 (the context is what is tested)
  except RuntimeError as error:
    return error


def told(cause: BaseException) -> Exception:
  error = UserError(f'config.json cannot be written ({cause})')
  error.__cause__ = cause
  return error


HOST = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO, errno.ESTALE)


@pytest.mark.parametrize('number', HOST, ids=errno.errorcode.get)
def test_error_of_the_host_is_known_also_when_it_is_wrapped(number):
  error = OSError(number, os.strerror(number))
  assert all(map(faults.is_host_error, (error, wrapped(error), told(error), wrapped(told(wrapped(error))))))


def test_error_of_the_host_is_known_by_its_text():
  tensorstore = 'RESOURCE_EXHAUSTED: Error opening "x": Too many open files [os_error_code=\'24\']'
  for text in (tensorstore, 'Stale file handle', "can't start new thread", 'Cannot allocate memory'):
    assert faults.is_host_error(ValueError(text)) and faults.is_host_error(wrapped(ValueError(text)))


def test_other_errors_are_not_of_the_host():
  loop = ValueError('a')
  loop.__cause__ = loop
  hidden = wrapped(OSError(errno.EIO, 'x'))
  hidden.__suppress_context__ = True
  others = [OSError(n, os.strerror(n)) for n in (errno.ENOSPC, errno.EACCES, errno.ENOENT, errno.EEXIST)]
  for error in (
    *others,
    *map(wrapped, others),
    loop,
    hidden,
    UserError('k=3 is odd'),
    MemoryError('of the model'),
  ):
    assert not faults.is_host_error(error)


def test_create_missing_makes_what_is_not_there(tmp_path):
  for path in (str(tmp_path / 'local'), 'memory://missing'):
    files.create(files.join(path, 'a', 'x'), b'old')
    new, old = files.join(path, 'b', 'x'), files.join(path, 'a', 'x')
    assert files.create_missing({old: b'new', new: b'new'}) == [new]
    assert (files.read(old), files.read(new)) == (b'old', b'new')
  assert sorted(p.name for p in tmp_path.rglob('*')) == ['a', 'b', 'local', 'x', 'x']  # and nothing temporary


def test_version_changes_with_the_file(tmp_path):
  path = str(tmp_path / 'x')
  with pytest.raises(FileNotFoundError):
    files.version(path)
  files.replace(path, b'1')
  before = files.version(path)
  assert files.version(path) == before
  files.replace(path, b'2')
  assert files.version(path) != before


def test_replace_does_not_make_a_folder_that_is_gone(tmp_path):
  with pytest.raises(FileNotFoundError):
    files.replace(str(tmp_path / 'gone' / 'x'), b'', parents=False)
  assert not (tmp_path / 'gone').exists()


def test_file_of_ten_gigabytes_is_refused_in_little_memory(tmp_path):
  path = tmp_path / 'x'
  path.touch()
  os.truncate(path, 10 * 2**30)
  for limit in (schema.SMALL, schema.LARGE):
    tracemalloc.start()
    with pytest.raises(schema.Broken, match=f'it has {10 * 2**30} bytes, more than {limit}'):
      files.read(str(path), limit)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2**20


def test_file_is_read_up_to_its_limit(folder):
  path = files.join(folder, 'x')
  for size in (0, 1, 5):
    files.replace(path, b'a' * size)
    assert files.read(path, 5) == b'a' * size
  files.replace(path, b'a' * 6)
  with pytest.raises(schema.Broken, match='bytes, more than 5'):
    files.read(path, 5)


def test_file_that_grows_while_it_is_read_is_read_to_its_end_or_refused(tmp_path, monkeypatch):
  path = tmp_path / 'x'
  path.write_bytes(b'a' * 3)
  size = os.stat(path)
  path.write_bytes(b'a' * 5)
  monkeypatch.setattr(os, 'fstat', lambda _: size)
  assert files.read(str(path), 5) == b'a' * 5
  with pytest.raises(schema.Broken):
    files.read(str(path), 4)
