"""AuxK in chunks of rows: candidates of the one pass over the tokens against a second encoding and dense autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sae_jax import gradients, sae, sharding
from sae_jax.axes import Shard
from sae_jax.config import LossConfig, MeshConfig, SAEConfig
from sae_jax.families import auxk

B, D, F, K, AUX, CHUNKS = 24, 7, 400, 8, 9, 3
SAE = SAEConfig(d_model=D, n_latents=F, k=K, activation='topk', k_aux=AUX, fired_threshold=1e-3, latent_bias=True)
LOSS = LossConfig(aux_coefficient=1 / 32, dead_tokens=10 * B)
SCALE = 1.7
LISTED = {4: 2 * 3 + 64, 1: AUX + 64}  # latents a token and shard, by shards


def random_params(x_BD, raised: int) -> sae.Params:
  """The first `raised` latents exceed all others for every token, and each fires for one."""
  rng = np.random.default_rng(3)
  w_dec_FD, w_enc_FD = rng.standard_normal((2, F, D))
  w_enc_FD[:raised] = (x_BD / np.linalg.norm(x_BD, axis=1, keepdims=True))[np.arange(raised) % B]
  return {
    'w_enc_FD': w_enc_FD,
    'w_dec_FD': w_dec_FD / np.linalg.norm(w_dec_FD, axis=1, keepdims=True),
    'b_enc_F': 0.1 * rng.standard_normal(F) + np.where(np.arange(F) < raised, 30.0, 0.0),
    'b_pre_D': np.zeros(D),
  }


def step_on(mesh):
  """Gradients, new idle counters and sums from parameters, idle counters and tokens on a mesh, in chunks of rows."""
  mesh = sharding.make_mesh(MeshConfig(*mesh))
  layouts = sharding.layouts(sae.shapes(SAE))
  shard = Shard(sharding.axes_of(mesh), chunks=CHUNKS)

  def grads(params, idle_F, x_BD):
    scale = jnp.asarray(SCALE, x_BD.dtype)
    return gradients.loss_and_grads(params, idle_F, x_BD, scale, sae=SAE, loss=LOSS, batch=B, shard=shard)

  specs, out = (layouts, P('latent'), sharding.BATCH), (layouts, P('latent'), P())
  f = jax.shard_map(grads, mesh=mesh, in_specs=specs, out_specs=out, check_vma=False)
  return jax.jit(f)


def dense_topk(pre_BF, k):
  _, idx_BK = jax.lax.top_k(pre_BF, k)
  return jax.nn.relu(pre_BF) * jax.nn.one_hot(idx_BK, F).sum(1)


def listed_ones(pre_BF, shards):
  """The pre-activations that the shards list, -inf elsewhere."""
  m, pre_BSF = LISTED[shards], pre_BF.reshape(B, shards, -1)
  last_BS1 = np.partition(pre_BSF, -m, axis=2)[:, :, -m, None]
  return np.where(pre_BSF >= last_BS1, pre_BSF, -np.inf).reshape(B, F)


def dense_loss(params, x_BD, dead_F):
  """Without the projection of the decoder's gradient."""
  pre_BF = (x_BD - params['b_pre_D'][None]) @ params['w_enc_FD'].T + params['b_enc_F'][None]
  error_BD = x_BD - (dense_topk(pre_BF, K) @ params['w_dec_FD'] + params['b_pre_D'][None])
  target_BD = jax.lax.stop_gradient(error_BD)
  aux_hat_BD = dense_topk(jnp.where(dead_F[None], pre_BF, -jnp.inf), AUX) @ params['w_dec_FD']
  aux = jnp.mean((aux_hat_BD - target_BD) ** 2) / jnp.mean((target_BD - target_BD.mean(0)[None]) ** 2)
  return SCALE * jnp.mean(error_BD**2) + LOSS.aux_coefficient * aux


@pytest.mark.parametrize('mesh', [(1, 1), (2, 4)])
def test_one_pass_finds_what_a_second_encoding_finds(mesh, x64, monkeypatch):
  """Latents cross the threshold in this step, and of others at risk some fire: in the second case so many of those listed
  that the best of the dead are not all among them.
  """
  x_BD = np.random.default_rng(1).standard_normal((B, D))
  idle_F = np.random.default_rng(2).choice(np.int32([3, 9, 10, 99]), F)
  raised_idle_F = np.where(np.arange(F) < 80, np.int32(10), idle_F)
  cases = {False: (random_params(x_BD, 0), idle_F), True: (random_params(x_BD, 80), raised_idle_F)}
  one_pass = step_on(mesh)
  found = {short: jax.device_get(one_pass(*case, x_BD)) for short, case in cases.items()}
  monkeypatch.setattr(auxk, 'lister', lambda *_: None)
  twice = step_on(mesh)
  for short, (params, idle_F) in cases.items():
    grads, new_idle_F, sums = found[short]
    crossing_F, dead_F = idle_F == 10, new_idle_F > 10
    assert (crossing_F & dead_F).any() and (crossing_F & ~dead_F).any() and dead_F.sum() == sums.n_dead > AUX
    pre_BF = (x_BD - params['b_pre_D']) @ params['w_enc_FD'].T + params['b_enc_F']
    listed_BF = listed_ones(np.where(idle_F >= 10, pre_BF, -np.inf), mesh[1])
    best_BF, best_listed_BF = (dense_topk(jnp.where(dead_F[None], a_BF, -jnp.inf), AUX) for a_BF in (pre_BF, listed_BF))
    assert bool((best_BF != best_listed_BF).any()) == short

    jax.tree.map(np.testing.assert_array_equal, found[short], jax.device_get(twice(params, idle_F, x_BD)))
    expected, dense = jax.value_and_grad(dense_loss)(params, x_BD, dead_F)
    loss = SCALE * sums.square_error / (B * D) + LOSS.aux_coefficient * sums.aux_loss
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    for name in ('w_enc_FD', 'b_enc_F', 'b_pre_D'):
      np.testing.assert_allclose(grads[name], dense[name], rtol=1e-9, atol=1e-12, err_msg=name)
