"""Small files on local disk or an fsspec URL: exclusive create, atomic replace, append.

The ledger's promises rest on `create`: of two writers of one path exactly one succeeds, and a reader
never sees half a file.
"""

import os
import pathlib
import posixpath
import secrets
from collections.abc import Callable

import fsspec

from sae_jax.errors import UserError

# Protocols whose open(path, 'xb') is exclusive at the store, not only in this process's cache of listings.
# gcsfs sends ifGenerationMatch=0; s3fs and the http family check and then write, so two writers can both win.
_EXCLUSIVE = ('memory', 'gs', 'gcs')


def is_local(path: str) -> bool:
  return '://' not in str(path) or str(path).startswith('file://')


def local(path: str) -> pathlib.Path:
  """The local path of a plain path or file:// URL, absolute (orbax refuses relative ones)."""
  return pathlib.Path(str(path).removeprefix('file://')).expanduser().absolute()


def join(path: str, *parts: str) -> str:
  return posixpath.join(str(path), *parts)


def check_exclusive_create(path: str) -> None:
  """Raises `UserError` unless the filesystem of `path` can create a file exclusively."""
  if not is_local(path) and str(path).split('://')[0] not in _EXCLUSIVE:
    raise UserError(
      f'{path}: this filesystem has no exclusive create, so two workers could both commit a cell; '
      'use a local path or gs://'
    )


def exists(path: str) -> bool:
  if is_local(path):
    return local(path).exists()
  fs, name = fsspec.core.url_to_fs(path, use_listings_cache=False)
  return fs.exists(name)


def read(path: str) -> bytes:
  """The whole file. Raises FileNotFoundError."""
  if is_local(path):
    return local(path).read_bytes()
  with fsspec.open(path, 'rb') as f:
    return f.read()


def listdir(path: str) -> list[str]:
  """Sorted names in a folder; empty when the folder does not exist."""
  if is_local(path):
    return sorted(os.listdir(local(path))) if local(path).is_dir() else []
  fs, name = fsspec.core.url_to_fs(path, use_listings_cache=False)
  fs.invalidate_cache()
  return (
    sorted(posixpath.basename(p.rstrip('/')) for p in fs.ls(name, detail=False)) if fs.isdir(name) else []
  )


def create(path: str, data: bytes) -> None:
  """Writes a new file. Raises FileExistsError when the path exists, whoever made it."""
  if not is_local(path):
    check_exclusive_create(path)
    fs, name = fsspec.core.url_to_fs(path)
    fs.makedirs(fs._parent(name), exist_ok=True)
    with fs.open(name, 'xb') as f:
      f.write(data)
    return
  # A link is atomic and exclusive, where open('x') would expose a half-written file.
  _via_temporary(local(path), data, os.link)


def replace(path: str, data: bytes) -> None:
  """Writes a file, atomically taking the place of an older one."""
  if not is_local(path):
    fs, name = fsspec.core.url_to_fs(path)
    fs.makedirs(fs._parent(name), exist_ok=True)
    with fs.open(name, 'wb') as f:
      f.write(data)
    return
  _via_temporary(local(path), data, os.replace)


def remove(path: str) -> None:
  """Deletes a file if it is there."""
  if is_local(path):
    local(path).unlink(missing_ok=True)
    return
  fs, name = fsspec.core.url_to_fs(path, use_listings_cache=False)
  if fs.exists(name):
    fs.rm_file(name)


def _via_temporary(
  target: pathlib.Path, data: bytes, put: Callable[[pathlib.Path, pathlib.Path], None]
) -> None:
  """Writes beside the target, to the disk, and then puts the whole file in place."""
  target.parent.mkdir(parents=True, exist_ok=True)
  temporary = target.with_name(f'.{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp')
  try:
    with open(temporary, 'xb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    put(temporary, target)
  finally:
    temporary.unlink(missing_ok=True)
