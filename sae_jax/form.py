"""An autoencoder without its numbers: how activations become codes, and codes become activations again.

It is hashable and knows no array, so a program that is compiled for one autoencoder serves all of the same form. The
numbers are arguments: what jit closes over it copies into the program.
"""

import dataclasses
from typing import Any

import jax

from sae_jax import sae
from sae_jax.axes import Shard
from sae_jax.codes import Dense, Sparse
from sae_jax.config import SAEConfig
from sae_jax.data.normalize import normalize
from sae_jax.sae import Params


@dataclasses.dataclass(frozen=True)
class Form:
  """How an autoencoder reads and writes activations, on one device.

  Attributes:
    size: family and sizes.
    normalize: which normalisation it was trained under.
    scale: the number of 'scale'; None for the others.
  """

  size: SAEConfig
  normalize: str
  scale: float | None

  def unit(self, x_BD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Raw activations as the autoencoder wants them, and the mean and norm [B, 1] of each token that undo it."""
    return normalize(x_BD, self.normalize, self.scale)

  def codes(self, params: Params, unit_BD: jax.Array) -> Sparse | Dense:
    """The codes of normalised activations, as the family chooses them."""
    return sae.encode(params, unit_BD, self.size, Shard())[1]

  def pre(self, params: Params, unit_BD: jax.Array) -> jax.Array:
    """Pre-activations [B, F] of normalised activations, with the latent bias."""
    xc_BD = sae.centred(params, unit_BD, self.size)
    return sae.product(params, xc_BD, Shard()) + params['b_enc_F'][None]

  def dense(self, params: Params, unit_BD: jax.Array) -> jax.Array:
    """Codes [B, F] before any choice among them; see `sae.dense`."""
    return sae.dense(params, unit_BD, self.size)

  def rebuilt(self, params: Params, codes: Sparse | Dense) -> jax.Array:
    """Reconstructions [B, D] in the normalised space."""
    return sae.decoded(params, codes, self.size, Shard())

  def reconstruct(self, params: Params, x: jax.Array) -> jax.Array:
    """Reconstructions [..., D] of raw activations in their own space: a token's norm and mean are put back."""
    unit_BD, mean_B1, norm_B1 = self.unit(x.reshape(-1, x.shape[-1]))
    return (self.rebuilt(params, self.codes(params, unit_BD)) * norm_B1 + mean_B1).reshape(x.shape)


def of(size: SAEConfig, info: dict[str, Any]) -> Form:
  """The form of the autoencoder that a sae.json describes."""
  return Form(size, info.get('normalize', 'center_unit'), info.get('scale'))
