"""Matryoshka: TopK whose first latents must also do alone, so that they learn what is general (Bussmann et al. 2025).

    loss = sum over levels l of MSE(x_hat from the codes of the first n / 2^(levels - 1 - l) latents)

The latents of a prefix are those whose index is a multiple of 2^(levels - 1 - l). So every shard of any mesh holds the
same share of each prefix, and a latent's place does not depend on the mesh.
"""

import jax
import jax.numpy as jnp

from sae_jax.axes import Shard
from sae_jax.codes import Head, Selection, Sparse
from sae_jax.config import SAEConfig
from sae_jax.families.topk import select
from sae_jax.topk import Preactivations


def parts(pre: Preactivations, size: SAEConfig, shard: Shard, step: jax.Array) -> tuple[Sparse, ...]:
  """What each level adds to the codes of the level before."""
  del step
  codes = select(pre, size, shard)
  axis = shard.axes.latent
  first = 0 if axis is None else jax.lax.axis_index(axis) * len(pre.bias_F)
  index_BK = codes.idx_BK + first
  found, seen_BK = [], jnp.zeros(index_BK.shape, bool)
  for level in range(size.levels):
    within_BK = index_BK % 2 ** (size.levels - 1 - level) == 0
    found.append(Sparse(jnp.where(within_BK & ~seen_BK, codes.z_BK, 0), codes.idx_BK).packed())
    seen_BK = within_BK
  return tuple(found)


def heads(size: SAEConfig) -> tuple[Head, ...]:
  return (Head(),) * size.levels


MATRYOSHKA = Selection(select, parts=parts, heads=heads, main=-1)
