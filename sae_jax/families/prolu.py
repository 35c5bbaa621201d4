"""ProLU: the bias decides whether a latent is active and not by how much, so that an L1 penalty shrinks less (Taggart 2024).

    m = x W_enc^T,   z = m where m > 0 and m + b_enc > 0, else 0,   penalty = sum_F z

z jumps, so the bias gets a gradient by decree. With g the gradient of an active code: in the ReLU variant m and b get g; in
the straight-through (STE) variant b gets g m, and m gets g + g m.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sae_jax.codes import Elementwise, Latents
from sae_jax.config import SAEConfig

_Saved = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def prolu(straight_through: bool, m_BF: jax.Array, b_BF: jax.Array) -> jax.Array:
  """z, with the bias [B, F] or broadcast to it."""
  del straight_through
  return jnp.where((m_BF > 0) & (m_BF + b_BF > 0), m_BF, 0)


def _forward(straight_through: bool, m_BF: jax.Array, b_BF: jax.Array) -> tuple[jax.Array, _Saved]:
  return prolu(straight_through, m_BF, b_BF), (m_BF, b_BF)


def _backward(straight_through: bool, saved: _Saved, g_BF: jax.Array) -> _Saved:
  m_BF, b_BF = saved
  g_BF = jnp.where((m_BF > 0) & (m_BF + b_BF > 0), g_BF, 0)
  return (g_BF + g_BF * m_BF, g_BF * m_BF) if straight_through else (g_BF, g_BF)


prolu.defvjp(_forward, _backward)


def _codes(straight_through: bool) -> Callable:
  def codes(product_BF: jax.Array, latents: Latents, size: SAEConfig) -> tuple[tuple[jax.Array, ...], jax.Array]:
    del size
    z_BF = prolu(straight_through, product_BF, jnp.broadcast_to(latents['b_enc_F'][None], product_BF.shape))
    return (z_BF,), jnp.sum(z_BF, axis=1)

  return codes


RELU = Elementwise(_codes(straight_through=False))
STE = Elementwise(_codes(straight_through=True))
