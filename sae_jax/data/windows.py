"""Windows of a text: the tokens that a language model reads together, where each comes from, what of it counts.

A window is one place of one document of one corpus. It opens with the start token, and the rest is the document's.
Stores, live sources and measures all mean the same window by (digest of the corpus, document, offset).
"""

import dataclasses
from typing import Any

import numpy as np

from sae_jax.data.order import permutation
from sae_jax.errors import UserError

# Without it one long document could be the whole held-out set.
_HELD_OUT_FRACTION = 0.05


# How many positions of a window do not count, by rule.
_DROPPED = {'drop_first': 1, 'from_3': 3, 'by_norm': 3}
MASSIVE = 10.0  # times the median norm of its window


def counted(window_tokens: int, rule: str) -> int:
  """How many positions of a window count."""
  return window_tokens - _DROPPED[rule]


def counting(x_WTD: Any, rule: str) -> Any:
  """The activations [W, T', D] at the positions of windows that count, in order; of numpy or of jax.

  Args:
    x_WTD: raw activations of whole windows.
    rule: see `places`.
  """
  if rule != 'by_norm':
    return x_WTD[:, _DROPPED[rule] :]
  return x_WTD.__array_namespace__().take_along_axis(x_WTD, places(x_WTD, rule)[..., None], axis=1)


def places(x_WTD: Any, rule: str) -> Any:
  """The positions of windows that count, in order: whole numbers [W, T'], of numpy or of jax.

  The start token is an attention sink: its activation is far longer than any other and says nothing. In some models
  other tokens are so too, most of them at the beginning of a window.

  Args:
    x_WTD: raw activations of whole windows.
    rule: 'drop_first' leaves out the start token; 'from_3' the first three positions; 'by_norm' three positions of each
      window: the start token, then those with more than ten times the median norm, then the first ones.
  """
  xp, dropped = x_WTD.__array_namespace__(), _DROPPED[rule]
  if rule != 'by_norm':
    n, window, _ = x_WTD.shape
    return xp.zeros((n, 1), dtype=xp.int32) + xp.arange(dropped, window, dtype=xp.int32)[None]
  norm_WT = xp.linalg.norm(x_WTD.astype(xp.float32), axis=-1)
  place_WT = -xp.arange(x_WTD.shape[1], dtype=xp.float32)[None] + xp.zeros_like(norm_WT)
  massive_WT = norm_WT > MASSIVE * xp.median(norm_WT, axis=1, keepdims=True)
  # Above 0 the massive ones by their norm, below it the others by their place.
  badness_WT = xp.where(place_WT == 0, xp.inf, xp.where(massive_WT, norm_WT, place_WT))
  return xp.sort(xp.argsort(badness_WT, axis=1, stable=True)[:, :-dropped], axis=1)


@dataclasses.dataclass(frozen=True)
class Windows:
  """Windows of one corpus, in the order in which they are read.

  Attributes:
    corpus: digest of its documents.
    document_W: in which document each window lies, by its position in the corpus.
    offset_W: at which of the document's tokens it begins.
    ids_WT: its token ids, int32. The first is the start token.
  """

  corpus: str
  document_W: np.ndarray
  offset_W: np.ndarray
  ids_WT: np.ndarray

  def __len__(self) -> int:
    return len(self.ids_WT)

  def __getitem__(self, some: slice) -> 'Windows':
    return Windows(self.corpus, self.document_W[some], self.offset_W[some], self.ids_WT[some])


@dataclasses.dataclass(frozen=True)
class Split:
  """The windows that are trained on and those that are held out, each in stream order.

  `held_out_documents` are sorted positions in the corpus.
  """

  train: Windows
  held_out: Windows
  held_out_documents: tuple[int, ...]


def split(
  documents: list[np.ndarray],
  *,
  corpus: str,
  start_token: int,
  window_tokens: int,
  store_tokens: int,
  held_out_tokens: int,
  seed: int,
  positions: str,
) -> Split:
  """Splits the documents of a corpus (int32 ids each) and orders their windows, just enough for the tokens asked.

  What remains of a document after its last whole window is dropped. 5 % of the documents are held out, in an order that
  does not depend on the seed, and more of them until they hold `held_out_tokens`. The held-out windows are drawn from
  all of these documents. Tokens are those at positions that count.
  Raises `UserError` when the text holds fewer tokens than asked.
  """
  body, kept = window_tokens - 1, counted(window_tokens, positions)
  if kept < 1:
    raise UserError(
      f'data.window_tokens={window_tokens} has no position that counts under data.positions={positions!r}; raise it above '
      f'{window_tokens - kept}'
    )
  counts = [len(ids) // body for ids in documents]
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

  def windows(chosen: list[int], n: int, *label: str | int) -> Windows:
    pick_W = permutation(sum(counts[i] for i in chosen), *label)[:n]
    document_W = np.repeat(chosen, [counts[i] for i in chosen])[pick_W]
    offset_W = np.concatenate([np.arange(counts[i]) * body for i in chosen])[pick_W]
    ids_WT = np.concatenate([documents[i][: counts[i] * body].reshape(-1, body) for i in chosen])[pick_W]
    first_W1 = np.full((len(ids_WT), 1), start_token, np.int32)
    return Windows(corpus, document_W, offset_W, np.concatenate([first_W1, ids_WT.astype(np.int32)], axis=1))

  return Split(
    train=windows(train, -(-store_tokens // kept), 'windows', seed),
    held_out=windows(held_out, need, 'held-out windows'),
    held_out_documents=tuple(held_out),
  )
