"""Activations in Arrow files: folders of `datasets.save_to_disk` and SAELens caches, through pyarrow alone.

A row of the column is a token (a list of D numbers) or a sequence (a list of such lists). Buffers are mapped, not read.
"""

import functools
import os
from types import ModuleType
from typing import Any

import numpy as np

from sae_jax import schema
from sae_jax.data.matrix import Piece, why
from sae_jax.errors import UserError

_STATE, _SPLITS = 'state.json', 'dataset_dict.json'


def is_arrow(path: str) -> bool:
  """Whether a path is an Arrow file or a folder that `datasets` saved."""
  return path.endswith('.arrow') or any(os.path.exists(os.path.join(path, name)) for name in (_STATE, _SPLITS))


def files(path: str) -> list[str]:
  """The Arrow files of a folder in order, or the file itself. Raises `UserError`."""
  if not os.path.isdir(path):
    return [path]
  if not os.path.exists(os.path.join(path, _STATE)):
    raise UserError(f'{path} holds the splits of a dataset; name one of them, such as {path}/train')
  try:
    with open(os.path.join(path, _STATE), 'rb') as f:
      state = schema.parse(f.read())
    names = [one['filename'] for one in state['_data_files']]
    if not names or any(type(name) is not str or os.path.basename(name) != name for name in names):
      raise ValueError(f'_data_files names {str(names)[:60]}')
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise UserError(
      f'{path}/{_STATE} does not name the files of a dataset ({why(error)}); save it again with save_to_disk'
    ) from None
  if state.get('_indices_data_files'):
    raise UserError(f'{path} is a selection of its rows; save dataset.flatten_indices() instead')
  return [os.path.join(path, name) for name in names]


def open_column(path: str, column: str, mask: bool = False) -> list[Piece]:
  """A column of the files of `path`, `column` or the only one that fits: a piece for every chunk of every file.

  A mask is a column of numbers or truth values, or of lists of them. Raises `UserError`.
  """
  return [piece for file in files(path) for piece in _pieces(file, column, mask)]


def _pieces(file: str, column: str, mask: bool) -> list[Piece]:
  pa = _pyarrow()
  depth = (0, 1) if mask else (1, 2)
  try:
    table = _table(file)
    fits = [f.name for f in table.schema if _depth(pa, f.type) in depth and _holds(pa, f.type, mask)]
    column = column or (fits[0] if len(fits) == 1 else '')
    if column not in fits:
      known = ', '.join(fits[:8]) or 'none'
      raise UserError(f'{file}: no column {column!r} of activations; write PATH:NAME with one of: {known}')
    pieces, first = [], 0
    for i, chunk in enumerate(table.column(column).chunks):
      shape, lengths, values = _layout(pa, chunk, mask)
      if len(values):
        view = functools.partial(_view, file, column, i, mask)
        pieces.append(Piece(f'{file}:{column}', shape, values.dtype, view, first, lengths))
        first += len(values) if mask else len(values) // shape[-1]
    return pieces
  except FileNotFoundError:
    raise UserError(f'{file} does not exist; copy the dataset again') from None
  except (pa.ArrowException, OSError, ValueError) as error:
    raise UserError(f'{file} is not a sound Arrow file of activations ({why(error)}); save it again') from None


def _view(file: str, column: str, chunk: int, mask: bool) -> np.ndarray:
  shape, _, values = _layout(_pyarrow(), _table(file).column(column).chunk(chunk), mask)
  return values.reshape(shape)


@functools.lru_cache(maxsize=8)
def _table(file: str) -> Any:
  """The table in a file, in either of Arrow's two forms, mapped."""
  pa = _pyarrow()
  source = pa.memory_map(file)
  try:
    return pa.ipc.open_stream(source).read_all()
  except pa.ArrowInvalid:
    return pa.ipc.open_file(source).read_all()


def _layout(pa: ModuleType, chunk: Any, mask: bool) -> tuple[tuple[int, ...], np.ndarray | None, np.ndarray]:
  """Shape, lengths of ragged sequences, and the flat numbers of a chunk. Raises ValueError."""
  chunk = _storage(pa, chunk)
  chunk.validate(full=True)  # offsets outside the buffers would be read all the same
  lengths: list[np.ndarray] = []  # of the lists, from the outermost in
  while _is_list(pa, chunk.type):
    if chunk.null_count:
      raise ValueError(f'{chunk.null_count} of its lists are null')
    count = len(chunk)
    if pa.types.is_fixed_size_list(chunk.type):
      lengths.append(np.full(count, chunk.type.list_size))
    else:
      offsets = chunk.offsets.to_numpy()
      lengths.append(np.diff(offsets).astype(np.int64))
    chunk = _storage(pa, chunk.flatten())
  if chunk.null_count:
    raise ValueError(f'{chunk.null_count} of its numbers are null')
  values = chunk.to_numpy(zero_copy_only=not pa.types.is_boolean(chunk.type))
  if mask:
    even = bool(lengths) and len(np.unique(lengths[0])) == 1
    shape = (len(lengths[0]), int(lengths[0][0])) if even else (len(values),)
    return shape, None, values
  if not len(lengths[-1]):  # sequences without a token
    return (0, 0), None, values
  widths = np.unique(lengths[-1]).tolist()
  if len(widths) != 1:
    raise ValueError(f'its rows have widths {widths[:4]}')
  (width,) = widths
  if len(lengths) == 1:
    return (len(values) // max(width, 1), width), None, values
  tokens = lengths[0]
  if len(np.unique(tokens)) == 1:
    return (len(tokens), int(tokens[0]), width), None, values
  return (int(tokens.sum()), width), tokens, values


def _storage(pa: ModuleType, array: Any) -> Any:
  """Extension types, such as the Array2D of `datasets`, as what they are stored in."""
  return array.storage if isinstance(array.type, pa.BaseExtensionType) else array


def _depth(pa: ModuleType, kind: Any) -> int:
  kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
  return 1 + _depth(pa, kind.value_type) if _is_list(pa, kind) else 0


def _holds(pa: ModuleType, kind: Any, mask: bool) -> bool:
  kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
  if _is_list(pa, kind):
    return _holds(pa, kind.value_type, mask)
  if mask:
    return pa.types.is_boolean(kind) or pa.types.is_integer(kind)
  return pa.types.is_floating(kind)


def _is_list(pa: ModuleType, kind: Any) -> bool:
  return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _pyarrow() -> ModuleType:
  try:
    import pyarrow  # pyrefly: ignore[missing-import]  an extra
    import pyarrow.ipc  # pyrefly: ignore[missing-import]
  except ImportError:
    raise UserError("Arrow files need pyarrow, which is not installed; pip install 'sae_jax[arrow]'") from None
  return pyarrow
