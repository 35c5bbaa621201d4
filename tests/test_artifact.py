"""A loaded autoencoder takes raw activations and gives them back in their own space."""

import dataclasses
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sae_jax
from sae_jax import schema
from sae_jax.artifact import Autoencoder, load, save
from sae_jax.autoencoder import SAE
from sae_jax.config import SAEConfig
from sae_jax.data.normalize import normalize
from sae_jax.errors import UserError
from sae_jax.families.family import NAMES, family
from sae_jax.sae import kept_shapes

D, F, K = 5, 11, 2
SIZE = SAEConfig(D, F, K, 'topk', k_aux=0, fired_threshold=0.0, latent_bias=True)


INFO = {
  'id': '',
  'n_latents': F,
  'd_model': D,
  'k': K,
  'activation': 'topk',
  'weights': 'raw',
  'subject': '',
  'site': '',
  'normalize': 'none',
  'identity': '',
}


def size_of(name: str, **knobs: Any) -> SAEConfig:
  k = None if family(name).penalised else K
  return SAEConfig(D, F, k, name, k_aux=0, fired_threshold=0.0, latent_bias=True, **knobs)


def random_params(name: str) -> dict[str, np.ndarray]:
  """What an artifact of a family holds."""
  rng = np.random.default_rng(5)
  return {key: np.asarray(rng.standard_normal(s), np.float32) for key, s in kept_shapes(size_of(name)).items()}


def autoencoder(normalization: str, **info: Any) -> Autoencoder:
  rng = np.random.default_rng(0)
  params = {
    'w_enc_FD': rng.standard_normal((F, D)),
    'w_dec_FD': rng.standard_normal((F, D)),
    'b_enc_F': np.zeros(F),
    'b_pre_D': rng.standard_normal(D),
  }
  sae = SAE({name: jnp.asarray(p, jnp.float32) for name, p in params.items()}, SIZE)
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
  'changes',
  [
    {'normalize': 'layer_norm'},
    {'normalize': 'scale'},
    {'normalize': 'scale', 'scale': 0.0},
    {'normalize': 'scale', 'scale': -1.0},
    {'normalize': 'none', 'scale': 2.0},
  ],
)
def test_autoencoder_whose_inputs_are_unknown_is_not_loaded(tmp_path, changes):
  params, info = random_params('topk'), INFO | {'normalize': 'scale', 'scale': 0.5}
  save(str(tmp_path), {'raw': params}, info)
  assert load(str(tmp_path)).info['scale'] == 0.5
  save(str(tmp_path), {'raw': params}, INFO | changes)
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


X_BD = np.random.default_rng(4).standard_normal((7, D)).astype(np.float32) * 20 + 3


@pytest.mark.parametrize('normalization', ['none', 'center_unit'])
def test_inside_jit_the_same_numbers(normalization):
  sae = autoencoder(normalization)
  for straight, jitted in zip(sae.encode(X_BD), jax.jit(sae.encode)(X_BD), strict=True):
    np.testing.assert_allclose(straight, jitted, rtol=1e-5)
  np.testing.assert_allclose(sae.reconstruct(X_BD), jax.jit(sae.reconstruct)(X_BD), rtol=1e-5)
  z, idx = sae.encode(X_BD)
  np.testing.assert_allclose(sae.decode(z, idx), jax.jit(sae.decode)(z, idx), rtol=1e-6)


def test_inside_jit_shapes_and_types_are_checked_and_an_index_out_of_range_is_nan():
  sae = autoencoder('center_unit')
  for function, arguments, words in (
    (sae.encode, (X_BD.T,), r'shape \(5, 7\).*d_model=5'),
    (sae.reconstruct, (X_BD.astype(int),), 'int32.*floats'),
    (sae.decode, (X_BD, np.zeros((7, 1), int)), r'\(7, 5\).*\(7, 1\)'),
    (sae.decode, (X_BD, X_BD), 'float32.*integers'),
  ):
    with pytest.raises(UserError, match=words):
      jax.jit(function)(*arguments)
  z, idx = np.ones((3, K), np.float32), np.array([[0, 1], [0, F], [-1, 2]])
  bad = np.isnan(jax.jit(sae.decode)(z, idx))
  np.testing.assert_array_equal(bad, np.broadcast_to([[False], [True], [True]], (3, D)))


