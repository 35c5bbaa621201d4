"""The hand-written step against autodiff of the dense mathematics, and AuxK against its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import gradients, sae, sparse
from sae_jax.axes import Shard
from sae_jax.config import LossConfig, SAEConfig

B, D, F, K, AUX = 13, 7, 53, 3, 5
SAE = SAEConfig(d_model=D, n_latents=F, k=K, activation='topk', k_aux=AUX, fired_threshold=1e-3, latent_bias=True)
LOSS = LossConfig(aux_coefficient=1 / 32, dead_tokens=10 * B)
SCALE = 1.7


def random_params(seed: int, dtype) -> sae.Params:
  rng = np.random.default_rng(seed)
  w_dec_FD = rng.standard_normal((F, D))
  return {
    'w_enc_FD': jnp.asarray(rng.standard_normal((F, D)), dtype),
    'w_dec_FD': jnp.asarray(w_dec_FD / np.linalg.norm(w_dec_FD, axis=1, keepdims=True), dtype),
    'b_enc_F': jnp.asarray(0.1 * rng.standard_normal(F), dtype),
    'b_pre_D': jnp.asarray(0.1 * rng.standard_normal(D), dtype),
  }


def dense_topk(pre_BF, k):
  """Dense codes: the k largest of each row, ReLU, zeros elsewhere."""
  _, idx_BK = jax.lax.top_k(pre_BF, k)
  mask_BF = jax.nn.one_hot(idx_BK, pre_BF.shape[1]).sum(1)
  return jax.nn.relu(pre_BF) * mask_BF


def dense_loss(params, x_BD, dead_F):
  """The training loss as the paper writes it, for autodiff."""
  pre_BF = (x_BD - params['b_pre_D'][None]) @ params['w_enc_FD'].T + params['b_enc_F'][None]
  error_BD = x_BD - (dense_topk(pre_BF, K) @ params['w_dec_FD'] + params['b_pre_D'][None])
  main = SCALE * jnp.mean(error_BD**2)
  if not dead_F.any():
    return main
  target_BD = jax.lax.stop_gradient(error_BD)
  aux_hat_BD = dense_topk(jnp.where(dead_F[None], pre_BF, -jnp.inf), AUX) @ params['w_dec_FD']
  aux = jnp.mean((aux_hat_BD - target_BD) ** 2) / jnp.mean((target_BD - target_BD.mean(0)[None]) ** 2)
  return main + LOSS.aux_coefficient * aux


def projected(grads, params):
  """Gradients without the decoder's component along each of its unit-norm rows."""
  w_FD = params['w_dec_FD']
  along_F1 = jnp.sum(grads['w_dec_FD'] * w_FD, axis=1, keepdims=True)
  return grads | {'w_dec_FD': grads['w_dec_FD'] - along_F1 * w_FD}


@functools.partial(jax.jit, static_argnames='config')
def run(params, idle_F, x_BD, config=SAE):
  return gradients.loss_and_grads(
    params,
    idle_F,
    x_BD,
    jnp.asarray(SCALE, x_BD.dtype),
    sae=config,
    loss=LOSS,
    batch=len(x_BD),
    shard=Shard(),
  )


# None; all of them take part; gathered and selected; selected among all latents.
@pytest.mark.parametrize(
  'n_dead,least,most',
  [(0, 0, 0), (2, 1, AUX), (20, AUX + 1, 4 * AUX), (45, 4 * AUX + 1, F), (F, 4 * AUX + 1, F)],
)
def test_gradients_equal_dense_autodiff(x64, n_dead, least, most):
  params = random_params(n_dead, jnp.float64)
  x_BD = jnp.asarray(np.random.default_rng(1).standard_normal((B, D)))
  idle_F = jnp.where(jnp.arange(F) < n_dead, 99, 1).astype(jnp.int32)
  grads, new_idle_F, sums = run(params, idle_F, x_BD)
  dead_F = np.asarray(new_idle_F) > 10  # latents that fire in this very batch are alive again
  assert least <= dead_F.sum() <= most
  expected = projected(jax.grad(dense_loss)(params, x_BD, dead_F), params)
  for name, grad in grads.items():
    np.testing.assert_allclose(grad, expected[name], rtol=1e-9, atol=1e-12, err_msg=name)
  loss = SCALE * sums.square_error / (B * D) + LOSS.aux_coefficient * sums.aux_loss
  np.testing.assert_allclose(loss, dense_loss(params, x_BD, dead_F), rtol=1e-12)


def auxk_only(n_dead, seed=3):
  """Gradients with AuxK minus gradients without it, and the dead mask that was used."""
  params = random_params(seed, jnp.float64)
  x_BD = jnp.asarray(np.random.default_rng(seed).standard_normal((B, D)))
  # Latents whose bias keeps them from firing: dead for certain, and still positive for some tokens when shifted.
  params['b_enc_F'] = params['b_enc_F'].at[:n_dead].add(-1.5)
  idle_F = jnp.where(jnp.arange(F) < n_dead, 99, 1).astype(jnp.int32)
  grads, idle_F, sums = run(params, idle_F, x_BD)
  plain, _, _ = run(params, idle_F, x_BD, dataclasses.replace(SAE, k_aux=0))
  return jax.tree.map(jnp.subtract, grads, plain), np.asarray(idle_F) > 10, sums


