"""Small files on local disk or an fsspec URL: exclusive create, atomic replace, append.

The ledger's promises rest on `create`: of two writers of one path exactly one succeeds, and a reader
never sees half a file.
"""

import contextlib
import ctypes
import errno
import logging
import os
import pathlib
import posixpath
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import fsspec

from sae_jax import schema
from sae_jax.errors import UserError

# Protocols whose mode='create' is exclusive at the store. gcsfs sends ifGenerationMatch=0; s3fs and the http family
# check and then write, so two writers can both win.
_EXCLUSIVE = ('memory', 'gs', 'gcs')
# gcsfs otherwise writes to zonal buckets by appending, where its mode='create' replaces what is there; and where it may
# not ask for a bucket's kind, it asks again and warns at every call (353 times in a run of 200 steps).
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
# Other processes write to a bucket too, so no listing may be kept: not here, and not by the filesystem of its own that
# etils makes for Orbax.
fsspec.config.conf.setdefault('gcs', {})['use_listings_cache'] = False
logging.getLogger('gcsfs').setLevel(logging.CRITICAL)  # it logs the traceback of what it also raises
_EXTRAS = {'gs': 'gcs', 'gcs': 'gcs'}  # what to install for a protocol
_PIECE = 2**22  # bytes read at once of a file that may be larger than memory
_NO_BUCKET = 'No such bucket'  # a new file brings its folders, so nothing else can be missing
# Of one filesystem, where os.sync waits for all that are mounted.
_SYNCFS = getattr(ctypes.CDLL(None), 'syncfs', None) if sys.platform == 'linux' else None
_TEMPORARY = re.compile(r'\..+\.\d+\.[0-9a-f]{8}\.tmp')  # the names that `_temporary` gives
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def is_local(path: str) -> bool:
  return '://' not in str(path) or str(path).startswith('file://')


def local(path: str) -> pathlib.Path:
  """The local path of a plain path or file:// URL, absolute (orbax refuses relative ones)."""
  return pathlib.Path(str(path).removeprefix('file://')).expanduser().absolute()


def _name(path: str) -> str:
  """`local` as text. Of a path that starts with / it is the path: making another of it took longer than a small read."""
  return path if type(path) is str and path[:1] == '/' else str(local(path))


def join(path: str, *parts: str) -> str:
  return posixpath.join(str(path), *parts)


def check_exclusive_create(path: str) -> None:
  """Raises `UserError` unless the filesystem of `path` can create a file exclusively and answers."""
  if is_local(path):
    return
  _check_protocol(path)
  try:
    exists(path)
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror}); check its name, the network and the credentials '
      '(gcloud auth application-default login)'
    ) from error


def exists(path: str) -> bool:
  if is_local(path):
    return os.path.exists(_name(path))
  with _remote(path) as (fs, name):
    return fs.exists(name)


def is_file(path: str) -> bool:
  """Whether a local path is a file; False on an object store, where nothing can be a file instead of a folder."""
  return is_local(path) and local(path).is_file()


def is_folder(path: str) -> bool:
  """Whether a local path is a folder; False on an object store."""
  return is_local(path) and local(path).is_dir()


def is_link(path: str) -> bool:
  """Whether a path is a symbolic link; an object store has none."""
  return is_local(path) and local(path).is_symlink()


def read(path: str, limit: int = schema.SMALL) -> bytes:
  """The whole file. Raises FileNotFoundError, and `schema.Broken` for one of more than `limit` bytes, mostly unread."""
  if is_local(path):
    data, held = _read_local(path, limit)
  else:
    with _remote(path) as (fs, name):
      try:
        # One request, where open() asks for the size first and could then read half of a newer file.
        data = fs.cat_file(name, start=0, end=limit + 1)
      except Exception:
        if fs.info(name)['size']:
          raise
        data = b''  # nothing has no first byte, and a store refuses to give one
    held = len(data)
  if held > limit:
    raise schema.Broken(f'it has {held if is_local(path) else "more"} bytes, more than {limit}')
  return data


def pieces(path: str) -> Iterator[bytes]:
  """The bytes of a file of any size, in turn. Raises FileNotFoundError."""
  if is_local(path):
    with open(local(path), 'rb') as f:
      while piece := f.read(_PIECE):
        yield piece
  else:
    with _remote(path) as (fs, name):
      whole = fs.info(name)['size']
      for start in range(0, whole, _PIECE):
        yield fs.cat_file(name, start=start, end=min(start + _PIECE, whole))


def sizes(folder: str, names: Iterable[str]) -> dict[str, int]:
  """Bytes of those of the named files of a folder that are there."""
  if is_local(folder):
    found, base = {}, _name(folder)
    for name in names:
      with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        about = os.stat(f'{base}/{name}')
        if stat.S_ISREG(about.st_mode):
          found[name] = about.st_size
    return found
  with contextlib.suppress(FileNotFoundError), _remote(folder) as (fs, name):
    listed = {posixpath.basename(one['name']): one for one in fs.ls(name, detail=True)}
    return {name: listed[name]['size'] for name in names if name in listed and listed[name]['type'] == 'file'}
  return {}


