"""Refined values of latents that stay as they are."""

import numpy as np
import pytest

from sae_jax import inference
from sae_jax.measures.reconstruction import Reconstruction
from sae_jax.measures.refine import Refine
from tests import judging

MEASURE = Refine(windows=99, steps=60)


@pytest.fixture(scope='module')
def on(tmp_path_factory):
  return judging.inputs(tmp_path_factory.mktemp('inputs'))


@pytest.mark.parametrize('family', ['topk', 'relu', 'gated'])
def test_errors_and_values_are_those_of_refining_all_tokens_at_once(on, family):
  of = judging.judged(family)
  found = judging.numbers(MEASURE, of, on)
  unit_BD = np.asarray(of.form.unit(judging.counted(on))[0])
  z_BK, idx_BK, _ = of.form.codes(of.params, unit_BD).listed()
  target_BD, w_FD = unit_BD - np.asarray(of.params['b_pre_D']), np.asarray(of.params['w_dec_FD'])
  better_BK = np.asarray(inference.refined(of.params['w_dec_FD'], target_BD, z_BK, idx_BK, 60))
  z_BK = np.asarray(z_BK)
  assert (better_BK[z_BK == 0] == 0).all()  # support never grows
  square = ((unit_BD - unit_BD.mean(0)) ** 2).sum()
  nmse = [((target_BD - np.einsum('bk,bkd->bd', v_BK, w_FD[idx_BK])) ** 2).sum() / square for v_BK in (z_BK, better_BK)]
  assert [found['nmse_before'], found['nmse_after']] == pytest.approx(nmse, rel=1e-4)
  assert found['growth'] == pytest.approx(better_BK.sum() / z_BK.sum(), rel=1e-4)
  assert found['error_removed'] == pytest.approx(1 - nmse[1] / nmse[0], rel=1e-3)
  own = judging.numbers(Reconstruction(), of, on)
  assert found['nmse_before'] == pytest.approx(own['nmse'], rel=1e-5)
  for unit in judging.units(MEASURE, of, on):
    for name in ('error_before', 'error_after'):
      assert len(unit.record[name]) == len(unit.record['square'])
    assert (np.array(unit.record['error_after']) <= np.array(unit.record['error_before'])).all()


def test_an_exact_code_stays_and_half_of_it_doubles(on):
  eye_DD = np.eye(judging.D_MODEL, dtype=np.float32)
  both_FD, none = np.concatenate([eye_DD, -eye_DD]), np.zeros(12, np.float32)
  zero_D = np.zeros(judging.D_MODEL, np.float32)

  def found(scale):
    of = judging.judged('relu', 12, w_enc_FD=scale * both_FD, w_dec_FD=both_FD, b_enc_F=none, b_pre_D=zero_D)
    return judging.numbers(MEASURE, of, on)

  assert found(1)['growth'] == pytest.approx(1, abs=1e-6) and found(1)['nmse_after'] == pytest.approx(0, abs=1e-9)
  half = found(np.float32(0.5))
  assert half['growth'] == pytest.approx(2, rel=1e-3) and half['error_removed'] == pytest.approx(1, abs=1e-4)


def test_only_the_first_windows_are_looked_at(on):
  assert [Refine(windows=windows).units(on) for windows in (1, 8, 9, 99)] == [1, 1, 2, 3]


def test_a_decoder_that_is_not_linear_has_no_values(on):
  of = judging.judged('cs294a')
  assert judging.values(MEASURE, of, on) == {} and MEASURE.flops(of, on) == 0


def test_tokens_with_many_latents_are_refined_few_at_a_time():
  assert inference.refined_at_once(32, 576) == 256
  for k in (128, 1024, 4096):
    assert inference.refined_at_once(k, 576) * k * (k + 576) <= 2**25
  assert inference.refined_at_once(2**16, 4096) == 1
