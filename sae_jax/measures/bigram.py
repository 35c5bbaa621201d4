"""Predictions from the last token alone: how well a bigram model does on the held-out windows.

Counts are of the training text. A share of each prediction, larger after tokens that many different ones follow, goes to
single tokens (Witten and Bell 1991), each counted once more than it occurs.
"""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.measures.inputs import Inputs

_TOKENS_AT_ONCE = 32  # whose predictions exist at the same time


def bigram(i: int, inputs: Inputs, windows: int) -> dict[str, np.ndarray]:
  """'ce_WT' and 'kl_WT' of a held-out block, [W, T - 1], in nats: as `Inputs.spliced` has them, of the bigram model.

  Args:
    i: the block.
    inputs: with the text.
    windows: of the training text that are counted.
  """
  some = inputs.text_windows[:windows]
  name = f'bigram.{hashlib.sha256(some.ids_WT.astype("<i4").tobytes()).hexdigest()[:16]}'
  counts = inputs.kept(f'{name}.counts', lambda: _counts(some.ids_WT, inputs.subject.arch.vocabulary))
  return inputs.kept(f'{name}.{i:04d}', lambda: _predicted(i, inputs, counts))


def _counts(ids_WT: np.ndarray, vocabulary: int) -> dict[str, np.ndarray]:
  """Which token follows which, and how often; sorted by the first. The start token begins no pair."""
  pair_N = ids_WT[:, 1:-1].astype(np.int64).reshape(-1) * vocabulary + ids_WT[:, 2:].reshape(-1)
  pair_P, count_P = np.unique(pair_N, return_counts=True)
  return {
    'first_V1': np.searchsorted(pair_P, np.arange(vocabulary + 1) * vocabulary),
    'next_P': (pair_P % vocabulary).astype(np.int32),
    'count_P': count_P.astype(np.int32),
    'single_V': np.bincount(ids_WT[:, 1:].reshape(-1), minlength=vocabulary),
  }


def _predicted(i: int, inputs: Inputs, counts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  block, subject = inputs.block('held_out', i), inputs.subject
  assert block.final_WTD is not None
  before_WT = block.windows.ids_WT[:, :-1]
  first_WT, last_WT = counts['first_V1'][before_WT], counts['first_V1'][before_WT + 1]
  widest = int(np.diff(counts['first_V1']).max())
  at_WTN = first_WT[..., None] + np.arange(widest)
  there_WTN = at_WTN < last_WT[..., None]
  at_WTN = np.where(there_WTN, at_WTN, 0)
  count_WTN = np.where(there_WTN, counts['count_P'][at_WTN], 0)
  # After a token that was never seen the prediction is that of single tokens.
  whole_WT = np.maximum(count_WTN.sum(axis=2) + there_WTN.sum(axis=2), 1)
  share_WTN = (count_WTN / whole_WT[..., None]).astype(np.float32)
  single_V = ((counts['single_V'] + 1) / (counts['single_V'] + 1).sum()).astype(np.float32)

  def run(
    both: Any, ids_WT: jax.Array, final_WTD: jax.Array, next_WTN: jax.Array, share_WTN: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    params, single_V = both

    def compare(token: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
      final_D, id_, next_N, share_N = token
      clean_V = jax.nn.log_softmax(subject.family.unembed(subject.arch, params, final_D[None, None])[0, 0])
      log_V = jnp.log(((1 - share_N.sum()) * single_V).at[next_N].add(share_N))
      return -log_V[id_], jnp.sum(jnp.exp(clean_V) * (clean_V - log_V))

    flat = (final_WTD[:, :-1].reshape(-1, final_WTD.shape[-1]), ids_WT[:, 1:].reshape(-1))
    lists = (a_WTN.reshape(-1, a_WTN.shape[-1]) for a_WTN in (next_WTN, share_WTN))
    ce_B, kl_B = jax.lax.map(compare, (*flat, *lists), batch_size=_TOKENS_AT_ONCE)
    shape = (len(ids_WT), ids_WT.shape[1] - 1)
    return ce_B.reshape(shape), kl_B.reshape(shape)

  arrays = (block.windows.ids_WT, block.final_WTD, counts['next_P'][at_WTN], share_WTN)
  ce_WT, kl_WT = inputs.over_windows('bigram', run, single_V, *arrays)
  return {'ce_WT': ce_WT, 'kl_WT': kl_WT}
