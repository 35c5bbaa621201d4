"""BatchTopK: the kB largest pre-activations of a batch of B tokens, so that hard tokens get more latents (Bussmann et al.
2024).

    z = pre where pre is among the kB largest positive ones of the batch, 0 elsewhere

A token offers its 4k largest. Single tokens have no batch to compete in, so training keeps a running mean of the smallest
value that was kept, and afterwards a latent is active where its pre-activation exceeds it.
"""

import jax
import jax.numpy as jnp

from sae_jax import topk
from sae_jax.axes import Shard, total
from sae_jax.codes import Selection, Sparse
from sae_jax.config import SAEConfig

_OFFERED = 4


def select(pre: topk.Preactivations, size: SAEConfig, shard: Shard) -> Sparse:
  """Codes of this batch."""
  v_BK, idx_BK, offered_BK = pre.best(min(_OFFERED * size.k, size.n_latents), shard)
  v_BK = jnp.where(offered_BK, jax.nn.relu(v_BK), 0)
  tokens = total(len(v_BK), shard.axes.data)
  kept_BK = topk.counted(v_BK.reshape(1, -1), size.k * tokens, shard.axes.both).reshape(v_BK.shape)
  return Sparse(jnp.where(kept_BK, v_BK, 0), idx_BK, uneven=True)


BATCHTOPK = Selection(select, threshold=True)
