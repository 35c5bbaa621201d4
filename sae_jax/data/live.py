"""The subject run live: the stream of a harvested store, computed as it is needed, with no disk.

The order is that of `sae_jax.data.order`, so `rows` gives what a store of the same settings would, rounding included.
"""

import concurrent.futures
import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from sae_jax.config import Cell
from sae_jax.data import live_mesh, soundness
from sae_jax.data.normalize import normalize
from sae_jax.data.reading import Reading
from sae_jax.errors import UserError
from sae_jax.subjects import catalogue, text

_CACHED_BLOCKS = 3


class Live:
  """Implements `sae_jax.data.source.Source`. The next block runs through the subject in a background thread.

  Raises `UserError` for a subject, site or text that does not exist, another width than `sae.d_model`, or more
  tokens than `data.store_tokens` x `data.epochs`.
  """

  def __init__(self, config: Cell):
    data = config.data
    self.normalization, self.dtype, self.epochs = data.normalize, data.dtype, data.epochs
    if config.train.tokens > data.store_tokens * data.epochs:
      raise UserError(
        f'train.tokens={config.train.tokens} but the stream has data.store_tokens={data.store_tokens} x '
        f'data.epochs={data.epochs}; raise either or lower train.tokens'
      )
    if config.eval.tokens > data.held_out_tokens:
      raise UserError(
        f'eval.tokens={config.eval.tokens} but data.held_out_tokens={data.held_out_tokens}; raise the latter'
      )
    if text.is_folder(data.text):
      raise UserError(
        f'data.text={data.text!r} is a folder, whose files may change while a live source reads them again; harvest a store'
      )
    self.reading = Reading(data)
    weights = self.reading.subject.provenance['subject_sha256']
    if data.subject not in catalogue.ENTRIES and data.identity != weights:
      raise UserError(
        f'data.identity={data.identity!r} but the weights of {data.subject} are {weights}; set data.identity to that, so '
        'that the id of the cell names them'
      )
    self.d_model, self.flops_per_token = self.reading.d_model, self.reading.flops_per_token
    if self.d_model != config.sae.d_model:
      raise UserError(f'sae.d_model={config.sae.d_model} but {data.subject} has width {self.d_model}; use that')
    facts = {'subject': data.subject, 'site': data.site, 'text': data.text, 'normalize': data.normalize, 'identity': ''}
    self.provenance = self.reading.subject.provenance | facts | {'text_sha256': self.reading.windows['train'].corpus}
    self._runner = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='subject')
    # Futures, so that a block in flight is waited for and not run twice.
    self._train_block = functools.lru_cache(maxsize=_CACHED_BLOCKS)(self._start_block)
    self._held_out_block = functools.cache(self._start_block)  # read again at every evaluation of every cell

  def rows(self, start: int, stop: int) -> np.ndarray:
    return self._range('train', start, stop, self.reading.streams['train'].tokens * self.epochs)

  def held_out(self, start: int, stop: int) -> np.ndarray:
    return self._range('held_out', start, stop, self.reading.streams['held_out'].tokens)

  def batches(self, mesh: Mesh, batch: int, start: int, stop: int) -> Iterator[jax.Array]:
    """Training batches start, ..., stop - 1, made on the devices: see `sae_jax.data.live_mesh`."""

    def stored(x_WTD: jax.Array) -> jax.Array:
      # Uncorrected, as it always was: cells go on with the bits they began with.
      return normalize(x_WTD, self.normalization, correct=False)[0].astype(self.dtype)

    rows = self.reading.streams['train'].tokens * self.epochs
    return live_mesh.batches(self.reading, stored, rows, mesh, batch, start, stop)

  def _range(self, name: str, start: int, stop: int, held: int) -> np.ndarray:
    stream, parts, position = self.reading.streams[name], [], start
    start_block = self._train_block if name == 'train' else self._held_out_block
    for block, first, last in stream.locate(start, stop):
      pending = start_block(name, block)
      after = position + stream.size(block) - first
      if after < held:
        start_block(name, stream.locate(after, after + 1)[0][0])
      parts.append(pending.result()[first:last])
      position += last - first
    return np.concatenate(parts)

  def _start_block(self, name: str, block: int) -> concurrent.futures.Future:
    return self._runner.submit(self._run_block, name, block)

  def _run_block(self, name: str, block: int) -> np.ndarray:
    x_BD = normalize(self.reading.block(name, block)[0], self.normalization)[0]
    with np.errstate(over='ignore'):
      rounded_BD = x_BD.astype(self.dtype).astype(np.float32)  # as a store would
    where, remedy = f'block {block} of {name}', 'use data.dtype=float32 or data.normalize=center_unit'
    if not np.isfinite(rounded_BD).all():
      raise UserError(f'{where}: values exceed the range of {self.dtype}; {remedy}')
    soundness.check_rounding(where, *soundness.lost_squares(x_BD, rounded_BD), self.dtype, remedy)
    return rounded_BD
