"""The update: optional clipping, Adam, unit-norm decoder rows, EMA of the weights.

In the order of Gao et al.'s intent: gradients come projected against unit-norm rows (gradients.loss_and_grads), then clip,
Adam, renormalise, and average the new weights, so that rows are exactly unit norm after every step and the average
does not lag.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from sae_jax.config import OptimConfig
from sae_jax.sae import Params


def make_optimizer(config: OptimConfig, batch_tokens: int) -> optax.GradientTransformation:
  """Adam with the paper's constants; warm-up is linear and counted in tokens."""
  warmup_steps = config.warmup_tokens // batch_tokens
  rate = optax.constant_schedule(config.learning_rate)
  if warmup_steps:
    # The first step has count 0 and must move.
    rate = optax.linear_schedule(config.learning_rate / (warmup_steps + 1), config.learning_rate, warmup_steps)
  clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
  adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
  return optax.chain(*clip, adam, optax.scale_by_learning_rate(rate))


def unit_norm_decoder(params: Params) -> Params:
  """Parameters with each decoder row scaled to norm 1."""
  w_FD = params['w_dec_FD']
  return params | {'w_dec_FD': w_FD * jax.lax.rsqrt(jnp.sum(w_FD * w_FD, axis=-1, keepdims=True))}


def ema_update(ema: Params, params: Params, config: OptimConfig, steps: jax.Array) -> Params:
  """m <- b m + (1 - b) w, from m = 0; `steps` counts this one.

  b is `ema_decay`, or, with an `ema_width`, such that weights t steps old count for (1 - t / steps)^g: an average over
  that share of the steps so far, however many there are (Karras et al. 2024, "Analyzing and improving the training
  dynamics of diffusion models", section 3.1).
  """
  decay: float | jax.Array = config.ema_decay
  if config.ema_width:
    decay = (1 - 1 / steps) ** (_power(config.ema_width) + 1)
  return jax.tree.map(lambda m, w: (decay * m + (1 - decay) * w).astype(m.dtype), ema, params)


def ema_weights(ema: Params, steps: jax.Array, config: OptimConfig) -> Params:
  """The average. Decoder rows are means of unit vectors, so slightly shorter.

  A constant decay leaves the zeros of the start in m, and m / (1 - decay^steps) corrects that. A power has none in it.
  """
  if config.ema_width:
    return ema
  return jax.tree.map(lambda m: m / (1 - config.ema_decay ** steps.astype(m.dtype)), ema)


@functools.cache
def _power(width: float) -> float:
  """g of the average whose standard deviation in time is this share of the steps: width^2 = (g + 1) / ((g + 2)^2 (g + 3))."""
  low, high = 0.0, 4 / width
  for _ in range(60):
    middle = (low + high) / 2
    wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > width**2
    low, high = (middle, high) if wide else (low, middle)
  return low
