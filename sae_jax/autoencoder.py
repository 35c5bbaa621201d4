"""One autoencoder as a flax module that encodes and decodes; apart from the mathematics, since training needs no flax."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sae_jax import arrays, inference, sae, sparse
from sae_jax.config import SAEConfig
from sae_jax.sae import Params


class SAE(nnx.Module):
  """Parameters of one autoencoder. The decoder is stored with latents as rows, so that gathers are contiguous."""

  w_dec_FD: nnx.Param
  b_enc_F: nnx.Param
  b_pre_D: nnx.Param

  def __init__(self, params: Params, size: SAEConfig):
    self.size = size
    for name, value in params.items():
      setattr(self, name, nnx.Param(value))

  def params(self) -> Params:
    return nnx.to_pure_dict(nnx.state(self, nnx.Param))

  def encode(self, x: Any, activation: inference.Activation | None = None) -> tuple[jax.Array, jax.Array]:
    """Values [..., K] (not negative, descending) and latent indices [..., K] for normalised inputs [..., D].

    Without a k there are as many slots as the fullest token needs, and inside jit one a latent. `activation` takes the
    place of the family's own. Raises `UserError` as `arrays.activations` and `inference.check` say; inside jit shapes
    and types of `x` alone are looked at.
    """
    d_model, k = self.size.d_model, self.size.k
    x = jnp.asarray(arrays.activations(x, d_model))
    inference.check(activation, self.size.n_latents)
    if not x.size:
      k = k if activation is None else getattr(activation, 'k', None)
      shape = (*x.shape[:-1], k or 0)
      return jnp.zeros(shape, x.dtype), jnp.zeros(shape, jnp.int32)
    codes = sae.encode_as(self.params(), x.reshape(-1, d_model), self.size, activation)
    z_BK, idx_BK, _ = codes.listed()
    shape = (*x.shape[:-1], z_BK.shape[-1])
    return z_BK.reshape(shape), idx_BK.reshape(shape)

  def decode(self, z: Any, idx: Any) -> jax.Array:
    """Reconstruction [..., D] in the normalised space, from values and latent indices [..., K].

    Raises `UserError` as `arrays.codes` says; inside jit it looks at shapes and types alone, and a row with an index
    out of range is NaN.
    """
    n_latents, d_model = self.size.n_latents, self.size.d_model
    z, idx = (jnp.asarray(a) for a in arrays.codes(z, idx, n_latents))
    shape = (*z.shape[:-1], d_model)
    if not z.size:  # no row, or rows of no latent
      return jnp.broadcast_to(sae.output(self.b_pre_D[...], self.size), shape)
    flat_BK = (-1, z.shape[-1])
    x_BD = sparse.decode(z.reshape(flat_BK), idx.reshape(flat_BK), self.w_dec_FD[...]) + self.b_pre_D[...][None]
    return sae.output(x_BD, self.size).reshape(shape)
