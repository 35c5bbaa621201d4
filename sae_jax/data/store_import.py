"""A store from activations that are already on disk: .npy and .safetensors arrays [tokens, D] of any size."""

import hashlib
import pathlib

import ml_dtypes
import numpy as np
import safetensors
from tqdm import tqdm

from sae_jax import __version__, cell_state, schema
from sae_jax.data import order, store_writer
from sae_jax.errors import UserError

_NPY_HEADER = 1000  # bytes; that of a matrix has 118
_SAFETENSORS_HEADER = 2**22  # bytes; enough for tens of thousands of tensors
_SAFETENSORS_TYPES = {'F16': np.float16, 'BF16': ml_dtypes.bfloat16, 'F32': np.float32, 'F64': np.float64}


def import_arrays(
  *, sources: list[str], out: str, held_out: int, normalize: str, seed: int, dtype: str, block_tokens: int,
  subject: str = '', site: str = '',
) -> None:  # fmt: skip
  """Writes the rows of `sources` to the store `out`; resumes, and does nothing when it is finished.

  The last `held_out` rows are held out, in the order given, because neighbours in a text are alike; all the others
  are shuffled by `seed`. Raises `UserError` for anything but finite floating-point matrices of one width, and for
  a row that has no direction (padding) when rows are normalised.
  """
  arrays = [_open(source) for source in sources]
  widths = {array.shape[1] for array in arrays}
  if len(widths) > 1:
    raise UserError(f'the arrays have widths {sorted(widths)}; import one width at a time')
  total = sum(len(array) for array in arrays)
  if not 2 <= held_out < total:
    raise UserError(
      f'--held_out={held_out} of {total} rows is not in [2, {total - 1}]; choose another number'
    )
  if block_tokens < 1 or seed < 0:
    raise UserError(
      f'--block_tokens={block_tokens} must be at least 1 and --seed={seed} at least 0; correct them'
    )
  settings = {
    'subject': subject, 'site': site, 'text': '', 'normalize': normalize,
    'window_tokens': 2, 'block_windows': block_tokens,  # rows have no windows: one token each
    'store_tokens': total - held_out, 'held_out_tokens': held_out, 'dtype': dtype, 'seed': seed,
  }  # fmt: skip
  provenance = {
    'imported_from': [pathlib.Path(path).name + name for path, name in map(_split, sources)],
    'imported_sha256': [_sha256(_split(source)[0]) for source in sources],
    'versions': {'sae_jax': __version__, 'numpy': np.__version__},
  }
  if store_writer.finished(out, settings, {'imported_sha256': provenance['imported_sha256']}):
    return
  writer = store_writer.StoreWriter(
    out, d_model=widths.pop(), settings=settings, provenance=provenance, flops_per_token=0.0
  )
  rows = {
    'train': order.permutation(total - held_out, 'rows', seed),
    'held_out': np.arange(total - held_out, total),
  }
  offsets = np.cumsum([0, *map(len, arrays)])
  blocks = [(name, block) for name, stream in writer.streams.items() for block in range(stream.blocks)]
  for name, block in tqdm(blocks, desc='import', unit='block', disable=None):  # None: only on a terminal
    if not writer.done(name, block):
      first = block * block_tokens
      chosen = rows[name][first : first + writer.streams[name].size(block)]
      x_BD = _gather(arrays, offsets, chosen)
      _check_rows(x_BD, chosen, offsets, sources, normalize)
      writer.write(name, block, x_BD)
  writer.finish()


def _gather(arrays: list[np.ndarray], offsets: np.ndarray, chosen: np.ndarray) -> np.ndarray:
  """Rows of the joined arrays, float32, read from disk in ascending order."""
  out_BD = np.empty((len(chosen), arrays[0].shape[1]), np.float32)
  ascending = np.argsort(chosen, kind='stable')
  bounds = np.searchsorted(chosen[ascending], offsets)
  with np.errstate(over='ignore'):  # a float64 beyond float32 becomes infinite and is reported with its row
    for array, offset, first, last in zip(arrays, offsets[:-1], bounds[:-1], bounds[1:], strict=True):
      at = ascending[first:last]
      out_BD[at] = array[chosen[at] - offset]
  return out_BD