def version(path: str) -> tuple[Any, ...] | None:
  """Something that changes with a file; None where the filesystem has no such thing. Raises FileNotFoundError.

  On a local disk a file that `replace` wrote is another inode with another time.
  """
  if is_local(path):
    found = os.stat(local(path))
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev
  with _remote(path) as (fs, name):
    info = fs.info(name)
  known = tuple(info.get(key) for key in ('generation', 'etag'))
  return known if any(known) else None


def listdir(path: str) -> list[str]:
  """Sorted names in a folder; empty when the folder does not exist."""
  try:
    if is_local(path):
      return sorted(os.listdir(_name(path)))
    with _remote(path) as (fs, name):
      return sorted(posixpath.basename(p.rstrip('/')) for p in fs.ls(name, detail=False))
  except (FileNotFoundError, NotADirectoryError):
    return []


def create(path: str, data: bytes) -> None:
  """Writes a new file. Raises FileExistsError when the path exists, whoever made it."""
  if is_local(path):
    _via_temporary(local(path), data, _link)
  else:
    _check_protocol(path)
    writer = secrets.token_hex(8)
    with _remote(path, absent=_NO_BUCKET) as (fs, name):
      try:
        fs.pipe_file(name, data, mode='create', metadata={'writer': writer})
      except FileExistsError:
        # A request whose answer was lost is sent again, and then finds what it wrote itself.
        if fs.info(name).get('metadata', {}).get('writer') != writer:
          raise


def create_missing(contents: Mapping[str, bytes]) -> list[str]:
  """Creates many files, leaves those alone that exist, and returns the paths of the new ones.

  As with `create` the bytes of a file are on the disk before it has its name. One wait for the disk serves all files,
  where `create` waits twice for each. A power cut may take names away again.
  """
  created: list[str] = []
  written: list[tuple[str, pathlib.Path]] = []
  try:
    for path, data in contents.items():
      if not is_local(path):
        with contextlib.suppress(FileExistsError):
          create(path, data)
          created.append(path)
        continue
      target = local(path)
      temporary = _temporary(target)
      written.append((path, temporary))
      target.parent.mkdir(parents=True, exist_ok=True)
      with open(temporary, 'xb') as f:
        f.write(data)
    if written:
      _sync_filesystem(written[0][1].parent)
    for path, temporary in written:
      with contextlib.suppress(FileExistsError):
        _link(temporary, local(path))
        created.append(path)
    return created
  finally:
    for _, temporary in written:
      with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)


def replace(path: str, data: bytes, *, parents: bool = True) -> None:
  """Writes a file, atomically taking the place of an older one.

  Without `parents` the folder has to exist on a local disk: FileNotFoundError where it is gone.
  """
  if is_local(path):
    _via_temporary(local(path), data, os.replace, parents)
  else:
    with _remote(path, absent=_NO_BUCKET) as (fs, name):
      fs.pipe_file(name, data)


def write_output(path: str, data: bytes, other: str = 'path') -> None:
  """`replace` of a file that a user asked for. Raises `UserError`, which names `other` as what to change."""
  try:
    replace(path, data)
  except OSError as error:
    raise UserError(f'cannot write {path} ({error.strerror}); choose another {other}') from None


def append(path: str, data: bytes) -> None:
  """Adds to the end of a local file; the bytes are on the disk when it returns."""
  target = local(path)
  is_new = not target.exists()
  with open(target, 'ab') as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
  if is_new:
    _sync_folder(target.parent)


def remove(path: str) -> None:
  """Deletes a file if it is there."""
  if is_local(path):
    local(path).unlink(missing_ok=True)
  else:
    with contextlib.suppress(FileNotFoundError), _remote(path) as (fs, name):
      fs.rm_file(name)


def move(path: str, target: str) -> None:
  """Gives a file another name in its folder, taking the place of an older one; nothing where there is no such file.

  On an object store the file has both names for a moment.
  """
  if is_local(path):
    with contextlib.suppress(FileNotFoundError):
      os.replace(local(path), local(target))
      _sync_folder(local(target).parent)
  else:
    with contextlib.suppress(FileNotFoundError), _remote(path) as (fs, name):
      fs.cp_file(name, _filesystem(target)[1])
      fs.rm_file(name)


def size(path: str) -> int:
  """Bytes of the files in a folder and below; 0 when there is none. Links are not followed."""
  if is_local(path):
    walked = os.walk(local(path))
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in walked for name in names)
  with _remote(path) as (fs, name):
    return sum(found['size'] for found in fs.find(name, detail=True).values())


def temporaries(path: str, before: float) -> dict[str, int]:
  """Bytes by path of what killed writers left in a local folder and below, last written before a time in seconds.

  None on an object store, which shows no file before it is whole. Links are not followed.
  """
  found = {}
  for folder, _, names in os.walk(local(path)) if is_local(path) else ():
    for name in filter(_TEMPORARY.fullmatch, sorted(names)):
      with contextlib.suppress(FileNotFoundError):  # its writer lives, and has just given it its name
        about = os.lstat(at := os.path.join(folder, name))
        if stat.S_ISREG(about.st_mode) and about.st_mtime < before:
          found[at] = about.st_size
  return found


