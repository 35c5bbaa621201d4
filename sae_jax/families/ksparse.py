"""k-sparse autoencoder: TopK with one matrix for encoder and decoder (Makhzani and Frey 2013).

    z = TopK_k(x W^T + b) of the positive,   x_hat = z W + b_pre

Rows of W keep their length. The first `anneal_steps` steps keep more latents, from 4k down to k, so that none dies for
want of being chosen.
"""

import jax
import jax.numpy as jnp

from sae_jax import topk
from sae_jax.axes import Shard
from sae_jax.codes import Selection, Sparse
from sae_jax.config import SAEConfig
from sae_jax.families.topk import select

_AT_FIRST = 4


def parts(pre: topk.Preactivations, size: SAEConfig, shard: Shard, step: jax.Array) -> tuple[Sparse]:
  """The codes of this step."""
  most = min(_AT_FIRST * size.k, size.n_latents)
  left = jnp.maximum(0, 1 - step / size.anneal_steps)
  k = size.k + jnp.ceil((most - size.k) * left).astype(jnp.int32)
  v_BK, idx_BK, offered_BK = pre.best(most, shard)
  v_BK = jnp.where(offered_BK, jax.nn.relu(v_BK), 0)
  return (Sparse(jnp.where(topk.counted(v_BK, k, shard.axes.latent), v_BK, 0), idx_BK, uneven=True),)


KSPARSE = Selection(select, parts=parts, unit_norm=False, tied=True)
