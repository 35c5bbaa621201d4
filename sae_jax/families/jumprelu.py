"""JumpReLU: a latent is active where its pre-activation exceeds a threshold of its own, which is learned.

    z = pre where pre > theta, else 0,   theta = exp(log_theta)
    step: penalty = number of active latents (Rajamanoharan et al. 2024, 2407.14435)
    tanh: penalty = sum_F tanh(c z), c = 4 sqrt(D) (after Anthropic's circuits update of January 2025)

z and the count jump at theta, so theta gets a gradient by decree, from pre-activations closer to it than half the
`bandwidth`: -theta / bandwidth through z, and -1 / bandwidth through the count.
"""

import functools
import math

import jax
import jax.numpy as jnp

from sae_jax.codes import Elementwise, Latents
from sae_jax.config import SAEConfig

_AT_FIRST = 3  # times the target that are active at the start


def _near(pre_BF: jax.Array, theta_BF: jax.Array, bandwidth: float) -> jax.Array:
  return (jnp.abs(pre_BF - theta_BF) < bandwidth / 2) / bandwidth


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def jump(bandwidth: float, pre_BF: jax.Array, theta_BF: jax.Array) -> jax.Array:
  """z."""
  del bandwidth
  return jnp.where(pre_BF > theta_BF, pre_BF, 0)


def _jump_forward(bandwidth: float, pre_BF: jax.Array, theta_BF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return jump(bandwidth, pre_BF, theta_BF), (pre_BF, theta_BF)


def _jump_backward(bandwidth: float, saved: tuple[jax.Array, ...], g_BF: jax.Array) -> tuple[jax.Array, jax.Array]:
  pre_BF, theta_BF = saved
  return jnp.where(pre_BF > theta_BF, g_BF, 0), -theta_BF * _near(pre_BF, theta_BF, bandwidth) * g_BF


jump.defvjp(_jump_forward, _jump_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def step(bandwidth: float, pre_BF: jax.Array, theta_BF: jax.Array) -> jax.Array:
  """1 where a latent is active."""
  del bandwidth
  return (pre_BF > theta_BF).astype(pre_BF.dtype)


def _step_forward(bandwidth: float, pre_BF: jax.Array, theta_BF: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  return step(bandwidth, pre_BF, theta_BF), (pre_BF, theta_BF)


def _step_backward(bandwidth: float, saved: tuple[jax.Array, ...], g_BF: jax.Array) -> tuple[jax.Array, jax.Array]:
  pre_BF, theta_BF = saved
  return jnp.zeros_like(pre_BF), -_near(pre_BF, theta_BF, bandwidth) * g_BF


step.defvjp(_step_forward, _step_backward)


def _pre_and_theta(product_BF: jax.Array, latents: Latents) -> tuple[jax.Array, jax.Array]:
  theta_BF = jnp.broadcast_to(jnp.exp(latents['log_theta_F'])[None], product_BF.shape)
  return product_BF + latents['b_enc_F'][None], theta_BF


def step_codes(product_BF: jax.Array, latents: Latents, size: SAEConfig) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """The codes, and how many are active."""
  pre_BF, theta_BF = _pre_and_theta(product_BF, latents)
  counted_B = jnp.sum(step(size.bandwidth, pre_BF, theta_BF), axis=1)
  return (jump(size.bandwidth, pre_BF, theta_BF),), counted_B


def tanh_codes(product_BF: jax.Array, latents: Latents, size: SAEConfig) -> tuple[tuple[jax.Array, ...], jax.Array]:
  """The codes, and a smooth count of them."""
  z_BF = jump(size.bandwidth, *_pre_and_theta(product_BF, latents))
  return (z_BF,), jnp.sum(jnp.tanh(4 * math.sqrt(size.d_model) * z_BF), axis=1)


def start(product_BF: jax.Array, size: SAEConfig) -> Latents:
  """The threshold, the same for all, that leaves three times the target active in a sample of all latents' products."""
  # Where a fixed coefficient decides there is no target, and about an eighth of the latents is active.
  # Rounded down, that of few latents would be 0, and nothing would be active.
  target = size.k or size.n_latents // _AT_FIRST // 8 or size.n_latents / _AT_FIRST / 8
  share = min(0.5, _AT_FIRST * target / size.n_latents)
  theta = jnp.maximum(jnp.quantile(product_BF, 1 - share), 1e-6)
  return {'log_theta_F': jnp.full(size.n_latents, jnp.log(theta))}


# At first so low that lengths of reconstructions can be compared as without it.
_OPEN = {'log_theta_F': -30.0}
STEP = Elementwise(step_codes, latents=_OPEN, start=start)
TANH = Elementwise(tanh_codes, latents=_OPEN, start=start)