def remove_tree(path: str) -> None:
  """Deletes a folder and what is below it, if it is there. Raises OSError for a link."""
  if is_local(path):
    if os.path.lexists(local(path)):
      shutil.rmtree(local(path))
  else:
    with contextlib.suppress(FileNotFoundError), _remote(path) as (fs, name):
      fs.rm(name, recursive=True)


def move_tree(path: str, target: str) -> None:
  """Gives a folder another name, which nothing has yet. On an object store file by file, and the old ones go last."""
  if is_local(path):
    local(target).parent.mkdir(parents=True, exist_ok=True)
    os.rename(local(path), local(target))
  else:
    with _remote(path) as (fs, name):
      _, to = _filesystem(target)
      for found in fs.find(name):
        fs.cp_file(found, to + found[len(name) :])
      fs.rm(name, recursive=True)


def _read_local(path: str, limit: int) -> tuple[bytes, int]:
  """The bytes of a local file, and how many it has; without the bytes where they are more than `limit`.

  By the bare calls: a status reads three files a cell, and `open` costs more than a small read.
  """
  at = os.open(_name(path), os.O_RDONLY | os.O_CLOEXEC)
  try:
    size = os.fstat(at).st_size
    if size > limit:
      return b'', size
    data = os.read(at, size + 1)
    while len(data) != size and len(data) <= limit and (more := os.read(at, min(limit + 1 - len(data), 2**20))):
      data, size = data + more, -1  # it grows, or came in parts: up to the end then
    return data, len(data)
  except OSError as error:
    error.filename = path  # of a folder, say, which can be opened and not read
    raise
  finally:
    os.close(at)


def _check_protocol(path: str) -> None:
  if str(path).split('://')[0] not in _EXCLUSIVE:
    raise UserError(
      f'{path}: this filesystem has no exclusive create, so two workers could both commit a cell; '
      'use a local path or gs://'
    )


@contextlib.contextmanager
def _remote(path: str, absent: str = os.strerror(errno.ENOENT)) -> Iterator[tuple[Any, str]]:
  """The fsspec filesystem of a URL and the path there.

  What it raises comes out as an OSError with errno and strerror, as from a local disk: most errors of gcsfs are none.
  `absent` is the text for FileNotFoundError.
  """
  fs, name = _filesystem(path)
  try:
    yield fs, name
  except Exception as error:
    code = {FileExistsError: errno.EEXIST, FileNotFoundError: errno.ENOENT}.get(type(error), errno.EIO)
    said = ' '.join(str(error).split())[:300] or type(error).__name__
    text = {errno.EEXIST: os.strerror(errno.EEXIST), errno.ENOENT: absent}.get(code, said)
    raise OSError(code, text, path) from error


def _filesystem(path: str) -> tuple[Any, str]:
  protocol = path.split('://')[0]
  try:
    return fsspec.core.url_to_fs(path)
  except ImportError as error:
    extra = _EXTRAS.get(protocol)
    remedy = f"pip install 'sae_jax[{extra}]'" if extra else 'install its fsspec package'
    raise UserError(f'{path}: {protocol}:// needs a package that is not installed; {remedy}') from error
  except ValueError as error:
    raise UserError(f'{path}: {error}; use a local path or gs://') from error


def _link(temporary: pathlib.Path, target: pathlib.Path) -> None:
  """Gives a whole file its name, atomically and exclusively; open('x') would expose a half-written one."""
  try:
    os.link(temporary, target)
  except OSError as error:
    if error.errno not in _NO_LINKS:
      raise
    raise UserError(
      f'{target}: this filesystem has no hard links ({error.strerror}), so no exclusive create, and two workers could '
      'both commit a cell; use another folder or gs://'
    ) from error


def _temporary(target: pathlib.Path) -> pathlib.Path:
  return target.with_name(f'.{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp')


def _via_temporary(
  target: pathlib.Path,
  data: bytes,
  put: Callable[[pathlib.Path, pathlib.Path], None],
  parents: bool = True,
) -> None:
  """Writes beside the target, to the disk, and then puts the whole file in place."""
  if parents:
    target.parent.mkdir(parents=True, exist_ok=True)
  temporary = _temporary(target)
  try:
    with open(temporary, 'xb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    put(temporary, target)
    _sync_folder(target.parent)
  finally:
    temporary.unlink(missing_ok=True)


def _sync_filesystem(path: pathlib.Path) -> None:
  """Puts on the disk what was written to the filesystem of a folder."""
  folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
  try:
    if _SYNCFS is None or _SYNCFS(folder) != 0:
      os.sync()
  finally:
    os.close(folder)


def _sync_folder(path: pathlib.Path) -> None:
  """Puts new names in a folder on the disk. A filesystem that cannot keeps them anyway, or loses them in a power cut."""
  folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
  try:
    with contextlib.suppress(OSError):
      os.fsync(folder)
  finally:
    os.close(folder)
