"""ReLU with an L1 penalty on the codes, whose decoder rows have norm 1 (Bricken et al. 2023; Gao et al. 2024, section 4).

z = ReLU(pre),   penalty = sum_F z
"""

import jax
import jax.numpy as jnp

from sae_jax.codes import Elementwise, Latents
from sae_jax.config import SAEConfig


def codes(product_BF: jax.Array, latents: Latents, size: SAEConfig) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """The codes, and the sum of each token's."""
  del size
  z_BF = jax.nn.relu(product_BF + latents['b_enc_F'][None])
  return (z_BF,), jnp.sum(z_BF, axis=1)


RELU = Elementwise(codes)
