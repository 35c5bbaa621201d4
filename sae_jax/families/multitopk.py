"""Multi-TopK: two reconstructions of the same pre-activations, from the k and from the 4k largest, so that the code stays
good beyond k (Gao et al. 2024, section 4 and appendix A).

    loss = MSE(k) + multi_weight * MSE(4k),   multi_weight = 1/8
"""

import jax
import jax.numpy as jnp

from sae_jax import topk
from sae_jax.axes import Shard
from sae_jax.codes import Head, Selection, Sparse
from sae_jax.config import SAEConfig
from sae_jax.families.family import MORE
from sae_jax.families.topk import select


def parts(pre: topk.Preactivations, size: SAEConfig, shard: Shard, step: jax.Array) -> tuple[Sparse, Sparse]:
  """The k largest, and those from there to the 4k-th."""
  del step
  many = min(MORE * size.k, size.n_latents)
  v_BK, idx_BK, kept_BK = pre.best(many, shard)
  # Of a search whose result is only used in slices XLA makes a full sort on a CPU. Each array has a barrier of its own: one
  # for both takes the search's result whole, and then XLA aborts where the mesh shares out rows alone.
  v_BK, idx_BK = jax.lax.optimization_barrier(v_BK), jax.lax.optimization_barrier(idx_BK)
  z_BK = jax.nn.relu(jnp.where(kept_BK, v_BK, 0))
  m = min(size.k, v_BK.shape[1])
  if shard.axes.latent is None:
    first = Sparse(z_BK[:, :m], idx_BK[:, :m])
    if m == many:  # there are no more latents; codes have a slot at least, and this one is passed over
      return first, Sparse(jnp.zeros_like(z_BK[:, :1]), idx_BK[:, :1], uneven=True)
    return first, Sparse(z_BK[:, m:], idx_BK[:, m:], uneven=True)
  first_Bm = topk.select(v_BK[:, :m], size.k, len(pre.bias_F), shard.axes.latent, shard.exchange)
  rest_BK = z_BK.at[:, :m].set(jnp.where(first_Bm, 0, z_BK[:, :m]))
  return Sparse(jnp.where(first_Bm, z_BK[:, :m], 0), idx_BK[:, :m]), Sparse(rest_BK, idx_BK).packed()


def heads(size: SAEConfig) -> tuple[Head, ...]:
  return Head(), Head(weight=size.multi_weight)


MULTITOPK = Selection(select, parts=parts, heads=heads)
