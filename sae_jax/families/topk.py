"""TopK: the k largest pre-activations of a token, negative ones become 0 (Gao et al. 2024, section 2.3)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sae_jax import topk
from sae_jax.axes import Shard
from sae_jax.codes import Selection, Sparse


def codes(
  product_BF: jax.Array | None,
  product: Callable[[jax.Array], jax.Array],
  xc_BD: jax.Array,
  bias_F: jax.Array,
  k: int,
  shard: Shard,
  recall_target: float | None = None,
) -> Sparse:
  """Codes of the pre-activations product + bias.

  Args:
    product_BF: xc W_enc^T; None where it was not kept.
    product: makes it of some rows. It is then called chunk by chunk. That loop is local: shards agree on the winners of
      all rows at once.
    xc_BD: x - b_pre.
    bias_F: the latent bias.
    k: latents a token.
    shard: where this runs.
    recall_target: each shard's candidates are then those of `topk.approximate`.
  """
  width = bias_F.shape[0]
  m = min(k, width)

  def candidates(product_BF: jax.Array) -> tuple[jax.Array, jax.Array]:
    if recall_target is None:
      return topk.top_k(product_BF, bias_F, m)
    return topk.approximate(product_BF, bias_F, m, recall_target)

  if product_BF is not None:
    v_BK, idx_BK = candidates(product_BF)
  else:
    xc_CRD = xc_BD.reshape(shard.chunks, -1, xc_BD.shape[1])
    chosen = jax.lax.map(lambda xc_RD: candidates(product(xc_RD)), xc_CRD)
    v_BK, idx_BK = (a_CRK.reshape(-1, m) for a_CRK in chosen)
  kept_BK = topk.select(v_BK, k, width, shard.axes.latent, shard.exchange)
  return Sparse(jax.nn.relu(jnp.where(kept_BK, v_BK, 0)), idx_BK)


TOPK = Selection(codes)
