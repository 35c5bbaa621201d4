"""The update against a numpy reference written from the paper's description."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sae_jax import optim
from sae_jax.config import OptimConfig

F, D, STEPS = 5, 3, 4
BASE = dict(learning_rate=0.01, beta1=0.9, beta2=0.999, eps=6.25e-10, clip_norm=0.0, warmup_tokens=0, ema_decay=0.9)


def random_tree(rng):
  return {
    'w_enc_FD': rng.standard_normal((F, D)),
    'w_dec_FD': rng.standard_normal((F, D)),
    'b_enc_F': rng.standard_normal(F),
    'b_pre_D': rng.standard_normal(D),
  }


def reference(params, gradients, c: OptimConfig, batch: int):
  """Clip, Adam, unit norm, EMA; returns final parameters and the bias-corrected average."""
  zeros = {k: np.zeros_like(v) for k, v in params.items()}
  m, v, ema = dict(zeros), dict(zeros), dict(zeros)
  for t, grads in enumerate(gradients, 1):
    norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
    if c.clip_norm and norm > c.clip_norm:
      grads = {k: g * c.clip_norm / norm for k, g in grads.items()}
    warmup = c.warmup_tokens // batch
    rate = c.learning_rate * min(1, t / (warmup + 1))
    for k, g in grads.items():
      m[k] = c.beta1 * m[k] + (1 - c.beta1) * g
      v[k] = c.beta2 * v[k] + (1 - c.beta2) * g**2
      step = m[k] / (1 - c.beta1**t) / (np.sqrt(v[k] / (1 - c.beta2**t)) + c.eps)
      params = params | {k: params[k] - rate * step}
    w = params['w_dec_FD']
    params = params | {'w_dec_FD': w / np.linalg.norm(w, axis=1, keepdims=True)}
    ema = {k: c.ema_decay * ema[k] + (1 - c.ema_decay) * params[k] for k in params}
  return params, {k: a / (1 - c.ema_decay ** len(gradients)) for k, a in ema.items()}


@pytest.mark.parametrize('changes', [{}, {'clip_norm': 0.5}, {'warmup_tokens': 3 * 7}, {'ema_decay': 0.0}])
def test_update_equals_reference(x64, changes):
  c, batch = OptimConfig(**(BASE | changes)), 7
  rng = np.random.default_rng(0)
  params = random_tree(rng)
  params['w_dec_FD'] /= np.linalg.norm(params['w_dec_FD'], axis=1, keepdims=True)
  gradients = [random_tree(rng) for _ in range(STEPS)]
  expected, expected_ema = reference(params, gradients, c, batch)

  tx = optim.make_optimizer(c, batch)
  got = jax.tree.map(jnp.asarray, params)
  state, ema = tx.init(got), jax.tree.map(jnp.zeros_like, got)
  for grads in gradients:
    updates, state = tx.update(jax.tree.map(jnp.asarray, grads), state, got)
    got = optim.unit_norm_decoder(optax.apply_updates(got, updates))
    ema = optim.ema_update(ema, got, c, jnp.asarray(1))
  ema = optim.ema_weights(ema, jnp.asarray(STEPS), c)
  tolerance = 1e-7 if c.warmup_tokens else 1e-9  # optax evaluates a schedule in float32
  for name in expected:
    np.testing.assert_allclose(got[name], expected[name], rtol=tolerance, err_msg=name)
    np.testing.assert_allclose(ema[name], expected_ema[name], rtol=tolerance, err_msg=name)
