"""Activation stores: read by position with every block checked, made from arrays of your own, verified.

python -m sae_jax.data.store import --from=acts.npy --out=runs/store --held_out=16384
python -m sae_jax.data.store verify runs/store
"""

import argparse
import collections
import concurrent.futures
import math
import sys
import threading
from typing import Any

import numpy as np
import tensorstore
from tqdm import tqdm

from sae_jax import cell_state, config, files, schema
from sae_jax.data import order, soundness, store_import, store_writer
from sae_jax.errors import UserError, one_line_errors

_ZEROS = 2**28  # bytes of a block that may be missing because it holds zeros alone
_CACHED_BLOCKS = 3  # an array's current block, the next one, and the one before for ranges that straddle


class Store:
  """A finished store as a `sae_jax.data.source.Source`. Reads ahead one block in a background thread.

  Raises `UserError` when the store is missing, broken, of another width than `sae.d_model`, or not the one that
  the config was resolved with; later, when a block is missing or its bytes have changed.
  """

  def __init__(self, cell: config.Cell):
    path = cell.data.path
    meta = read_meta(path)
    if meta['d_model'] != cell.sae.d_model:
      raise UserError(f'sae.d_model={cell.sae.d_model} but the store at {path} has width {meta["d_model"]}; use that')
    if meta['identity'] != cell.data.identity:
      raise UserError(
        f'the store at {path} has identity {meta["identity"][:12]}, not {cell.data.identity[:12]} as when this cell '
        'was made; point data.path at the old store or make a new cell'
      )
    self.d_model = meta['d_model']
    self.flops_per_token = float(meta['subject_flops_per_token'])
    settings = {key: meta['config'][key] for key in ('subject', 'site', 'text', 'normalize')}
    # In sae.json `imported_from` is the format of an autoencoder from elsewhere.
    facts = {('activations_from' if key == 'imported_from' else key): v for key, v in meta['provenance'].items()}
    self.provenance = facts | settings | {'identity': meta['identity']}
    if settings['normalize'] == 'scale':
      self.provenance['scale'] = meta['scale']
    for warning in soundness.row_warnings(meta['provenance']):
      print(warning, file=sys.stderr, flush=True)
    self._epochs = cell.data.epochs
    self._train, self._held_out = (_Array(path, meta, name) for name in store_writer.ARRAYS)

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Training tokens start..stop over all epochs, float32 [stop - start, D]. Raises `UserError` past the end."""
    held = self._train.stream.tokens * self._epochs
    if not 0 <= start <= stop <= held:
      raise UserError(
        f'training tokens {start} to {stop} are asked but the store holds {held} over {self._epochs} epochs; '
        'lower train.tokens or raise data.epochs'
      )
    return self._train.rows(start, stop, held)

  def held_out(self, start: int, stop: int) -> np.ndarray:
    """Held-out tokens start..stop, float32 [stop - start, D]. Raises `UserError` past the end."""
    held = self._held_out.stream.tokens
    if not 0 <= start <= stop <= held:
      raise UserError(f'held-out tokens {start} to {stop} are asked but the store holds {held}; lower eval.tokens')
    return self._held_out.rows(start, stop, held)


class _Array:
  """One array of a store with a small cache of checked blocks. Safe to use from several threads."""

  def __init__(self, path: str, meta: dict[str, Any], name: str):
    self.path, self.name, self.digests = path, name, meta['blocks'][name]
    tokens = meta['tokens'] if name == 'train' else meta['held_out_tokens']
    self.stream = order.Stream(tokens, meta['block_tokens'], meta['config']['seed'])
    try:
      self._array = tensorstore.open(store_writer.array_spec(path, name), read=True, open=True).result()
    except (OSError, ValueError) as error:
      why = cell_state.printable(str(error))
      raise UserError(f'{path}/{name} is missing or broken ({why}); harvest the store again') from None
    expected = (tokens, meta['d_model']), meta['config']['dtype']
    if (self._array.shape, self._array.dtype.name) != expected:
      raise UserError(f'{path}/{name} is {self._array.shape} {self._array.dtype.name}, not {expected}; harvest again')
    chunk = (min(tokens, meta['block_tokens']), meta['d_model'])
    if self._array.chunk_layout.read_chunk.shape != chunk:
      raise UserError(
        f'{path}/{name} has chunks of {self._array.chunk_layout.read_chunk.shape}, not {chunk}; harvest again'
      )
    self._chunk_bytes = chunk[0] * chunk[1] * self._array.dtype.numpy_dtype.itemsize
    self._lock = threading.Lock()
    self._cache: collections.OrderedDict[int, concurrent.futures.Future] = collections.OrderedDict()
    self._reader = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix=f'store-{name}')

  def rows(self, start: int, stop: int, held: int) -> np.ndarray:
    out_BD = np.empty((stop - start, self._array.shape[1]), np.float32)
    position = start
    for block, first, last in self.stream.locate(start, stop):
      pending = self._request(block)
      after = position + self.stream.size(block) - first
      if after < held:
        self._request(self.stream.locate(after, after + 1)[0][0])
      end = position + last - first
      out_BD[position - start : end - start] = self._wait(block, pending)[first:last]
      position = end
    return out_BD

  def read(self, block: int) -> np.ndarray:
    """A block from disk, checked. Raises `UserError` when it is not what was written."""
    where = f'block {block} of {self.name} in {self.path}'
    remedy = 'copy the store again, or delete it and harvest again'
    self._check_size(block, where, remedy)
    try:
      x_BD = store_writer.read_block(self._array, self.stream, block)
    except (OSError, ValueError) as error:  # tensorstore reports a truncated chunk as ValueError
      raise UserError(f'{where} cannot be read ({cell_state.printable(str(error))}); {remedy}') from None
    # A missing chunk reads as zeros and is found here.
    if store_writer.digest(x_BD) != self.digests[block]:
      raise UserError(f'{where} does not have the bytes that were written; {remedy}')
    return x_BD

  def _check_size(self, block: int, where: str, remedy: str) -> None:
    """Raises `UserError` before memory is taken for a block that the disk does not hold."""
    path = files.join(self.path, self.name, 'c', str(block), '0')
    if not files.is_local(path):
      return
    if not files.is_file(path):
      if self._chunk_bytes > _ZEROS:  # one of zeros alone is not stored
        raise UserError(f'{where} cannot be read (its file is missing); {remedy}')
    elif files.local(path).stat().st_size != self._chunk_bytes:
      raise UserError(
        f'{where} cannot be read (its file has {files.local(path).stat().st_size} bytes, not {self._chunk_bytes}); '
        f'{remedy}'
      )

  def _request(self, block: int) -> concurrent.futures.Future:
    with self._lock:
      if block not in self._cache:
        self._cache[block] = self._reader.submit(self.read, block)
      self._cache.move_to_end(block)
      while len(self._cache) > _CACHED_BLOCKS:
        self._cache.popitem(last=False)
      return self._cache[block]

  def _wait(self, block: int, pending: concurrent.futures.Future) -> np.ndarray:
    try:
      return pending.result()
    except UserError:
      with self._lock:
        self._cache.pop(block, None)  # a repaired block can be read without a new process
      raise


def read_meta(path: str) -> dict[str, Any]:
  """store.json of a finished store, checked against itself. Raises `UserError`."""
  store_writer.check_place(path)
  meta = config.read_store_file(path)
  try:
    counts = [meta[key] for key in ('d_model', 'tokens', 'held_out_tokens', 'block_tokens')]
    number, settings = meta['schema'], meta['config']
    sound = (
      all(type(n) is int and n > 0 for n in counts)
      and type(settings['seed']) is int
      and settings['dtype'] in ('float16', 'float32')
      and all(
        len(meta['blocks'][name]) == -(-n // counts[3])
        for name, n in zip(store_writer.ARRAYS, counts[1:3], strict=True)
      )
      and isinstance(meta['provenance'], dict)
      and 0 <= float(meta['subject_flops_per_token']) < math.inf
      and all(isinstance(settings[key], str) for key in ('subject', 'site', 'text', 'normalize'))
      and (settings['normalize'] != 'scale' or 0 < float(meta['scale']) < math.inf)
    )
    found = store_writer.identity(meta)
  except (KeyError, TypeError, ValueError, OverflowError) as error:
    raise UserError(
      f'{path}/{schema.STORE} is incomplete ({cell_state.printable(repr(error))}); harvest the store again'
    ) from None
  if number != store_writer.SCHEMA:
    raise UserError(f'{path} has store schema {number}, not {store_writer.SCHEMA}; use the version that wrote it')
  if not sound or found != meta['identity']:
    raise UserError(f'{path}/{schema.STORE} contradicts itself; it was changed: copy or harvest the store again')
  return meta


def verify(path: str) -> dict[str, Any]:
  """Reads every block of a store and returns its store.json. Raises `UserError` that names every bad block."""
  meta = read_meta(path)
  bad = []
  for array in (_Array(path, meta, name) for name in store_writer.ARRAYS):
    for block in tqdm(range(array.stream.blocks), desc=array.name, unit='block', disable=None):
      try:
        array.read(block)
      except UserError:
        bad.append(f'{array.name} {block}')
  if bad:
    raise UserError(f'{path}: {len(bad)} blocks are missing or changed ({", ".join(bad)}); copy or harvest it again')
  return meta


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m sae_jax.data.store', description=__doc__.splitlines()[0])
  commands = parser.add_subparsers(dest='command', required=True)
  check = commands.add_parser('verify', help='read every block and compare it with its SHA-256')
  check.add_argument('path', metavar='DIR')
  make = commands.add_parser('import', help='make a store from activations of your own, [tokens, D] or [B, T, D]')
  store_import.add_arguments(make)
  args = vars(parser.parse_args(argv))
  if args.pop('command') == 'verify':
    meta, path = verify(args['path']), args['path']
  else:
    path = args['out']
    store_import.import_arrays(**args)
    meta = read_meta(path)
  print(
    f'{path}: {meta["tokens"]} training and {meta["held_out_tokens"]} held-out tokens of width {meta["d_model"]}, '
    f'identity {meta["identity"][:12]}'
    + (f', multiplied by {meta["scale"]:.6g}' if meta['config']['normalize'] == 'scale' else '')
  )
  for text in store_import.warnings(meta):
    print(text, file=sys.stderr)
  return 0


if __name__ == '__main__':
  main()
