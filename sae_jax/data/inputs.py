"""What a user names, `a.npy`, `shards/*.safetensors:acts`, `cache:column`, `@list.txt`, as arrays on disk."""

import dataclasses
import glob
import hashlib
import math
import os
import pathlib

import numpy as np

from sae_jax.data import arrow, matrix, pickled, saev
from sae_jax.errors import UserError

FORMS = '.npy, .safetensors, .arrow, a folder of datasets.save_to_disk or a folder of saev'
_MAGIC = '*?['


@dataclasses.dataclass(frozen=True)
class Source:
  """What one name stands for: arrays on disk, in order, and the files that hold them."""

  name: str
  part: str  # tensor, column or layer, as it was named
  pieces: list[matrix.Piece]
  files: list[str]

  @property
  def shape(self) -> tuple[int, ...]:
    """Without the width: (sequences, T), or (tokens,)."""
    return _joined([piece.shape[:-1] for piece in self.pieces])


def expand(names: list[str]) -> list[str]:
  """Lists read and patterns replaced by what they match, sorted by name as a shell does. Raises `UserError`."""
  found = []
  for name in names:
    if name.startswith('@'):
      try:
        lines = pathlib.Path(name[1:]).read_text().splitlines()
      except (OSError, UnicodeError) as error:
        raise UserError(f'{name} cannot be read ({matrix.why(error)}); write a name a line') from None
      listed = [line.strip() for line in lines if line.strip()]
      if nested := [line for line in listed if line.startswith('@')]:
        raise UserError(f'{name} names the list {nested[0]}; write its files instead')
      found += expand(listed)
      continue
    path, part = split(name)
    if os.path.exists(path) or not any(sign in path for sign in _MAGIC):
      found.append(name)
      continue
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
      raise UserError(f'{path} matches no file; mend the pattern, in quotes')
    found += [f'{match}:{part}' if part else match for match in matches]
  if not found:
    raise UserError(f'{" ".join(names)} names nothing; name at least one file')
  seen: dict[tuple[str, str], str] = {}
  for name in found:
    path, part = split(name)
    if (key := (os.path.realpath(path), part)) in seen:
      twice = name if seen[key] == name else f'{seen[key]} and {name} are one file, which'
      raise UserError(f'{twice} is named twice, so that rows would count double; name it once')
    seen[key] = name
  return found


def split(name: str) -> tuple[str, str]:
  """'a.safetensors:acts' as ('a.safetensors', 'acts'); the second part is empty without a name."""
  path, suffix, part = name.partition('.safetensors:')
  if suffix:
    return f'{path}.safetensors', part
  path, colon, part = name.rpartition(':')
  if colon and not os.path.exists(name) and (os.path.exists(path) or any(sign in path for sign in _MAGIC)):
    return path, part
  return name, ''


def open_source(name: str) -> Source:
  """Activations [tokens, D] or [sequences, T, D]. Raises `UserError` for anything else."""
  source = _open(name, matrix.FLOATS)
  for piece in source.pieces:
    if len(piece.shape) not in (2, 3) or 0 in piece.shape:
      raise UserError(
        f'{piece.name} has shape {piece.shape}; give [tokens, width] or [sequences, tokens, width], not empty'
      )
  if not source.pieces:
    raise UserError(f'{name} holds no rows; name files that do')
  return source


def read_masks(names: list[str], sources: list[Source]) -> tuple[np.ndarray, list[str]]:
  """Which rows of the sources count, bool over all of them, and the digests of the files. Raises `UserError`."""
  found, files = _beside('masks', names, sources)
  for name, values in zip(names, found, strict=True):
    if bad := [value for value in np.unique(values).tolist() if value not in (0, 1)]:
      raise UserError(f'{name} holds {bad[0]}; a mask has 1 for tokens and 0 for padding')
  return np.concatenate(found).astype(bool), files


def read_documents(names: list[str], sources: list[Source]) -> tuple[np.ndarray, list[str]]:
  """How many rows each document of the sources has, in order, and the digests of the files.

  A document is a run of equal numbers. Raises `UserError` where one comes back later in its file: a part of it could
  then be held out and the other trained on.
  """
  found, files = _beside('documents', names, sources)
  for name, values in zip(names, found, strict=True):
    begins = values[np.concatenate([[True], values[1:] != values[:-1]])]
    numbers, times = np.unique(begins, return_counts=True)
    if times.max() > 1:
      raise UserError(f'{name}: document {numbers[times > 1][0]} is in two places; put its rows together')
  whole = np.concatenate([values.astype(np.int64) for values in found])
  starts = np.concatenate([[0], np.flatnonzero(whole[1:] != whole[:-1]) + 1, [len(whole)]])
  return np.diff(starts), files


def _beside(what: str, names: list[str], sources: list[Source]) -> tuple[list[np.ndarray], list[str]]:
  """A number for every row of every source, from a file each in the shape of the source or one number a sequence."""
  if len(names) != len(sources):
    raise UserError(f'{len(names)} {what} for {len(sources)} sources; give one a source, in the same order')
  found, files = [], []
  for name, source in zip(names, sources, strict=True):
    beside = _open(name, matrix.MASKS)
    files += [_sha256(file) for file in beside.files]
    shape = _joined([piece.shape for piece in beside.pieces])
    if shape != source.shape and shape != source.shape[:1]:
      raise UserError(f'{name} has shape {shape} and {source.name} has {source.shape}; make them equal')
    values = np.concatenate([np.asarray(piece.view()).reshape(-1) for piece in beside.pieces])
    found.append(np.repeat(values, source.shape[1]) if len(shape) < len(source.shape) else values)
  return found, files


def digests(sources: list[Source]) -> list[str]:
  """SHA-256 of every file, in order. Raises `UserError` where two hold the same."""
  found: list[str] = []
  seen: dict[tuple[str, str], str] = {}
  by_file: dict[str, str] = {}  # several tensors of one file
  for source in sources:
    for file in source.files:
      if file not in by_file:
        by_file[file] = _sha256(file)
      key = by_file[file], source.part
      if key in seen:
        raise UserError(f'{seen[key]} and {file} hold the same bytes; name one of them, or rows count double')
      seen[key] = file
      found.append(key[0])
  return found


def _joined(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
  """Of arrays put one after the other; of sequences of different lengths the rows alone."""
  inner = {shape[1:] for shape in shapes}
  if len(inner) == 1:
    return (sum(shape[0] for shape in shapes), *inner.pop())
  return (sum(math.prod(shape) for shape in shapes),)


def _sha256(file: str) -> str:
  with open(file, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _open(name: str, types: tuple[str, ...]) -> Source:
  path, part = split(name)
  mask = types is matrix.MASKS
  if os.path.isdir(path) and saev.is_saev(path) and not mask:
    pieces = saev.open_layer(path, part)
    return Source(name, part, pieces, [piece.name.rpartition(':')[0] for piece in pieces])
  if arrow.is_arrow(path):
    return Source(name, part, arrow.open_column(path, part, mask), arrow.files(path))
  if path.endswith('.npy'):
    return Source(name, part, [matrix.open_npy(path, types)], [path])
  if path.endswith('.safetensors'):
    return Source(name, part, [matrix.open_safetensors(path, part, types)], [path])
  pickled.refuse(path)
  if not os.path.exists(path):
    raise UserError(f'{path} does not exist; name {FORMS}')
  if os.path.isdir(path):
    raise UserError(f"{name} is a folder of no known kind; name its files, such as '{path}/*.npy'")
  raise UserError(f'{name} is none of: {FORMS}; convert it')
