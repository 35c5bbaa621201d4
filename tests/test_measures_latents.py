"""Statistics and contexts of latents, against loops over all tokens at once."""

import numpy as np
import pytest

from sae_jax.measures import inputs as measure_inputs
from sae_jax.measures.latents import Latents
from tests import judging

MEASURE = Latents(contexts=4)


@pytest.fixture(scope='module')
def on(tmp_path_factory):
  return judging.inputs(tmp_path_factory.mktemp('inputs'))


def tokens(of, on):
  """Dense codes [B, F] of all tokens, and of each: held out, window, document, offset, position, id."""
  z_BF, where = [], []
  for held_out, stream in enumerate(('train', 'held_out')):
    window = 0
    for i in range(on.blocks(stream)):
      block = on.block(stream, i)
      codes = of.form.codes(of.params, of.form.unit(block.counted_BD)[0])
      z_BK, idx_BK, _ = codes.listed()
      dense_BF = np.zeros((len(z_BK), of.form.size.n_latents), np.float32)
      np.put_along_axis(dense_BF, np.asarray(idx_BK), np.asarray(z_BK), axis=1)
      z_BF.append(dense_BF)
      for w in range(len(block.windows)):
        for p in block.places_WT[w]:
          at = (block.windows.document_W[w], block.windows.offset_W[w], p, block.windows.ids_WT[w, p])
          where.append((held_out, window, *at))
        window += 1
  return np.concatenate(z_BF), np.array(where)


FIELDS = ('held_out', 'window', 'document', 'offset', 'position', 'token')


@pytest.mark.parametrize('family', judging.FAMILIES)
def test_statistics_and_contexts_are_those_over_all_tokens(on, family):
  of = judging.judged(family)
  (unit,) = judging.units(MEASURE, of, on)
  z_BF, where = tokens(of, on)
  a, active_BF = unit.arrays, z_BF > 0
  np.testing.assert_array_equal(a['firings'], active_BF.sum(0))
  np.testing.assert_allclose(a['max'], z_BF.max(0), rtol=1e-5)
  np.testing.assert_allclose(a['mean'], z_BF.sum(0) / np.maximum(active_BF.sum(0), 1), rtol=1e-5)
  for f in range(16):
    values = z_BF[active_BF[:, f], f]
    clipped = np.clip(values, a['value_edges'][0], a['value_edges'][-1] * 0.999)
    np.testing.assert_array_equal(a['value_histogram'][f], np.histogram(clipped, a['value_edges'])[0])
    best = [b for b in np.lexsort((np.arange(len(z_BF)), -z_BF[:, f])) if active_BF[b, f]][:4]
    n = len(best)
    np.testing.assert_allclose(a['top_value'][f], np.r_[z_BF[best, f], np.zeros(4 - n)], rtol=1e-5)
    if len(np.unique(z_BF[best, f])) == n:  # equal values differ by rounding between the two ways
      found = np.stack([a[f'top_{name}'][f, :n] for name in FIELDS], axis=1)
      np.testing.assert_array_equal(found, where[best])
    for kind in ('top', 'random'):
      drawn = np.stack([a[f'{kind}_{name}'][f] for name in FIELDS], axis=1)
      assert (drawn[n:] == -1).all() and len({tuple(row) for row in drawn[:n]}) == n
      for row, value in zip(drawn[:n], a[f'{kind}_value'][f], strict=False):
        (b,) = np.flatnonzero((where == row).all(1))
        assert z_BF[b, f] == pytest.approx(value, rel=1e-5) and value > 0
  density_F = active_BF.mean(0)
  values = {name: value.value for name, value in MEASURE.values([unit]).items()}
  assert values == {
    'alive': pytest.approx((density_F > 0).mean()),
    'dense_share': pytest.approx((density_F > 0.1).mean()),
    'rare_share': pytest.approx((active_BF.sum(0) < 32).mean()),
    'median_log10_density': pytest.approx(np.median(np.log10(density_F[density_F > 0]))),
  }
  assert a['density_histogram'].sum() == (density_F > 0).sum()


def test_the_split_into_blocks_does_not_matter(tmp_path, monkeypatch):
  of, found = judging.judged('gated'), []
  for windows in (8, 3):
    monkeypatch.setattr(measure_inputs, 'BLOCK_WINDOWS', windows)
    found += judging.units(MEASURE, of, judging.inputs(tmp_path / str(windows)))
  assert found[0].record == found[1].record
  for name, a in found[0].arrays.items():
    np.testing.assert_allclose(a, found[1].arrays[name], rtol=1e-5, err_msg=name)


def test_random_contexts_are_drawn_by_the_seed_from_all_tokens_alike(on):
  of = judging.judged('cs294a')  # every latent is active for every token
  drawn = [judging.units(Latents(contexts=4, seed=seed), of, on)[0].arrays for seed in range(12)]
  assert not np.array_equal(drawn[0]['random_position'], drawn[1]['random_position'])
  assert not np.array_equal(drawn[0]['random_window'][0], drawn[0]['random_window'][1])
  np.testing.assert_array_equal(drawn[0]['top_window'], drawn[1]['top_window'])
  # 38 windows of which 20 are held out, 768 draws: three standard deviations.
  share = np.mean([a['random_held_out'] for a in drawn])
  assert abs(share - 20 / 38) < 3 * 0.5 / np.sqrt(768)


def test_a_dead_autoencoder_has_no_median_and_no_context(on):
  of = judging.judged('relu', b_enc_F=np.full(16, -1e9, np.float32))
  (unit,) = judging.units(MEASURE, of, on)
  assert unit.arrays['top_document'].max() == unit.arrays['random_token'].max() == -1
  values = MEASURE.values([unit])
  assert values['alive'].value == 0 and 'median_log10_density' not in values