def test_every_layout_of_the_same_numbers_is_taken():
  sae = autoencoder('center_unit')
  z, idx = sae.encode(X_BD)
  np.testing.assert_allclose(sae.decode(np.asarray(z, np.float64), np.asarray(idx, np.uint8)), sae.decode(z, idx))
  for same in (jnp.asarray(X_BD), X_BD.astype(np.float64), X_BD.tolist(), np.asfortranarray(X_BD)):
    np.testing.assert_array_equal(sae.encode(same)[1], idx)
  np.testing.assert_array_equal(sae.encode(X_BD[0])[1], idx[0])  # one token
  assert sae.encode(jnp.asarray(X_BD, jnp.bfloat16))[0].shape == (7, K)


def test_empty_batches_are_empty_and_no_latent_is_the_bias():
  sae = autoencoder('center_unit')
  for shape in ((0, D), (3, 0, D)):
    empty = np.zeros(shape, np.float32)
    z, idx = sae.encode(empty)
    assert z.shape == idx.shape == (*shape[:-1], K) and idx.dtype == np.int32
    assert sae.decode(z, idx).shape == sae.reconstruct(empty).shape == shape
  none = sae.decode(np.zeros((2, 0), np.float32), np.zeros((2, 0), np.int32))
  np.testing.assert_array_equal(none, np.broadcast_to(sae.sae.b_pre_D[...], (2, D)))


@pytest.mark.parametrize('key', ['activation', 'normalize'])
def test_what_this_version_would_compute_wrongly_is_refused(trained, tmp_path, key):
  cell = next(trained.glob('cells/*'))
  shutil.copytree(cell / 'sae', tmp_path / 'sae')
  path = tmp_path / 'sae' / 'sae.json'
  path.write_bytes(schema.dump(schema.content(schema.parse(path.read_bytes())) | {key: 'later'}))
  with pytest.raises(UserError, match=f'{key}=.later. is none that this version knows'):
    sae_jax.load(tmp_path)


@pytest.mark.parametrize('name', NAMES)
def test_tensors_of_another_family_are_refused(name, tmp_path):
  params, info = random_params(name), INFO | {'activation': name, 'k': size_of(name).k}
  save(str(tmp_path), {'raw': params}, info)
  loaded = load(str(tmp_path))
  assert loaded.sae.size == size_of(name) and loaded.encode(X_BD)[0].shape[0] == len(X_BD)
  foreign = [other for other in NAMES if random_params(other).keys() != params.keys()]
  assert foreign
  for other in foreign:
    save(str(tmp_path), {'raw': random_params(other)}, info)
    wrong = sorted(random_params(other).keys() ^ params.keys())
    with pytest.raises(UserError) as raised:
      load(str(tmp_path))
    said = [f'{one} is {"missing" if one in params else "not of it"}' for one in wrong]
    assert f"activation='{name}' has other tensors than these: {', '.join(said)};" in str(raised.value)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize('name', NAMES)
def test_sae_json_holds_all_that_codes_depend_on(name):
  """Knobs of training are not in it: an autoencoder in use computes the same with any of them."""
  kept = {'d_model', 'n_latents', 'k', 'activation'}
  params = {key: jnp.asarray(p) for key, p in random_params(name).items()}
  plain = SAE(params, size_of(name))
  z, idx = plain.encode(X_BD)
  expected = z, idx, plain.decode(z, idx)
  flipped = {'k_aux': 2, 'fired_threshold': 0.9, 'latent_bias': False, 'selection': 'approximate'}
  for field in dataclasses.fields(SAEConfig):
    if field.name not in kept:
      other = flipped.get(field.name, field.default / 2 if isinstance(field.default, float) else 2)
      assert other != getattr(plain.size, field.name)
      changed = SAE(params, dataclasses.replace(plain.size, **{field.name: other}))
      found = *changed.encode(X_BD), changed.decode(z, idx)
      for one, same in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, same, err_msg=field.name)
