"""Writing an activation store so that it can be killed at any moment and carried on.

A block is the unit: array chunk first, then its record in the journal, and store.json after the last one. A folder
without store.json is unfinished; a block without a record is written again.
"""

import hashlib
import json
from typing import Any

import numpy as np
import tensorstore

from sae_jax import config, files, schema
from sae_jax.data import order, soundness
from sae_jax.data.normalize import normalize
from sae_jax.data.windows import counted
from sae_jax.errors import UserError

SCHEMA = 1
ARRAYS = ('train', 'held_out')
_PLAN = 'journal-plan.json'
_FOR_DTYPE = 'use float32, normalize=center_unit, or normalize=scale for imported rows'
_SUMS = tuple(field.name for field in schema.JOURNAL if field.name not in ('sha256', 'sum'))
_SLICE = 2**20  # numbers that are normalised at once; more than that costs memory and no less time


def finished(path: str, settings: dict[str, Any], provenance: dict[str, Any]) -> bool:
  """Whether `path` holds a finished store with these settings and at least this provenance.

  Raises `UserError` when it holds a finished store made from something else.
  """
  check_place(path)
  if not files.exists(files.join(path, schema.STORE)):
    return False
  meta = config.read_store_file(path)
  _same(path, 'a store', settings | provenance, meta['config'] | meta['provenance'])
  return True


def block_tokens_at(path: str) -> int | None:
  """Tokens of a block of the store, finished or not, that a folder holds; None where it holds none that can be read."""
  check_place(path)
  for name in (schema.STORE, _PLAN):
    try:
      settings = schema.parse_large(files.read(files.join(path, name)))['config']
      found = _block_tokens(settings)
    except (OSError, ValueError, KeyError, TypeError):
      continue
    if schema.is_kind(found, int) and found > 0:
      return found
  return None


