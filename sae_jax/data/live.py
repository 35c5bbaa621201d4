"""The subject run live: the stream of a harvested store, computed as it is needed, with no disk.

The order is that of `sae_jax.data.order`, so `rows` gives what a store of the same settings would, rounding included.
"""

import concurrent.futures
import functools

import numpy as np

from sae_jax import subjects
from sae_jax.config import Config
from sae_jax.data import harvest, order, soundness
from sae_jax.data.normalize import normalize
from sae_jax.errors import UserError
from sae_jax.subjects import text
from sae_jax.subjects.subject import Subject

_CACHED_BLOCKS = 3


@functools.lru_cache(maxsize=1)  # a worker opens one stream for cell after cell; reading all text takes seconds
def _opened(
  subject_name: str,
  site: str,
  text_name: str,
  window_tokens: int,
  store_tokens: int,
  held_out_tokens: int,
  seed: int,
) -> tuple[Subject, order.Windows, str]:
  """The subject, its windows and the digest of their text."""
  documents = text.load(text_name)
  subject = subjects.load(subject_name, site)
  plan = order.plan(
    subject.encode([document for _, document in documents]),
    start_token=subject.start_token,
    window_tokens=window_tokens,
    store_tokens=store_tokens,
    held_out_tokens=held_out_tokens,
    seed=seed,
  )
  return subject, plan, text.sha256(documents)


class Live:
  """Implements `sae_jax.data.source.Source`. The next block runs through the subject in a background thread.

  Raises `UserError` for a subject, site or text that does not exist, another width than `sae.d_model`, or more
  tokens than `data.store_tokens` x `data.epochs`.
  """

  def __init__(self, config: Config):
    data = config.data
    self.settings = {
      'seed': data.seed,
      'block_windows': data.block_windows,
      'window_tokens': data.window_tokens,
    }
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
    self.subject, self.plan, text_sha256 = _opened(
      data.subject,
      data.site,
      data.text,
      data.window_tokens,
      data.store_tokens,
      data.held_out_tokens,
      data.seed,
    )
    self.site = data.site
    self.d_model = self.subject.width(data.site)
    if self.d_model != config.sae.d_model:
      raise UserError(f'sae.d_model={config.sae.d_model} but {data.subject} has width {self.d_model}; use that')
    window = data.window_tokens
    self.flops_per_token = self.subject.flops(data.site, window) * window / (window - 1)
    self.provenance = self.subject.provenance | {
      'subject': data.subject,
      'site': data.site,
      'text': data.text,
      'normalize': data.normalize,
      'identity': '',
      'text_sha256': text_sha256,
    }
    block_tokens = data.block_windows * (data.window_tokens - 1)
    self.streams = {
      'train': order.Stream(data.store_tokens, block_tokens, data.seed),
      'held_out': order.Stream(data.held_out_tokens, block_tokens, data.seed),
    }
    self._runner = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='subject')
    # Futures, so that a block in flight is waited for and not run twice.
    self._train_block = functools.lru_cache(maxsize=_CACHED_BLOCKS)(self._start_block)
    self._held_out_block = functools.cache(self._start_block)  # read again at every evaluation of every cell

  def rows(self, start: int, stop: int) -> np.ndarray:
    return self._range('train', start, stop, self.streams['train'].tokens * self.epochs)

  def held_out(self, start: int, stop: int) -> np.ndarray:
    return self._range('held_out', start, stop, self.streams['held_out'].tokens)

  def _range(self, name: str, start: int, stop: int, held: int) -> np.ndarray:
    stream, parts, position = self.streams[name], [], start
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
    windows_WT = {'train': self.plan.train_WT, 'held_out': self.plan.held_out_WT}[name]
    x_BD = harvest.block_activations(self.subject, self.site, windows_WT, name, block, self.settings)
    x_BD = normalize(x_BD[: self.streams[name].size(block)], self.normalization)[0]
    with np.errstate(over='ignore'):
      rounded_BD = x_BD.astype(self.dtype).astype(np.float32)  # as a store would
    where, remedy = f'block {block} of {name}', 'use data.dtype=float32 or data.normalize=center_unit'
    if not np.isfinite(rounded_BD).all():
      raise UserError(f'{where}: values exceed the range of {self.dtype}; {remedy}')
    soundness.check_rounding(where, *soundness.lost_squares(x_BD, rounded_BD), self.dtype, remedy)
    return rounded_BD
