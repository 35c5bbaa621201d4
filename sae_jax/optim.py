"""The update: optional clipping, Adam, unit-norm decoder rows, EMA of the weights.

In the order of Gao et al.'s intent: gradients come projected against unit-norm rows (sae.loss_and_grads), then clip,
Adam, renormalise, and average the new weights, so that rows are exactly unit norm after every step and the average
does not lag.
"""

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


def ema_update(ema: Params, params: Params, decay: float) -> Params:
  """m <- decay m + (1 - decay) w, from m = 0."""
  return jax.tree.map(lambda m, w: decay * m + (1 - decay) * w, ema, params)


def ema_weights(ema: Params, steps: jax.Array, decay: float) -> Params:
  """Bias-corrected average m / (1 - decay^steps). Decoder rows are means of unit vectors, so slightly shorter."""
  return jax.tree.map(lambda m: m / (1 - decay ** steps.astype(m.dtype)), ema)