def _check_rows(
  x_BD: np.ndarray, chosen: np.ndarray, offsets: np.ndarray, sources: list[str], normalize: str
) -> None:
  finite_B = np.isfinite(x_BD).all(axis=1)
  constant_B = (x_BD == x_BD[:, :1]).all(axis=1) & (normalize != 'none')
  for bad_B, problem, remedy in (
    (~finite_B, 'holds NaN or infinity', 'remove it'),
    (constant_B, 'is constant and has no direction', 'remove padding rows or use --normalize=none'),
  ):
    if bad_B.any():
      row = int(chosen[np.argmax(bad_B)])
      i = int(np.searchsorted(offsets, row, side='right')) - 1
      raise UserError(f'{sources[i]}: row {row - offsets[i]} {problem}; {remedy}')


def _split(source: str) -> tuple[str, str]:
  """'a.safetensors:name' as ('a.safetensors', ':name'); the second part is empty without a name."""
  path, suffix, name = source.partition('.safetensors:')
  return (f'{path}.safetensors', f':{name}') if suffix else (source, '')


def _open(source: str) -> np.ndarray:
  """A read-only view of one matrix on disk. Raises `UserError` unless it is a floating-point matrix."""
  path, name = _split(source)
  if path.endswith('.npy'):
    array = _open_npy(path)
  elif path.endswith('.safetensors'):
    array = _open_safetensors(path, name.removeprefix(':'))
  else:
    raise UserError(f'{source} is neither .npy nor .safetensors; convert it')
  if array.ndim != 2 or 0 in array.shape:
    raise UserError(f'{source} has shape {array.shape}; give a matrix [tokens, width] that is not empty')
  return array


def _open_npy(path: str) -> np.ndarray:
  try:
    with open(path, 'rb') as f:
      if f.read(6) != b'\x93NUMPY':  # numpy would look for an archive in it
        raise ValueError('it does not begin with the magic string')
      version = f.read(2)
      # numpy reads all of a header before it refuses its length, and would parse thousands of parentheses.
      length = int.from_bytes(f.read(2 if version[:1] == b'\x01' else 4), 'little')
      if length > _NPY_HEADER:
        raise ValueError(f'its header has {length} bytes, more than {_NPY_HEADER}')
    with np.errstate(over='raise'):  # sides whose product is no size
      array = np.load(path, mmap_mode='r', allow_pickle=False, max_header_size=_NPY_HEADER)
  except FileNotFoundError:
    raise UserError(f'{path} does not exist; name a .npy file') from None
  except (
    OSError, ValueError, EOFError, TypeError, ArithmeticError, SyntaxError, RecursionError, MemoryError,
  ) as error:  # fmt: skip
    raise UserError(f'{path} is not a plain .npy array ({_why(error)}); save it with numpy.save') from None
  if not isinstance(array, np.ndarray) or array.dtype not in (np.float16, np.float32, np.float64):
    raise UserError(
      f'{path} holds {getattr(array, "dtype", type(array))}; save it as float16, float32 or float64'
    )
  return array


def _open_safetensors(path: str, name: str) -> np.ndarray:
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
    raise UserError(f'{path} is not a safetensors file ({_why(error)}); save it again') from None
  if name not in names and (name or len(names) != 1):
    raise UserError(f'{path}: no tensor {name!r}; write {path}:NAME with one of {", ".join(names[:8])}')
  entry = header[name or names[0]]
  if entry['dtype'] not in _SAFETENSORS_TYPES:
    raise UserError(f'{path} holds {entry["dtype"]}; use one of {", ".join(_SAFETENSORS_TYPES)}')
  if 0 in entry['shape']:  # an empty file region cannot be mapped
    return np.empty(entry['shape'])
  offset = 8 + header_bytes + entry['data_offsets'][0]
  dtype = np.dtype(_SAFETENSORS_TYPES[entry['dtype']])
  return np.memmap(path, dtype, mode='r', offset=offset, shape=tuple(entry['shape']))


def _why(error: BaseException) -> str:
  return cell_state.printable(getattr(error, 'strerror', None) or str(error) or type(error).__name__)[:120]


def _sha256(path: str) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()