def test_auxk_reaches_dead_latents_only(x64):
  aux, dead_F, sums = auxk_only(n_dead=9)
  assert 0 < dead_F.sum() < F and int(sums.n_dead) == dead_F.sum() and float(sums.aux_loss) > 0
  for name in ('w_enc_FD', 'w_dec_FD'):
    rows_F = np.abs(np.asarray(aux[name])).sum(1)
    assert rows_F[dead_F].max() > 0, name
    np.testing.assert_allclose(rows_F[~dead_F], 0, atol=1e-15, err_msg=name)


def test_auxk_is_zero_without_dead_latents(x64):
  aux, dead_F, sums = auxk_only(n_dead=0)
  assert not dead_F.any() and float(sums.aux_loss) == 0
  assert all(np.all(np.asarray(a) == 0) for a in aux.values())


def test_auxk_survives_a_residual_without_variance(x64):
  """One repeated token: the residual equals its batch mean, and the normalised loss is 0/0 or x/0."""
  params = random_params(5, jnp.float64)
  x_BD = jnp.broadcast_to(params['b_pre_D'], (B, D))
  grads, _, sums = run(params, jnp.full(F, 99, jnp.int32), x_BD)
  assert np.isfinite(float(sums.aux_loss)) and all(np.isfinite(g).all() for g in grads.values())


def test_idle_counts_steps_and_cannot_overflow():
  params = random_params(6, jnp.float32)
  x_BD = jnp.asarray(np.random.default_rng(6).standard_normal((B, D)), jnp.float32)
  _, idle_F, _ = run(params, jnp.full(F, 2**31 - 2, jnp.int32), x_BD)
  _, codes = sae.reconstruct(params, x_BD, SAE, Shard())
  fired_F = np.isin(np.arange(F), np.asarray(codes.idx_BK)[np.asarray(codes.z_BK) > SAE.fired_threshold])
  assert (np.asarray(idle_F)[fired_F] == 1).all() and (np.asarray(idle_F)[~fired_F] > 2**29).all()


def test_codes_are_never_negative_and_padding_gets_no_gradient(x64):
  """With k = n some selected pre-activations are negative; ReLU zeroes them and their gradient."""
  params = random_params(7, jnp.float64)
  x_BD = jnp.asarray(np.random.default_rng(7).standard_normal((B, D)))
  full = dataclasses.replace(SAE, k=F, k_aux=0)
  _, codes = sae.reconstruct(params, x_BD, full, Shard())
  assert (np.asarray(codes.z_BK) >= 0).all() and (np.asarray(codes.z_BK) == 0).any()
  grads, _, _ = run(params, jnp.ones(F, jnp.int32), x_BD, full)

  def loss(p):
    pre_BF = (x_BD - p['b_pre_D'][None]) @ p['w_enc_FD'].T + p['b_enc_F'][None]
    return SCALE * jnp.mean((x_BD - jax.nn.relu(pre_BF) @ p['w_dec_FD'] - p['b_pre_D'][None]) ** 2)

  for name, expected in projected(jax.grad(loss)(params), params).items():
    np.testing.assert_allclose(grads[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_sparse_products_equal_dense_ones_with_repeated_indices(x64):
  rng = np.random.default_rng(8)
  idx_BK = rng.integers(0, F, (B, K))
  idx_BK[:, 1] = idx_BK[:, 0]
  z_BK, dz_BK = rng.standard_normal((2, B, K))
  x_BD, g_BD = rng.standard_normal((2, B, D))
  w_FD, enc_FD, dec_FD = rng.standard_normal((3, F, D))
  hot_BKF = np.eye(F)[idx_BK]
  np.testing.assert_allclose(
    sparse.decode(*(jnp.asarray(a) for a in (z_BK, idx_BK, w_FD))),
    np.einsum('bk,bkf,fd->bd', z_BK, hot_BKF, w_FD),
  )
  np.testing.assert_allclose(
    sparse.code_gradient(jnp.asarray(idx_BK), jnp.asarray(w_FD), jnp.asarray(g_BD)),
    np.einsum('bkf,fd,bd->bk', hot_BKF, w_FD, g_BD),
  )
  got = sparse.add_weight_gradients(*(jnp.asarray(a) for a in (enc_FD, dec_FD, idx_BK, dz_BK, x_BD, z_BK, g_BD)))
  np.testing.assert_allclose(got[0], enc_FD + np.einsum('bkf,bk,bd->fd', hot_BKF, dz_BK, x_BD))
  np.testing.assert_allclose(got[1], dec_FD + np.einsum('bkf,bk,bd->fd', hot_BKF, z_BK, g_BD))


def test_encoder_scale_makes_reconstructions_as_long_as_inputs():
  params = sae.init_params(jax.random.key(0), jnp.zeros(D), SAE)
  np.testing.assert_allclose(np.linalg.norm(params['w_dec_FD'], axis=1), 1, rtol=1e-6)
  np.testing.assert_array_equal(params['w_enc_FD'], params['w_dec_FD'])
  probe_BD = jax.random.normal(jax.random.key(1), (256, D))
  probe_BD = probe_BD / jnp.linalg.norm(probe_BD, axis=1, keepdims=True)
  params['w_enc_FD'] = params['w_enc_FD'] * sae.encoder_scale(params, probe_BD, SAE, sae.Axes())
  x_hat_BD, _ = sae.reconstruct(params, probe_BD, SAE, Shard())
  np.testing.assert_allclose(np.mean(np.linalg.norm(x_hat_BD, axis=1)), 1, rtol=1e-5)
