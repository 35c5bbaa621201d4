"""The one order of tokens, for stores and for a live subject: a pure function of `data.seed`.

Windows are permuted, see `sae_jax.data.windows`. `data.block_windows` of them make a block. Tokens are permuted inside a
block. Epochs after the first permute the blocks.
"""

import bisect
import dataclasses
import functools
import hashlib

import numpy as np


def permutation(n: int, *label: str | int) -> np.ndarray:
  """The permutation of 0..n-1 that belongs to a label: int64 [n], the same everywhere and forever.

  It sorts n raw words of a Philox counter generator, whose stream numpy guarantees for a key; the stream of
  `Generator.permutation` may change with any release.
  """
  key = np.frombuffer(hashlib.sha256(repr(label).encode()).digest()[:16], '<u8')
  return np.argsort(np.random.Philox(key=key.astype(np.uint64)).random_raw(n), kind='stable')


def tokens_of_block(n_tokens: int, stream: str, seed: int, block: int) -> np.ndarray:
  """Where each token of a block comes from: row i of the block is row `out[i]` of what counts in its windows.

  `stream` is 'train' or 'held_out'; the held-out order ignores the seed, so that every seed is scored alike.
  """
  return permutation(n_tokens, 'tokens', stream, seed if stream == 'train' else 0, block)


@dataclasses.dataclass(frozen=True)
class Stream:
  """The geometry of a stream over all epochs: `tokens` in blocks of `block_tokens`, the last one may be shorter."""

  tokens: int
  block_tokens: int
  seed: int

  @property
  def blocks(self) -> int:
    return -(-self.tokens // self.block_tokens)

  def size(self, block: int) -> int:
    """Tokens in a block."""
    return min(self.block_tokens, self.tokens - block * self.block_tokens)

  def locate(self, start: int, stop: int) -> list[tuple[int, int, int]]:
    """Positions start..stop as (block, first row, last row + 1), in order, crossing blocks and epochs."""
    parts = []
    while start < stop:
      epoch, offset = divmod(start, self.tokens)
      order, starts = _epoch(self, epoch)
      i = bisect.bisect_right(starts, offset) - 1
      first = offset - starts[i]
      last = min(self.size(order[i]), first + stop - start)
      parts.append((order[i], first, last))
      start += last - first
    return parts


@functools.lru_cache(maxsize=8)
def _epoch(stream: Stream, epoch: int) -> tuple[list[int], list[int]]:
  """Blocks in the order of one epoch, and where each begins in it."""
  order = permutation(stream.blocks, 'blocks', stream.seed, epoch) if epoch else np.arange(stream.blocks)
  sizes = np.minimum(stream.block_tokens, stream.tokens - order * stream.block_tokens)
  return order.tolist(), (np.cumsum(sizes) - sizes).tolist()
