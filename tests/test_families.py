"""Every family against autodiff of its loss as written, on one device and on a mesh, and trained from end to end.

One table: a row holds the family's codes in plain dense mathematics, and what else its loss adds. All contracts below
hold for every row.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sae_jax
from sae_jax import sae, sharding
from sae_jax import train as training
from sae_jax.axes import Shard
from sae_jax.config import LossConfig, MeshConfig, SAEConfig
from sae_jax.families.family import NAMES, family
from tests import cells

B, D, F, K, AUX = 24, 7, 40, 3, 5
SCALE, COEFFICIENT = 1.7, 0.3


def size_of(name: str, **changes) -> SAEConfig:
  k = None if family(name).penalised else K
  size = {'d_model': D, 'n_latents': F, 'k': k, 'activation': name, 'k_aux': AUX}
  # Nothing exceeds the threshold, so that dead latents stay dead and have something to say all the same.
  return SAEConfig(**size | {'fired_threshold': 1e9, 'latent_bias': True} | changes)


def loss_config(name: str) -> LossConfig:
  return LossConfig(1 / 32, dead_tokens=10 * B, sparsity=COEFFICIENT if family(name).penalised else 0.0)


# ----- the losses as their papers write them


def dense_topk(pre_BF: jax.Array, k: int) -> jax.Array:
  _, idx_BK = jax.lax.top_k(pre_BF, k)
  return jax.nn.relu(pre_BF) * jax.nn.one_hot(idx_BK, pre_BF.shape[1]).sum(1)


def topk_loss(params, pre_BF, errors):
  error_BD = errors(dense_topk(pre_BF, K))
  return SCALE * jnp.mean(error_BD**2), error_BD


def relu_loss(params, pre_BF, errors):
  z_BF = jax.nn.relu(pre_BF)
  error_BD = errors(z_BF)
  return SCALE * jnp.mean(error_BD**2) + COEFFICIENT * jnp.mean(z_BF.sum(1)), error_BD


LOSSES = {'topk': topk_loss, 'relu': relu_loss}


def written_loss(name, params, x_BD, dead_F):
  pre_BF = (x_BD - params['b_pre_D'][None]) @ params['w_enc_FD'].T + params['b_enc_F'][None]

  def errors(z_BF, w_dec_FD=params['w_dec_FD'], b_pre_D=params['b_pre_D']):
    return x_BD - (z_BF @ w_dec_FD + b_pre_D[None])

  main, error_BD = LOSSES[name](params, pre_BF, errors)
  target_BD = jax.lax.stop_gradient(error_BD)
  aux_hat_BD = dense_topk(jnp.where(dead_F[None], pre_BF, -jnp.inf), AUX) @ params['w_dec_FD']
  aux = jnp.mean((aux_hat_BD - target_BD) ** 2) / jnp.mean((target_BD - target_BD.mean(0)[None]) ** 2)
  return main + aux / 32


def random_params(name: str) -> sae.Params:
  rng = np.random.default_rng(7)
  made = {key: rng.standard_normal(shape) for key, shape in sae.shapes(size_of(name)).items()}
  for key in made:
    made[key] *= 1.0 if key.startswith('w_') else 0.2
  made['w_dec_FD'] /= np.linalg.norm(made['w_dec_FD'], axis=1, keepdims=True)
  return {key: jnp.asarray(value) for key, value in made.items()}


def hand_written(name, params, idle_F, x_BD, data=1, latent=1, chunks=1):
  """`loss_and_grads` on a mesh; the gradients are those of the whole arrays."""
  mesh = sharding.make_mesh(MeshConfig(data, latent))
  size, scatter = size_of(name), data > 1
  layouts = sharding.layouts(sae.shapes(size))
  out = {key: P(('latent', 'data'), *spec[1:]) if spec and scatter else spec for key, spec in layouts.items()}
  shard = Shard(sharding.axes_of(mesh), chunks=chunks, scatter=scatter)

  def grads(params, idle_F, x_BD):
    return sae.loss_and_grads(
      params, idle_F, x_BD, jnp.asarray(SCALE), sae=size, loss=loss_config(name), batch=B, shard=shard
    )

  specs = (layouts, P('latent'), sharding.BATCH)
  f = jax.shard_map(grads, mesh=mesh, in_specs=specs, out_specs=(out, P('latent'), P()), check_vma=False)
  return jax.device_get(jax.jit(f)(params, idle_F, x_BD))


@pytest.mark.parametrize('mesh', [(1, 1, 1), (2, 4, 3)], ids=['alone', 'on a mesh, in chunks'])
@pytest.mark.parametrize('name', NAMES)
def test_gradients_are_those_of_the_written_loss(name, mesh, x64):
  params = random_params(name)
  x_BD = jnp.asarray(np.random.default_rng(8).standard_normal((B, D)))
  idle_F = jnp.where(jnp.arange(F) < 9, 99, 1).astype(jnp.int32)
  grads, new_idle_F, sums = hand_written(name, params, idle_F, x_BD, *mesh)
  dead_F = new_idle_F > 10
  assert dead_F.sum() == sums.n_dead == 9 and sums.aux_loss > 0
  loss, expected = jax.value_and_grad(functools.partial(written_loss, name))(params, x_BD, dead_F)
  w_FD = params['w_dec_FD']
  along_F1 = jnp.sum(expected['w_dec_FD'] * w_FD, axis=1, keepdims=True)
  expected['w_dec_FD'] -= along_F1 * w_FD
  assert grads.keys() == expected.keys()
  for key, grad in grads.items():
    np.testing.assert_allclose(grad, expected[key], rtol=1e-9, atol=1e-12, err_msg=key)
  found = SCALE * sums.square_error / (B * D) + sums.aux_loss / 32 + loss_config(name).sparsity * sums.penalty / B
  np.testing.assert_allclose(found, loss, rtol=1e-12)


# ----- from end to end


def cell(name: str, **overrides):
  own = {'sae.k': None, 'loss.sparsity': 0.02} if family(name).penalised else {}
  return cells.cell(**{'sae.activation': name} | own | overrides)


@pytest.mark.parametrize('name', [name for name in NAMES if name != 'topk'])  # which all other tests train
def test_a_cell_trains_resumes_and_is_loaded(name, tmp_path):
  whole, halves = tmp_path / 'whole', tmp_path / 'halves'
  assert training.train(cell(name), str(whole)) == 'done'
  seen = iter([False] * 11 + [True])
  assert training.train(cell(name), str(halves), should_stop=lambda: next(seen)) == 'preempted'
  assert training.train(cell(name), str(halves)) == 'done'
  results = [json.loads((folder / 'result.json').read_text()) for folder in (whole, halves)]
  for key in ('params_digest', 'nmse', 'l0', 'flops_useful'):
    assert results[0][key] == results[1][key], key
  result = results[0]
  assert result['activation'] == name and result['nmse'] < 1 and 0 < result['l0'] <= 88
  autoencoder = sae_jax.load(whole)
  x_BD = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
  z_BK, idx_BK = autoencoder.encode(x_BD)
  assert (np.diff(np.asarray(z_BK), axis=1) <= 0).all() and (np.asarray(z_BK) > 0).any(axis=0).all()
  for straight, jitted in zip((z_BK, idx_BK), jax.jit(autoencoder.encode)(x_BD), strict=True):
    np.testing.assert_allclose(straight, np.asarray(jitted)[:, : z_BK.shape[1]], rtol=1e-6)
  assert autoencoder.reconstruct(x_BD).shape == x_BD.shape


def test_flops_of_a_penalised_cell_count_the_latents_that_were_active(tmp_path):
  assert training.train(cell('relu'), str(tmp_path)) == 'done'
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  result = json.loads((tmp_path / 'result.json').read_text())
  n, d, batch = 88, 24, 40
  encoder = 20 * (2 * n * d * batch + 2 * n * d)
  per_active = (result['flops_useful'] - encoder) / (20 * 8 * d * batch)  # without AuxK, which the threshold leaves out
  l0s = [line['train/l0'] for line in lines]
  assert min(l0s) < per_active < max(l0s) and result['k'] is None
