"""Arrays of numbers on disk, .npy and .safetensors, opened without reading them and without ever loading a pickle."""

import dataclasses
import functools
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import safetensors

from sae_jax import cell_state, schema
from sae_jax.data import pickled
from sae_jax.errors import UserError

_NPY_HEADER = 1000  # bytes; that of a matrix has 118
_SAFETENSORS_HEADER = 2**22  # bytes; enough for tens of thousands of tensors
_SAFETENSORS_TYPES = {
  'F16': '<f2',
  'BF16': ml_dtypes.bfloat16,
  'F32': '<f4',
  'F64': '<f8',
  'BOOL': '?',
  'U8': 'u1',
  'I8': 'i1',
  'I16': '<i2',
  'I32': '<i4',
  'I64': '<i8',
}
FLOATS = ('float16', 'bfloat16', 'float32', 'float64')
MASKS = ('bool', 'uint8', 'int8', 'int16', 'int32', 'int64')
_UNNAMED = {
  1: 'bytes without a type, as numpy saves float8',
  2: 'two-byte values without a type, as numpy saves bfloat16',
}


@dataclasses.dataclass(frozen=True)
class Piece:
  """One array on disk.

  Attributes:
    name: what messages call it.
    shape: [tokens, D], or [sequences, T, D]. A mask has one axis less.
    dtype: of its numbers, in any byte order.
    view: opens it as an array of that shape. It is called for every block, so that thousands of files need no
      thousands of descriptors.
    first: how many rows of its file come before it.
    lengths: tokens of each sequence of a [tokens, D] piece that holds sequences of different lengths.
  """

  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  view: Callable[[], np.ndarray]
  first: int = 0
  lengths: np.ndarray | None = None

  @property
  def tokens(self) -> int:
    return math.prod(self.shape[:-1])

  def take(self, rows_B: np.ndarray) -> np.ndarray:
    """Rows [B, D] by their numbers, in the dtype of the file."""
    array = np.asarray(self.view())
    if len(self.shape) == 3:
      return array[np.divmod(rows_B, self.shape[1])]
    return array[rows_B]

  def where(self, row: int) -> str:
    """A row as a message names it."""
    if len(self.shape) == 3:
      sequence, token = divmod(row, self.shape[1])
      return f'{self.name}: token {token} of sequence {self.first // self.shape[1] + sequence}'
    return f'{self.name}: row {self.first + row}'


def open_npy(path: str, types: tuple[str, ...]) -> Piece:
  """Raises `UserError` unless it is a plain array of one of these types."""
  try:
    with open(path, 'rb') as f:
      if f.read(6) != b'\x93NUMPY':  # numpy would look for an archive in it
        raise ValueError('it does not begin with the magic string')
      version = f.read(2)
      # numpy reads all of a header before it refuses its length, and would parse thousands of parentheses.
      length = int.from_bytes(f.read(2 if version[:1] == b'\x01' else 4), 'little')
      if length > _NPY_HEADER:
        raise ValueError(f'its header has {length} bytes, more than {_NPY_HEADER}')
    view = functools.partial(np.load, path, mmap_mode='r', allow_pickle=False, max_header_size=_NPY_HEADER)
    with np.errstate(over='raise'):  # sides whose product is no size
      array = view()
  except FileNotFoundError:
    raise UserError(f'{path} does not exist; name a .npy file') from None
  except (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    ArithmeticError,
    SyntaxError,
    RecursionError,
    MemoryError,
  ) as error:
    pickled.refuse(path)
    raise UserError(f'{path} is not a plain .npy array ({why(error)}); save it with numpy.save') from None
  dtype = array.dtype
  if dtype.kind == 'V' and dtype.names is None and dtype.itemsize in _UNNAMED:
    raise UserError(
      f'{path} holds |V{dtype.itemsize}: {_UNNAMED[dtype.itemsize]}; save it as float32, or as .safetensors, which '
      'keeps the type'
    )
  if dtype.name not in types:
    raise UserError(f'{path} holds {dtype}; save it as one of {", ".join(t for t in types if t[0] != "b")}')
  return Piece(path, array.shape, dtype, view)


def open_safetensors(path: str, name: str, types: tuple[str, ...]) -> Piece:
  """One tensor of a file, `name` or the only one. Raises `UserError` unless it is there and of one of these types."""
  try:
    with open(path, 'rb') as f:
      header_bytes = int.from_bytes(f.read(8), 'little')
      if header_bytes > _SAFETENSORS_HEADER:
        raise ValueError(f'its header has {header_bytes} bytes, more than {_SAFETENSORS_HEADER}')
      header = schema.parse(f.read(header_bytes))
    with safetensors.safe_open(path, framework='numpy') as f:  # checks sizes and offsets of every tensor
      names = sorted(f.keys())
  except FileNotFoundError:
    raise UserError(f'{path} does not exist; name a .safetensors file') from None
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    pickled.refuse(path)
    raise UserError(f'{path} is not a safetensors file ({why(error)}); save it again') from None
  if name not in names and (name or len(names) != 1):
    raise UserError(f'{path}: no tensor {name!r}; write {path}:NAME with one of {", ".join(names[:8])}')
  entry = header[name or names[0]]
  dtype = np.dtype(_SAFETENSORS_TYPES.get(entry['dtype'], 'V1'))
  if dtype.name not in types:
    known = [kind for kind, one in _SAFETENSORS_TYPES.items() if np.dtype(one).name in types]
    raise UserError(f'{path} holds {entry["dtype"]}; use one of {", ".join(known)}')
  shape = tuple(entry['shape'])
  if 0 in shape:  # an empty file region cannot be mapped
    return Piece(path, shape, dtype, lambda: np.empty(shape, dtype))
  offset = 8 + header_bytes + entry['data_offsets'][0]
  view = functools.partial(np.memmap, path, dtype, mode='r', offset=offset, shape=shape)
  return Piece(f'{path}:{name}' if name else path, shape, dtype, view)


def why(error: BaseException) -> str:
  """A foreign error in a few printable words."""
  return cell_state.printable(getattr(error, 'strerror', None) or str(error) or type(error).__name__)[:120]
