"""Any autoencoder with another activation, at a wanted L0, and with refined values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import sae_jax
from sae_jax import inference, sae, training
from sae_jax.artifact import Autoencoder
from sae_jax.autoencoder import SAE
from sae_jax.config import SAEConfig
from sae_jax.data.planted import Planted
from sae_jax.errors import UserError
from sae_jax.families.family import NAMES, family
from tests import cells

D, F, K, B = 7, 40, 3, 50


@functools.cache
def autoencoder(name: str) -> Autoencoder:
  """With random parameters and an inference threshold, where the family has one."""
  known, rng = family(name), np.random.default_rng(3)
  size = SAEConfig(D, F, None if known.penalised else K, name, k_aux=0, fired_threshold=0.0, latent_bias=True)
  params = {key: rng.standard_normal(shape) / 2 for key, shape in sae.kept_shapes(size).items()}
  params |= {'threshold': 0.7} if 'threshold' in params else {}
  made = SAE({key: jnp.asarray(value, jnp.float32) for key, value in params.items()}, size)
  return Autoencoder(made, {'n_latents': F, 'd_model': D, 'k': size.k, 'normalize': 'none'})


X_BD = np.random.default_rng(4).standard_normal((B, D)).astype(np.float32)


def spread(z_BK: jax.Array, idx_BK: jax.Array) -> np.ndarray:
  """Codes as [B, F]."""
  z_BF = np.zeros((len(z_BK), F), np.float32)
  np.put_along_axis(z_BF, np.asarray(idx_BK), np.asarray(z_BK), axis=1)
  return z_BF


def dense(name: str) -> np.ndarray:
  """Of a selection by hand. All other families have dense codes of their own."""
  made = autoencoder(name)
  if name not in ('topk', 'multitopk', 'batchtopk', 'matryoshka', 'ksparse'):
    return spread(*made.encode(X_BD))
  params = {key: np.asarray(value) for key, value in made.sae.params().items()}
  w_enc_FD = params.get('w_enc_FD', params['w_dec_FD'])
  return np.maximum((X_BD - params['b_pre_D']) @ w_enc_FD.T + params['b_enc_F'], 0)


@pytest.mark.parametrize('name', NAMES)
def test_topk_and_threshold_choose_among_the_dense_codes_of_a_family(name):
  made, z_BF = autoencoder(name), dense(name)
  for k in (5, F):
    z_BK, idx_BK = made.encode(X_BD, activation=sae_jax.TopK(k))
    assert z_BK.shape == idx_BK.shape == (B, k) and (np.diff(z_BK, axis=1) <= 0).all()
    least_B1 = np.sort(z_BF, axis=1)[:, -k, None]
    np.testing.assert_allclose(spread(z_BK, idx_BK), np.where(z_BF >= least_B1, z_BF, 0), rtol=1e-5, atol=1e-6)
  level = float(np.quantile(z_BF, 0.9))
  expected_BF = np.where(z_BF > level, z_BF, 0)
  z_BK, idx_BK = made.encode(X_BD, activation=sae_jax.Threshold(level))
  assert z_BK.shape[1] == (expected_BF > 0).sum(1).max()
  np.testing.assert_allclose(spread(z_BK, idx_BK), expected_BF, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    made.reconstruct(X_BD, activation=sae_jax.Threshold(level)), made.decode(z_BK, idx_BK), rtol=1e-6
  )
  for activation in (sae_jax.TopK(5), sae_jax.Threshold(level)):
    jitted = jax.jit(made.encode, static_argnames='activation')(X_BD, activation=activation)
    straight = made.encode(X_BD, activation=activation)
    np.testing.assert_allclose(spread(*jitted), spread(*straight), rtol=1e-5, atol=1e-6)
    assert jitted[0].shape[1] == (5 if activation == sae_jax.TopK(5) else F)


def test_its_own_k_changes_nothing_and_an_empty_batch_has_the_slots_asked_for():
  made = autoencoder('topk')
  for own, same in zip(made.encode(X_BD), made.encode(X_BD, sae_jax.TopK(K)), strict=True):
    np.testing.assert_array_equal(own, same)
  for activation, slots in ((None, K), (sae_jax.TopK(7), 7), (sae_jax.Threshold(0.5), 0)):
    assert made.encode(X_BD[:0], activation)[0].shape == (0, slots)


@pytest.mark.parametrize('name', NAMES)
def test_the_fitted_threshold_gives_the_l0_that_was_asked_for(name, monkeypatch):
  made, l0 = autoencoder(name), 4.5
  fitted = made.threshold_for(X_BD, l0)
  assert (dense(name) > fitted.value).sum() == l0 * B
  assert (np.asarray(made.encode(X_BD, fitted)[0]) > 0).sum() == l0 * B
  monkeypatch.setattr(inference, '_NUMBERS', 7 * F)  # in parts of seven tokens
  assert made.threshold_for(X_BD.reshape(5, 10, D), l0).value == pytest.approx(fitted.value, rel=1e-5)


def test_a_threshold_is_refused_where_too_few_codes_are_above_zero():
  made = autoencoder('relu')
  most = (dense('relu') > 0).sum() / B
  assert made.threshold_for(X_BD, most) == sae_jax.Threshold(0.0)
  with pytest.raises(UserError, match=f'l0={F} but these tokens have {most:.4g} codes above 0'):
    made.threshold_for(X_BD, F)
  assert autoencoder('cs294a').threshold_for(X_BD, F) == sae_jax.Threshold(0.0)  # whose latents all are
  with pytest.raises(UserError, match='no values to look at'):
    made.threshold_for(X_BD[:0], 3)
  with pytest.raises(UserError, match='outside of jit'):
    jax.jit(lambda x: made.threshold_for(x, 3).value)(X_BD)


# ----- refinement


def square_errors(made: Autoencoder, x_BD: np.ndarray, z_BK: jax.Array, idx_BK: jax.Array) -> np.ndarray:
  return np.sum((x_BD - np.asarray(made.decode(z_BK, idx_BK))) ** 2, axis=1)


def test_refined_values_are_those_of_non_negative_least_squares():
  made = autoencoder('topk')
  z_BK, idx_BK = made.encode(X_BD, sae_jax.TopK(5))
  refined_BK = np.asarray(made.refine(X_BD, z_BK, idx_BK))
  w_dec_FD, b_pre_D = (np.asarray(made.sae.params()[key], np.float64) for key in ('w_dec_FD', 'b_pre_D'))
  for x_D, z_K, idx_K, refined_K in zip(X_BD, np.asarray(z_BK), np.asarray(idx_BK), refined_BK, strict=True):
    active = z_K > 0
    best, _ = scipy.optimize.nnls(w_dec_FD[idx_K[active]].T, x_D - b_pre_D)
    np.testing.assert_allclose(refined_K[active], best, atol=1e-4)
    assert (refined_K[~active] == 0).all()
  assert (refined_BK == 0).sum() > (np.asarray(z_BK) == 0).sum()  # the bound of some was met


@pytest.mark.parametrize('steps', [1, 30])
def test_refinement_never_worsens_a_token_and_never_adds_a_latent(steps):
  for name in ('relu', 'gated', 'jumprelu_step', 'batchtopk'):
    made = autoencoder(name)
    z_BK, idx_BK = made.encode(X_BD, sae_jax.TopK(5))  # of one shape, which is compiled once
    refined_BK = made.refine(X_BD, z_BK, idx_BK, steps=steps)
    before_B, after_B = (square_errors(made, X_BD, values_BK, idx_BK) for values_BK in (z_BK, refined_BK))
    assert (after_B <= before_B * (1 + 1e-5) + 1e-5).all() and after_B.sum() < before_B.sum()
    assert (np.asarray(refined_BK) >= 0).all() and not ((refined_BK > 0) & (z_BK == 0)).any()


def test_refinement_takes_what_encode_gives():
  made = autoencoder('relu')
  z_PTK, idx_PTK = made.encode(X_BD.reshape(5, 10, D), sae_jax.TopK(5))
  whole = made.refine(X_BD.reshape(5, 10, D), z_PTK, idx_PTK)
  assert whole.shape == z_PTK.shape
  np.testing.assert_allclose(jax.jit(made.refine)(X_BD.reshape(5, 10, D), z_PTK, idx_PTK), whole, atol=1e-4)
  assert made.refine(X_BD[:0], z_PTK[0, :0], idx_PTK[0, :0]).shape == (0, z_PTK.shape[-1])
  with pytest.raises(UserError, match=r'x has shape \(50, 7\).*not one row a token'):
    made.refine(X_BD, z_PTK, idx_PTK)
  sigmoid = autoencoder('cs294a')
  with pytest.raises(UserError, match='not linear'):
    sigmoid.refine(X_BD, *sigmoid.encode(X_BD))


@pytest.mark.parametrize('name', ['topk', 'relu'])
def test_refinement_undoes_the_shrinkage_of_relu_and_topk_has_little(name, tmp_path):
  own = {'sae.activation': 'relu', 'sae.k': 9, 'sae.k_aux': 0} if name == 'relu' else {}
  config = cells.cell(**own | {'train.tokens': 40 * 100, 'train.checkpoint_every': 1000})
  assert training.train(config, str(tmp_path)) == 'done'
  made = sae_jax.load(tmp_path)
  x_BD = Planted(config.data.planted, d_model=config.sae.d_model, order_seed=0).held_out(0, 128)
  z_BK, idx_BK = made.encode(x_BD)
  refined_BK = made.refine(x_BD, z_BK, idx_BK)
  growth = float(refined_BK.sum() / z_BK.sum())
  assert (growth > 1.2) if name == 'relu' else (1 < growth < 1.15)
  assert square_errors(made, x_BD, refined_BK, idx_BK).sum() < square_errors(made, x_BD, z_BK, idx_BK).sum()