class StoreWriter:
  """Fills one store folder block by block.

  Args:
    path: local folder or gs:// URL (the latter never tried; ledgers are).
    d_model: width D.
    settings: exactly the data keys a cell's config is compared with: subject, site, text, normalize, window_tokens,
      block_windows, store_tokens, held_out_tokens, dtype, seed.
    provenance: JSON-able facts about where the activations come from.
    flops_per_token: useful FLOPs of the subject for one token.
    scale: what rows are multiplied by; of normalize='scale' alone.

  Raises `UserError` when the folder holds a store, finished or not, made from anything else.
  """

  def __init__(
    self,
    path: str,
    *,
    d_model: int,
    settings: dict[str, Any],
    provenance: dict[str, Any],
    flops_per_token: float,
    scale: float | None = None,
  ):
    self.path, self.d_model, self._scale = path, d_model, scale
    self._settings, self._dtype = settings, np.dtype(settings['dtype']).newbyteorder('<')
    self._plan = {
      'schema': SCHEMA,
      'd_model': d_model,
      # What came later stays out where it changes nothing, so that stores are what they were.
      'config': {key: value for key, value in settings.items() if schema.STORE_NEUTRAL.get(key) != value},
      'provenance': provenance,
      'subject_flops_per_token': flops_per_token,
    } | ({'scale': scale} if settings['normalize'] == 'scale' else {})
    block_tokens = _block_tokens(settings)
    sizes = {'train': settings['store_tokens'], 'held_out': settings['held_out_tokens']}
    self.streams = {name: order.Stream(sizes[name], block_tokens, settings['seed']) for name in ARRAYS}
    self._claim_folder()
    self._records: dict[tuple[str, int], dict[str, Any]] = {}
    self._stores = {name: self._open(name) for name in ARRAYS}

  def done(self, array: str, block: int) -> bool:
    """Whether a block is on disk, with the bytes its record promises."""
    try:
      record = schema.parse_large(files.read(self._record_path(array, block)))
      self._check_record(record, array, block)
      found = digest(read_block(self._stores[array], self.streams[array], block))
    # No record, one that cannot be believed, or a truncated chunk: write it again.
    except (FileNotFoundError, IsADirectoryError, ValueError):
      return False
    if record['sha256'] != found:
      return False
    self._records[array, block] = record
    return True

  def write(self, array: str, block: int, x_BD: np.ndarray) -> None:
    """Normalises and stores a whole block of raw activations [tokens of the block, D], in stream order.

    Raises `UserError` for values that the store's dtype does not hold, and when the disk is full.
    """
    stream = self.streams[array]
    if x_BD.shape != (stream.size(block), self.d_model):
      raise ValueError(f'block {block} of {array} has shape {x_BD.shape}, not {(stream.size(block), self.d_model)}')
    where = f'block {block} of {array} in {self.path}'
    stored_BD = np.empty(x_BD.shape, self._dtype)
    step = max(1, _SLICE // self.d_model)
    record = _total([self._fill(stored_BD[i : i + step], x_BD[i : i + step], where) for i in range(0, len(x_BD), step)])
    squares = record['sum_of_squares'] + record['sum_of_losses']
    soundness.check_rounding(where, record['sum_of_losses'], squares, self._dtype.name, _FOR_DTYPE)
    first = block * stream.block_tokens
    try:
      self._stores[array][first : first + len(stored_BD)].write(stored_BD).result()
      record = {'sha256': digest(stored_BD)} | record
      files.replace(self._record_path(array, block), schema.dump_line(record, _owner(array, block)))
    except (OSError, ValueError) as error:  # tensorstore reports a failed write as ValueError
      raise UserError(
        f'{where} cannot be written ({error}); free space, then run the same command: finished blocks are kept'
      ) from None
    self._records[array, block] = record

  def finish(self) -> dict[str, Any]:
    """Commits: writes store.json and drops the journal. Every block must have been written or found done."""
    blocks = {name: [self._records[name, b] for b in range(stream.blocks)] for name, stream in self.streams.items()}
    digests = {name: [record['sha256'] for record in records] for name, records in blocks.items()}
    statistics = {name: _combine(records) for name, records in blocks.items()}
    for name, facts in statistics.items():
      where = f'{self.path}: the {self.streams[name].tokens} {name} rows'
      remedy = 'take other rows' + (f', or float32 if {self._dtype.name} rounds them alike' * ('lost' in facts))
      soundness.check_varies(where, facts['variance'], facts['mean_square'], remedy)
      if 'lost' in facts:
        soundness.check_rounding(where, facts['lost'], 1.0, self._dtype.name, _FOR_DTYPE)
    meta = self._plan | {
      'tokens': self.streams['train'].tokens,
      'held_out_tokens': self.streams['held_out'].tokens,
      'block_tokens': self.streams['train'].block_tokens,
      'blocks': digests,
      'statistics': statistics,
    }
    meta = schema.seal(meta | {'identity': identity(meta)})
    try:
      files.create(files.join(self.path, schema.STORE), json.dumps(meta, indent=1, allow_nan=False).encode())
    except FileExistsError:  # another process filled the same store with the same plan
      pass
    except OSError as error:
      raise UserError(f'{self.path} cannot be finished ({error}); free space, then run the same command') from None
    for name, stream in self.streams.items():
      for block in range(stream.blocks):
        files.remove(self._record_path(name, block))
    files.remove(files.join(self.path, _PLAN))
    return meta

  def _fill(self, stored_BD: np.ndarray, x_BD: np.ndarray, where: str) -> dict[str, Any]:
    """Normalises some rows of a block into `stored_BD`, and gives their statistics."""
    if not np.isfinite(x_BD).all():
      raise UserError(f'{where}: activations are not finite; find the NaN or infinity in what produced them')
    x_BD = x_BD.astype(np.float32)
    unit_BD, _, norm_B1 = normalize(x_BD, self._settings['normalize'], self._scale)
    if self._settings['normalize'] != 'center_unit':
      norm_B1 = np.linalg.norm(x_BD.astype(np.float64), axis=-1, keepdims=True)
    with np.errstate(over='ignore'):
      stored_BD[:] = unit_BD
    if not np.isfinite(stored_BD).all():
      raise UserError(f'{where}: values exceed the range of {self._dtype.name}; {_FOR_DTYPE}')
    return _statistics(stored_BD, norm_B1) | {
      'sum_of_losses': float(np.square(unit_BD - stored_BD.astype(np.float64)).sum())
    }

  def _claim_folder(self) -> None:
    check_place(self.path)
    if files.exists(files.join(self.path, schema.STORE)):
      raise UserError(f'{self.path} holds a finished store; name an empty folder')
    plan_path = files.join(self.path, _PLAN)
    try:
      files.create(plan_path, schema.dump_line(self._plan, ''))
      return
    except FileExistsError:
      pass
    except OSError as error:
      raise UserError(f'{self.path} cannot be written ({error}); name another folder') from None
    try:
      there = schema.parse_large(files.read(plan_path, schema.LARGE))
      schema.check_digest(there)
    except (schema.Broken, IsADirectoryError) as error:
      why = getattr(error, 'strerror', None) or str(error)
      raise UserError(f'{plan_path} is not the plan of a store ({why}); delete the folder') from None
    _same(self.path, 'an unfinished store', _flat(self._plan), _flat(there))

  def _check_record(self, record: dict[str, Any], array: str, block: int) -> None:
    """Raises `schema.Broken` unless a record of the journal can be believed; early versions wrote no digest."""
    schema.check(record, schema.JOURNAL, _owner(array, block))
    missing = [field.name for field in schema.JOURNAL if field.name not in record and not field.may]
    if missing or record['tokens'] != self.streams[array].size(block) or len(record['sum']) != self.d_model:
      raise schema.Broken('it is of another block')
    if not all(schema.is_kind(one, float) for one in record['sum']):
      raise schema.Broken('sum is not a list of numbers')

  def _open(self, array: str) -> tensorstore.TensorStore:
    stream = self.streams[array]
    metadata = {
      'shape': [stream.tokens, self.d_model],
      'chunk_grid': {
        'name': 'regular',
        'configuration': {'chunk_shape': [min(stream.tokens, stream.block_tokens), self.d_model]},
      },
      'data_type': self._dtype.name,
      'codecs': [{'name': 'bytes', 'configuration': {'endian': 'little'}}],
    }
    spec = array_spec(self.path, array) | {'metadata': metadata}
    try:
      return tensorstore.open(spec, open=True, create=True).result()
    except (OSError, ValueError) as error:
      raise UserError(f'{self.path}/{array} cannot be opened for writing ({error}); name another folder') from None

  def _record_path(self, array: str, block: int) -> str:
    return files.join(self.path, f'journal-{array}-{block:06d}.json')


def _owner(array: str, block: int) -> str:
  return f'{array} {block}'


def check_place(path: str) -> None:
  """Raises `UserError` where both tensorstore and exclusive create cannot go."""
  if not files.is_local(path) and not path.startswith('gs://'):
    raise UserError(f'{path}: activation stores live on local disk or gs://; name such a path')


def array_spec(path: str, array: str) -> dict[str, Any]:
  """The tensorstore spec of one array of a store."""
  if files.is_local(path):
    return {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': f'{files.local(path)}/{array}/'}}
  return {'driver': 'zarr3', 'kvstore': f'{path.rstrip("/")}/{array}/'}


def read_block(array: tensorstore.TensorStore, stream: order.Stream, block: int) -> np.ndarray:
  """One block [tokens, D] in the dtype of the store. Raises ValueError when its chunk is truncated."""
  first = block * stream.block_tokens
  return array[first : first + stream.size(block)].read().result()


def digest(x_BD: np.ndarray) -> str:
  """SHA-256 of the rows as little-endian bytes, which does not depend on how they are chunked on disk."""
  data = np.ascontiguousarray(x_BD, x_BD.dtype.newbyteorder('<'))
  return hashlib.sha256(data.view(np.uint8).reshape(-1)).hexdigest()


def identity(meta: dict[str, Any]) -> str:
  """Content hash of a store: every row, their order over all epochs, and the space they live in."""
  settings = meta['config']
  content = {key: meta[key] for key in ('schema', 'd_model', 'tokens', 'held_out_tokens', 'block_tokens', 'blocks')}
  content |= {key: settings[key] for key in ('dtype', 'normalize', 'seed')}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _statistics(x_BD: np.ndarray, norm_B1: np.ndarray) -> dict[str, Any]:
  x_BD = x_BD.astype(np.float64)
  return {
    'tokens': len(x_BD),
    'sum': x_BD.sum(axis=0).tolist(),
    'sum_of_squares': float(np.square(x_BD).sum()),
    'sum_of_norms': float(norm_B1.sum(dtype=np.float64)),
    'zero_tokens': int((norm_B1 == 0).sum()),
  }


def _total(records: list[dict[str, Any]]) -> dict[str, Any]:
  """The sums of several groups of rows as those of one."""
  total = {name: sum(r[name] for r in records) for name in _SUMS if name in records[0]}
  return total | {'sum': np.sum([r['sum'] for r in records], axis=0).tolist()}


def _combine(records: list[dict[str, Any]]) -> dict[str, Any]:
  """Statistics of stored rows: mean over tokens [D], total variance about it, norms, and what rounding lost.

  `mean_norm` is of the centred activations for center_unit and of the activations as they came otherwise. `lost` is a
  share of the variance, absent where a block was written by a version that did not count it.
  """
  counted = all('sum_of_losses' in r for r in records)
  total = _total([r if counted else {name: r[name] for name in r if name != 'sum_of_losses'} for r in records])
  tokens, mean_D = total['tokens'], np.array(total['sum']) / total['tokens']
  mean_square = total['sum_of_squares'] / tokens
  variance = mean_square - float(mean_D @ mean_D)
  lost = total.get('sum_of_losses', 0.0) / tokens
  return {
    'mean': mean_D.tolist(),
    'mean_square': mean_square,
    'variance': variance,
    'mean_norm': total['sum_of_norms'] / tokens,
    'zero_tokens': total['zero_tokens'],
  } | ({'lost': lost / variance if variance > 0 else float(lost > 0)} if counted else {})


def _block_tokens(settings: dict[str, Any]) -> int:
  rule = settings.get('positions', schema.STORE_NEUTRAL['positions'])
  return settings['block_windows'] * counted(settings['window_tokens'], rule)


def _same(path: str, kind: str, mine: dict[str, Any], theirs: dict[str, Any]) -> None:
  theirs = schema.STORE_NEUTRAL | theirs
  for key, value in (schema.STORE_NEUTRAL | mine).items():
    if theirs.get(key) != value:
      raise UserError(
        f'{path} holds {kind} with {key}={theirs.get(key)!r}, not {value!r}; '
        'use those settings, delete it, or name another folder'
      )


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    flat |= _flat(value) if isinstance(value, dict) else {key: value}
  return flat
