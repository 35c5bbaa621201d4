"""Reconstruction in every definition: against numpy over all tokens at once, and against the evaluator."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import evaluate, sharding
from sae_jax.measures import inputs as measure_inputs
from sae_jax.measures import paired
from sae_jax.measures.reconstruction import Reconstruction
from tests import cells, judging

MEASURE = Reconstruction()


@pytest.fixture(scope='module')
def on(tmp_path_factory):
  return judging.inputs(tmp_path_factory.mktemp('inputs'))


def by_hand(of, on):
  """All values but those of blocks, from all tokens in float64."""
  raw_BD = judging.counted(on)
  unit_BD, mean_B1, norm_B1 = (np.asarray(a, np.float64) for a in of.form.unit(raw_BD))
  codes = of.form.codes(of.params, jnp.asarray(unit_BD, jnp.float32))
  hat_BD = np.asarray(of.form.rebuilt(of.params, codes), np.float64)
  found = {'l0_ema': np.mean(np.asarray(codes.active())), 'massive_share': 0.0}
  found['l0_raw'] = np.mean(np.asarray(of.form.codes(of.other, jnp.asarray(unit_BD, jnp.float32)).active()))
  about = np.asarray(of.params['b_pre_D'], np.float64)
  found['nmse_about_b_pre'] = ((unit_BD - hat_BD) ** 2).sum() / ((unit_BD - about) ** 2).sum()
  for space, x_BD, x_hat_BD in (('', unit_BD, hat_BD), ('raw_', raw_BD.astype(float), hat_BD * norm_B1 + mean_B1)):
    error_B, square_B = ((x_BD - x_hat_BD) ** 2).sum(1), ((x_BD - x_BD.mean(0)) ** 2).sum(1)
    own_B, hat_B, dot_B = (x_BD**2).sum(1), (x_hat_BD**2).sum(1), (x_BD * x_hat_BD).sum(1)
    own = {
      'nmse': error_B.sum() / square_B.sum(),
      'mse': ((x_BD - x_hat_BD) ** 2).mean(),
      'per_token_nmse': (error_B / own_B).mean(),
      'explained_variance': 1 - error_B.sum() / square_B.sum(),
      'explained_variance_legacy': (1 - error_B / square_B).mean(),
      'cosine_similarity': (dot_B / np.sqrt(own_B * hat_B)).mean(),
      'l2_ratio': np.sqrt(hat_B / own_B).mean(),
      'relative_reconstruction_bias': hat_B.sum() / dot_B.sum(),
    }
    found |= {space + name: value for name, value in own.items()}
  return found


@pytest.mark.parametrize('family', judging.FAMILIES)
def test_every_definition_is_that_over_all_tokens(on, family):
  of = judging.judged(family)
  found, expected = judging.numbers(MEASURE, of, on), by_hand(of, on)
  assert on.blocks('held_out') == 3
  assert found.keys() == expected.keys() | {'raw_frac_variance_explained'}
  for name, value in expected.items():
    assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_nmse_mse_and_l0_are_the_evaluators(on):
  of = judging.judged('topk')
  rows_BD = np.asarray(of.form.unit(judging.counted(on))[0], np.float32)

  class Rows:
    d_model = judging.D_MODEL

    def held_out(self, start, stop):
      return rows_BD[start:stop]

  sizes = {'sae.n_latents': 16, 'sae.k': 3, 'sae.d_model': judging.D_MODEL, 'sae.k_aux': 0}
  cell = cells.cell(**sizes | {'eval.tokens': len(rows_BD), 'eval.batch_tokens': 32})
  (quality,) = evaluate.Evaluator(cell, sharding.make_mesh(cell.mesh), Rows())(of.params)
  found = judging.numbers(MEASURE, of, on)
  for name, expected in {'nmse': quality.nmse, 'mse': quality.mse, 'l0_ema': quality.l0}.items():
    assert found[name] == pytest.approx(expected, rel=1e-5), name


def test_the_mean_scores_1_and_the_activation_itself_0(on):
  mean_D = judging.counted(on).astype(np.float64).mean(axis=0)
  nothing = judging.judged('relu', normalize='none', b_enc_F=np.full(16, -1e9, np.float32), b_pre_D=np.float32(mean_D))
  found = judging.numbers(MEASURE, nothing, on)
  for name in ('nmse', 'raw_nmse', 'nmse_about_b_pre'):
    assert found[name] == pytest.approx(1, rel=1e-6), name
  assert found['explained_variance'] == pytest.approx(0, abs=1e-6) and found['l0_ema'] == 0
  assert found['raw_frac_variance_explained'] == pytest.approx(0, abs=1e-5)  # whatever the reconstruction's mean is

  eye_DD = np.eye(judging.D_MODEL, dtype=np.float32)
  both_FD = np.concatenate([eye_DD, -eye_DD])
  exact = judging.judged(
    'relu', 12, w_enc_FD=both_FD, w_dec_FD=both_FD, b_enc_F=np.zeros(12), b_pre_D=np.zeros(judging.D_MODEL)
  )
  found = judging.numbers(MEASURE, exact, on)
  for name in ('nmse', 'mse', 'per_token_nmse', 'nmse_about_b_pre', 'raw_nmse', 'raw_per_token_nmse'):
    assert found[name] == pytest.approx(0, abs=1e-9), name
  for name in ('explained_variance', 'explained_variance_legacy', 'cosine_similarity', 'l2_ratio'):
    assert [found[name], found[f'raw_{name}']] == pytest.approx([1, 1], abs=1e-6), name
  assert found['relative_reconstruction_bias'] == pytest.approx(1, abs=1e-6)
  assert found['raw_frac_variance_explained'] == pytest.approx(1, abs=1e-6)


def test_half_the_activation_shrinks_by_half(on):
  eye_DD = np.eye(judging.D_MODEL, dtype=np.float32)
  both_FD = np.concatenate([eye_DD, -eye_DD])
  half = judging.judged(
    'relu', 12, w_enc_FD=both_FD, w_dec_FD=both_FD / 2, b_enc_F=np.zeros(12), b_pre_D=np.zeros(judging.D_MODEL)
  )
  found = judging.numbers(MEASURE, half, on)
  assert found['l2_ratio'] == pytest.approx(0.5) and found['relative_reconstruction_bias'] == pytest.approx(0.5)
  assert found['cosine_similarity'] == pytest.approx(1) and found['per_token_nmse'] == pytest.approx(0.25)


def test_the_split_into_blocks_does_not_matter(tmp_path, monkeypatch):
  of = judging.judged('batchtopk')
  found = {}
  for windows in (8, 3):
    monkeypatch.setattr(measure_inputs, 'BLOCK_WINDOWS', windows)
    on = judging.inputs(tmp_path / str(windows))
    assert on.blocks('held_out') == -(-20 // windows)
    found[windows] = judging.values(MEASURE, of, on)
  for name in found[8].keys() - {'raw_frac_variance_explained'}:
    a, b = found[8][name], found[3][name]
    assert a.value == pytest.approx(b.value, rel=1e-6, abs=1e-9), name
    assert a.se == pytest.approx(b.se, rel=1e-4, abs=1e-6), name


def test_two_autoencoders_are_compared_window_by_window(on):
  both = [judging.units(MEASURE, judging.judged('topk', k=k), on) for k in (2, 3)]
  one, other = (MEASURE.values(units)['nmse'] for units in both)
  found = paired.differences(MEASURE, *([json.loads(json.dumps(unit.record)) for unit in units] for units in both))
  assert found['nmse']['value'] == pytest.approx(one.value - other.value)
  assert 0 < found['nmse']['se'] < np.hypot(one.se, other.se)
  assert 'raw_frac_variance_explained' not in found


def test_one_set_of_weights_has_one_l0(on):
  of = judging.judged('gated')
  alone = dataclasses.replace(of, other=None, weights='raw')
  found = judging.numbers(MEASURE, alone, on)
  assert 'l0_raw' in found and 'l0_ema' not in found
