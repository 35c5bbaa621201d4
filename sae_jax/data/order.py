"""The one order of tokens, for stores and for a live subject: pure functions of the texts and of `data.seed`.

Documents are cut into windows, windows permuted, `block_windows` of them make a block, tokens are permuted inside
it; epoch e > 0 permutes the blocks. The held-out split is by document and does not depend on the seed.
"""

import bisect
import dataclasses
import functools
import hashlib

import numpy as np

from sae_jax.errors import UserError

# Without it one long document could be the whole held-out set.
_HELD_OUT_FRACTION = 0.05


def permutation(n: int, *label: str | int) -> np.ndarray:
  """The permutation of 0..n-1 that belongs to a label: int64 [n], the same everywhere and forever.

  It sorts n raw words of a Philox counter generator, whose stream numpy guarantees for a key; the stream of
  `Generator.permutation` may change with any release.
  """
  key = np.frombuffer(hashlib.sha256(repr(label).encode()).digest()[:16], '<u8')
  return np.argsort(np.random.Philox(key=key.astype(np.uint64)).random_raw(n), kind='stable')


@dataclasses.dataclass(frozen=True)
class Windows:
  """Which windows are trained on and which are held out, in stream order.

  Attributes:
    train_WT, held_out_WT: token ids, int32 [windows, T], each row opening with the start token.
    held_out_documents: sorted positions of the documents that are held out.
  """

  train_WT: np.ndarray
  held_out_WT: np.ndarray
  held_out_documents: tuple[int, ...]


def plan(
  documents: list[np.ndarray],
  *,
  start_token: int,
  window_tokens: int,
  store_tokens: int,
  held_out_tokens: int,
  seed: int,
) -> Windows:
  """Splits documents (int32 ids each) and orders their windows; holds just enough windows for the tokens asked.

  A window is the start token and T - 1 tokens of one document; what remains of a document is dropped. In a fixed
  order, 5 % of the documents are held out, and more until they hold `held_out_tokens`; the held-out windows are drawn
  from all of them. Position 0 of a window is not counted.
  Raises `UserError` when the text holds fewer tokens than asked.
  """
  kept = window_tokens - 1
  counts = [len(ids) // kept for ids in documents]
  need = -(-held_out_tokens // kept)
  fixed_order = permutation(len(documents), 'documents')
  enough = int(np.searchsorted(np.cumsum([counts[i] for i in fixed_order]), need)) + 1
  n_held_out = max(enough, round(_HELD_OUT_FRACTION * len(documents)))
  held_out, train = sorted(fixed_order[:n_held_out].tolist()), sorted(fixed_order[n_held_out:].tolist())
  total = sum(counts) * kept
  if sum(counts[i] for i in held_out) < need:
    raise UserError(f'data.held_out_tokens={held_out_tokens} but the text holds {total} tokens; lower it')
  available = sum(counts[i] for i in train) * kept
  if store_tokens > available:
    raise UserError(
      f'data.store_tokens={store_tokens} but {available} tokens of the text are left to train on after '
      f'{total - available} in the held-out documents; use data.store_tokens={available} or less'
    )
  return Windows(
    train_WT=_windows(documents, train, start_token, kept, -(-store_tokens // kept), ('windows', seed)),
    held_out_WT=_windows(documents, held_out, start_token, kept, need, ('held-out windows',)),
    held_out_documents=tuple(held_out),
  )


def tokens_of_block(n_tokens: int, stream: str, seed: int, block: int) -> np.ndarray:
  """Where each token of a block comes from: row i of the block is row `out[i]` of its windows, position 0 dropped.

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


def _windows(
  documents: list[np.ndarray], chosen: list[int], start_token: int, kept: int, n: int, label: tuple
) -> np.ndarray:
  cut = [documents[i][: len(documents[i]) // kept * kept].reshape(-1, kept) for i in chosen]
  ids_WT = np.concatenate(cut)
  ids_WT = ids_WT[permutation(len(ids_WT), *label)[:n]]
  return np.concatenate([np.full((len(ids_WT), 1), start_token, np.int32), ids_WT.astype(np.int32)], axis=1)
