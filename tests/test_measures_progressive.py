"""Other numbers of latents a token: against numpy, and against the reconstruction at k."""

import numpy as np
import pytest

from sae_jax.measures import inputs as measure_inputs
from sae_jax.measures.progressive import Progressive
from sae_jax.measures.reconstruction import Reconstruction
from tests import judging

MEASURE = Progressive(fitted_windows=11)


@pytest.fixture(scope='module')
def on(tmp_path_factory):
  return judging.inputs(tmp_path_factory.mktemp('inputs'))


@pytest.mark.parametrize('family', judging.FAMILIES)
def test_errors_are_those_of_the_largest_and_of_those_above_a_threshold(on, family):
  of = judging.judged(family)
  found = judging.numbers(MEASURE, of, on)
  unit_BD = np.asarray(of.form.unit(judging.counted(on))[0])
  z_BF = np.asarray(of.form.dense(of.params, unit_BD))
  fitted_BF = np.asarray(of.form.dense(of.params, of.form.unit(judging.counted(on, 'train')[: 11 * 7])[0]))
  square = ((unit_BD - unit_BD.mean(0)) ** 2).sum()

  def nmse(kept_BF):
    sum_BD = kept_BF @ np.asarray(of.params['w_dec_FD']) + np.asarray(of.params['b_pre_D'])
    if family == 'cs294a':
      sum_BD = (1 / (1 + np.exp(-sum_BD)) - 0.5) * (3 / np.sqrt(judging.D_MODEL) / 0.4)
    return ((unit_BD - sum_BD) ** 2).sum() / square

  assert [name for name in found if name.startswith('nmse')] == [f'nmse_at_{k}' for k in (1, 2, 3, 4, 8, 16)]
  for k in (1, 2, 3, 4, 8, 16):
    kth_B1 = -np.sort(-z_BF, axis=1)[:, k - 1 : k]
    assert found[f'nmse_at_{k}'] == pytest.approx(nmse(np.where(z_BF >= kth_B1, z_BF, 0)), rel=1e-4)
    positive = np.sort(fitted_BF[fitted_BF > 0])
    if k * 77 < len(positive):
      kept_BF = np.where(z_BF > positive[-k * 77 - 1], z_BF, 0)
      assert found[f'threshold_l0_at_{k}'] == pytest.approx((kept_BF > 0).sum(1).mean())
      assert found[f'threshold_nmse_at_{k}'] == pytest.approx(nmse(kept_BF), rel=1e-4)
    else:
      assert f'threshold_nmse_at_{k}' not in found
  assert 'threshold_l0_at_1' in found


def test_at_k_it_is_the_autoencoder(on):
  of = judging.judged('topk')
  own = judging.numbers(Reconstruction(), of, on)['nmse']
  assert judging.numbers(MEASURE, of, on)['nmse_at_3'] == pytest.approx(own, rel=1e-6)


def test_the_split_into_blocks_does_not_matter(tmp_path, monkeypatch):
  of, found = judging.judged('gated'), []
  for windows in (8, 3):
    monkeypatch.setattr(measure_inputs, 'BLOCK_WINDOWS', windows)
    found.append(judging.values(MEASURE, of, judging.inputs(tmp_path / str(windows))))
  assert found[0].keys() == found[1].keys()
  for name, value in found[0].items():
    assert value.value == pytest.approx(found[1][name].value, rel=1e-6), name
    assert value.se == pytest.approx(found[1][name].se, rel=1e-4), name


def test_numbers_go_beyond_k_and_not_beyond_the_latents():
  def ks(k, n_latents, most):
    return Progressive(most)._ks(judging.judged('topk', n_latents, k))

  assert ks(6, 40, 4) == (1, 2, 4, 6, 8, 16)
  assert ks(6, 12, 64) == (1, 2, 4, 6, 8)
  assert ks(32, 40, 8) == (1, 2, 4, 8, 16, 32)
