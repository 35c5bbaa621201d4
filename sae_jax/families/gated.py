"""Gated: which latents are active and how much are decided apart, so that a penalty on the first leaves the second alone
(Rajamanoharan et al. 2024, 2404.16014).

    p = x W_enc^T,   z = ReLU(exp(r_mag) p + b_mag) where p + b_enc > 0, else 0
    loss = MSE(x, z W_dec + b_pre) + coefficient * sum_F ReLU(p + b_enc) + MSE(x, ReLU(p + b_enc) W_dec + b_pre)

In the last term decoder and b_pre are constants: it teaches the gate.
"""

import jax
import jax.numpy as jnp

from sae_jax.codes import Elementwise, Head, Latents
from sae_jax.config import SAEConfig


def codes(product_BF: jax.Array, latents: Latents, size: SAEConfig) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """The codes, the gate's own codes, and their sum."""
  del size
  gate_BF = jax.nn.relu(product_BF + latents['b_enc_F'][None])
  magnitude_BF = jax.nn.relu(jnp.exp(latents['r_mag_F'])[None] * product_BF + latents['b_mag_F'][None])
  return (jnp.where(gate_BF > 0, magnitude_BF, 0), gate_BF), jnp.sum(gate_BF, axis=1)


GATED = Elementwise(codes, heads=(Head(), Head(frozen=True)), latents={'r_mag_F': 0.0, 'b_mag_F': 0.0})
