"""BatchTopK: the kB largest pre-activations of a batch of B tokens, so that hard tokens get more latents (Bussmann et al.
2024).

    z = pre where pre is among the kB largest positive ones of the batch, 0 elsewhere

A token offers its 4k largest. Single tokens have no batch to compete in, so training keeps a running mean of the smallest
value that was kept, and afterwards a latent is active where its pre-activation exceeds it.
"""

import jax
import jax.numpy as jnp

from sae_jax import topk
from sae_jax.axes import Shard, largest, total
from sae_jax.codes import Selection, Sparse
from sae_jax.config import SAEConfig
from sae_jax.families.family import MORE

_AT_FIRST = 2  # times k are searched for; more only where some token of the batch gets them all


def select(pre: topk.Preactivations, size: SAEConfig, shard: Shard) -> Sparse:
  """Codes of this batch."""
  tokens = total(len(pre.xc_BD), shard.axes.data)
  room = min(MORE * size.k, len(pre.bias_F))

  def offered(most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is kept when a token offers this many, and whether some token would have offered more."""
    v_BK, idx_BK, offered_BK = pre.best(min(most, size.n_latents), shard)
    v_BK = jnp.where(offered_BK, jax.nn.relu(v_BK), 0)
    kept_BK = topk.counted(v_BK.reshape(1, -1), size.k * tokens, shard.axes.both).reshape(v_BK.shape)
    z_BK = jnp.where(kept_BK, v_BK, 0)
    full = total(jnp.sum(z_BK > 0, axis=1, dtype=jnp.int32), shard.axes.latent) >= most
    wider = ((0, 0), (0, room - v_BK.shape[1]))
    return jnp.pad(z_BK, wider), jnp.pad(idx_BK, wider), largest(jnp.any(full).astype(jnp.int32), shard.axes.data)

  z_BK, idx_BK, crowded = offered(_AT_FIRST * size.k)
  z_BK, idx_BK = jax.lax.cond(crowded > 0, lambda: offered(MORE * size.k)[:2], lambda: (z_BK, idx_BK))
  return Sparse(z_BK, idx_BK, uneven=True)


BATCHTOPK = Selection(select, threshold=True)
