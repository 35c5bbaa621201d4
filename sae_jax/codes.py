"""The codes of a batch on one shard, and what the decoder and every gradient make of them.

The skeleton in `sae_jax.sae` asks for nothing else, so it does not know how codes are stored.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sae_jax import sparse
from sae_jax.axes import Axes
from sae_jax.kernels.loops import Slots


class Sparse(NamedTuple):
  """K latents a token. Slots that another shard won hold value 0 and gradient 0."""

  z_BK: jax.Array
  idx_BK: jax.Array  # local indices

  def slots(self, axes: Axes) -> Slots:
    """Slots that any row uses. A shard holds k candidates and wins k / shards of them: the rest are not worth a pass."""
    return sparse.used_slots(self.z_BK) if axes.latent else None

  def decode(self, w_dec_FD: jax.Array, slots: Slots) -> jax.Array:
    """This shard's part [B, D] of the reconstruction, without b_pre."""
    return sparse.decode(self.z_BK, self.idx_BK, w_dec_FD, slots)

  def gradient(self, w_dec_FD: jax.Array, g_BD: jax.Array, slots: Slots) -> jax.Array:
    """Gradient [B, K] of the codes for reconstruction gradient g, 0 where a code is 0."""
    return jnp.where(self.z_BK > 0, sparse.code_gradient(self.idx_BK, w_dec_FD, g_BD, slots), 0)

  def add_weight_gradients(
    self,
    dw_enc_FD: jax.Array,
    dw_dec_FD: jax.Array,
    dz_BK: jax.Array,
    xc_BD: jax.Array,
    g_BD: jax.Array,
    slots: Slots,
  ) -> tuple[jax.Array, jax.Array]:
    """The gradients of encoder and decoder, added to these."""
    return sparse.add_weight_gradients(dw_enc_FD, dw_dec_FD, self.idx_BK, dz_BK, xc_BD, self.z_BK, g_BD, slots)

  def add_at(self, total_F: jax.Array, values_BK: jax.Array) -> jax.Array:
    """Adds a value for every code to the entry of its latent."""
    return sparse.add_at(total_F, self.idx_BK, values_BK)

  def fired(self, n_latents: int, threshold: float) -> jax.Array:
    """Which latents of this shard exceed the threshold for some token: int8 [F]."""
    above_BK = (self.z_BK > threshold).astype(jnp.int8)
    return jnp.zeros(n_latents, jnp.int8).at[self.idx_BK].max(above_BK)

  def active(self) -> jax.Array:
    """This shard's codes that are not 0, of each token: int32 [B]."""
    return jnp.sum(self.z_BK > 0, axis=-1, dtype=jnp.int32)
