"""TopK: the k largest pre-activations of a token, negative ones become 0 (Gao et al. 2024, section 2.3).

z = ReLU(TopK_k(pre))
"""

import jax
import jax.numpy as jnp

from sae_jax.axes import Shard
from sae_jax.codes import Selection, Sparse
from sae_jax.config import SAEConfig
from sae_jax.topk import Preactivations


def codes(pre: Preactivations, k: int, shard: Shard) -> Sparse:
  """Codes of the k largest."""
  v_BK, idx_BK, kept_BK = pre.best(k, shard)
  return Sparse(jax.nn.relu(jnp.where(kept_BK, v_BK, 0)), idx_BK)


def select(pre: Preactivations, size: SAEConfig, shard: Shard) -> Sparse:
  return codes(pre, size.k, shard)


TOPK = Selection(select)
