"""A loaded autoencoder takes raw activations and gives them back in their own space."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax.artifact import Autoencoder, load, save
from sae_jax.data.normalize import normalize
from sae_jax.errors import UserError
from sae_jax.sae import SAE

D, F, K = 5, 11, 2


def autoencoder(normalization: str, **info: Any) -> Autoencoder:
  rng = np.random.default_rng(0)
  params = {
    'w_enc_FD': rng.standard_normal((F, D)), 'w_dec_FD': rng.standard_normal((F, D)), 'b_enc_F': np.zeros(F),
    'b_pre_D': rng.standard_normal(D),
  }  # fmt: skip
  sae = SAE({name: jnp.asarray(p, jnp.float32) for name, p in params.items()}, k=K)
  return Autoencoder(sae, {'n_latents': F, 'd_model': D, 'k': K, 'normalize': normalization} | info)


def test_raw_and_normalised_inputs_encode_alike():
  x_BD = np.random.default_rng(1).standard_normal((7, D)).astype(np.float32) * 20 + 3
  sae = autoencoder('center_unit')
  unit_BD, _, _ = normalize(x_BD, 'center_unit')
  for raw, unit in zip(sae.encode(x_BD), sae.encode(unit_BD), strict=True):
    np.testing.assert_allclose(raw, unit, rtol=1e-4, atol=1e-6)


def test_reconstruct_undoes_the_normalisation():
  x_BD = np.random.default_rng(2).standard_normal((7, D)).astype(np.float32) * 20 + 3
  sae = autoencoder('center_unit')
  _, mean_B1, norm_B1 = normalize(x_BD, 'center_unit')
  expected = np.asarray(sae.decode(*sae.encode(x_BD))) * norm_B1 + mean_B1
  np.testing.assert_allclose(sae.reconstruct(x_BD), expected, rtol=1e-6)


def test_scale_goes_in_and_comes_out_again():
  x_BD = np.random.default_rng(4).standard_normal((7, D)).astype(np.float32) * 2000
  sae, plain = autoencoder('scale', scale=1 / 4096), autoencoder('none')
  for scaled, raw in zip(sae.encode(x_BD), plain.encode(x_BD / 4096), strict=True):
    np.testing.assert_array_equal(scaled, raw)
  np.testing.assert_allclose(sae.reconstruct(x_BD), 4096 * plain.reconstruct(x_BD / 4096), rtol=1e-6)


@pytest.mark.parametrize('scale', [None, 0.0, -1.0, np.inf, np.nan])
def test_scale_is_never_guessed(scale):
  with pytest.raises(UserError, match="normalize='scale' with scale="):
    normalize(np.ones((2, D), np.float32), 'scale', scale)


@pytest.mark.parametrize('kind', ['layer_norm', '', None, 'center-unit'])
def test_unknown_normalisation_is_refused_where_it_would_be_applied(kind):
  with pytest.raises(UserError, match='is not known; use one of center_unit, scale, none'):
    autoencoder(kind).encode(np.ones((2, D)))


@pytest.mark.parametrize(
  'changes', [{'normalize': 'layer_norm'}, {'normalize': 'scale'}, {'normalize': 'scale', 'scale': 0.0},
              {'normalize': 'scale', 'scale': -1.0}, {'normalize': 'none', 'scale': 2.0}],
)  # fmt: skip
def test_autoencoder_whose_inputs_are_unknown_is_not_loaded(tmp_path, changes):
  params = {name: np.ones(s, np.float32) for name, s in
            {'w_enc_FD': (F, D), 'w_dec_FD': (F, D), 'b_enc_F': F, 'b_pre_D': D}.items()}  # fmt: skip
  info = {
    'id': '', 'n_latents': F, 'd_model': D, 'k': K, 'activation': 'topk', 'weights': 'raw', 'subject': '', 'site': '',
    'normalize': 'scale', 'scale': 0.5, 'identity': '',
  }  # fmt: skip
  save(str(tmp_path), {'raw': params}, info)
  assert load(str(tmp_path)).info['scale'] == 0.5
  save(str(tmp_path), {'raw': params}, {key: v for key, v in info.items() if key != 'scale'} | changes)
  with pytest.raises(UserError, match=r'normalize|scale'):
    load(str(tmp_path))


def test_leading_axes_are_kept():
  x_PTD = np.random.default_rng(3).standard_normal((2, 3, D)).astype(np.float32)
  sae = autoencoder('none')
  z, idx = sae.encode(x_PTD)
  assert z.shape == idx.shape == (2, 3, K) and sae.decode(z, idx).shape == x_PTD.shape


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-3, 1.0, 1e4]))
def test_normalise_is_exact_undone_and_idempotent(seed, scale):
  x_BD = (np.random.default_rng(seed).standard_normal((4, D)) * scale).astype(np.float32)
  x_BD[0] = scale  # a constant token
  out, mean, norm = normalize(x_BD, 'center_unit')
  np.testing.assert_allclose(out * norm + mean, x_BD, rtol=1e-4, atol=1e-5 * scale)
  np.testing.assert_allclose(np.linalg.norm(out[1:], axis=1), 1, rtol=1e-5)
  np.testing.assert_array_equal(out[0], 0)
  np.testing.assert_allclose(normalize(out, 'center_unit')[0], out, atol=1e-5)
