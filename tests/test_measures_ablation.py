"""Ablation sparsity: the edit itself, the passes behind it, and the score against hand-made changes of logits."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.measures import ablation, paired
from sae_jax.measures.ablation import Ablation
from tests import judging

MEASURE = Ablation(places=5, edits=4, positions=3)


@pytest.fixture(scope='module')
def on(tmp_path_factory):
  return judging.inputs(tmp_path_factory.mktemp('inputs'))


def places(on, measure=MEASURE):
  return [measure.place(unit, on) for unit in range(measure.units(on))]


def ids(on, place):
  return np.concatenate([on.block('held_out', i).windows.ids_WT for i in range(3)])[place.window][None]


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_the_score_of_known_changes():
  rng = np.random.default_rng(0)
  gaussian_PSV = rng.standard_normal((2, 16, 5000)).astype(np.float32)
  found_P = ablation.sparsity(gaussian_PSV)
  assert found_P == pytest.approx([2 / np.pi] * 2, rel=0.01)
  shifts_PS1 = rng.integers(-8, 8, (2, 16, 1)).astype(np.float32)
  assert ablation.sparsity(gaussian_PSV + shifts_PS1) == pytest.approx(found_P, rel=1e-5)
  assert ablation.sparsity(-3 * gaussian_PSV) == pytest.approx(found_P, rel=1e-5)
  one_PSV = np.zeros((2, 16, 50), np.float32)
  one_PSV[0, 3, 7] = -2.5
  assert ablation.sparsity(one_PSV)[0] == pytest.approx(1 / (16 * 50))
  assert np.isnan(ablation.sparsity(one_PSV)[1])


@pytest.mark.parametrize('family, normalize', [('topk', 'center_unit'), ('gated', 'scale')])
def test_an_edit_is_what_a_latent_adds_in_the_space_of_the_model(on, family, normalize):
  """The difference of two reconstructions, one of them without the latent: a norm that is lost would change its length."""
  of = judging.judged(family, normalize=normalize)
  w_dec_FD = np.asarray(of.params['w_dec_FD'])
  edited = 0
  for place in places(on):
    found_ESD = MEASURE.contributions(place, of, on)
    unit_SD, mean_S1, norm_S1 = (np.asarray(a) for a in of.form.unit(place.x_SD))
    if normalize == 'center_unit':
      centred_SD = place.x_SD - place.x_SD.mean(1, keepdims=True)
      np.testing.assert_allclose(norm_S1[:, 0], np.linalg.norm(centred_SD, axis=1), rtol=1e-5)
    z_SK, idx_SK, _ = of.form.codes(of.params, jnp.asarray(unit_SD)).listed()
    z_SF = np.zeros((3, 16), np.float32)
    np.put_along_axis(z_SF, np.asarray(idx_SK), np.asarray(z_SK), axis=1)
    whole_SD = np.asarray(of.form.reconstruct(of.params, place.x_SD))
    assert len(found_ESD) == min(4, (z_SF[0] > 0).sum())
    seen = set()
    for found_SD in found_ESD:
      (latent,) = [
        f
        for f in np.flatnonzero(z_SF[0])
        if np.allclose(found_SD, z_SF[:, f, None] * norm_S1 * w_dec_FD[f], rtol=1e-4, atol=1e-5)
      ]
      seen.add(latent)
      without_SF = z_SF * (np.arange(16) != latent)
      without_SD = (without_SF @ w_dec_FD + np.asarray(of.params['b_pre_D'])) * norm_S1 + mean_S1
      close(found_SD, whole_SD - without_SD)
      lengths_S = np.linalg.norm(found_SD, axis=1)
      row = np.linalg.norm(w_dec_FD[latent])
      np.testing.assert_allclose(lengths_S, z_SF[:, latent] * norm_S1[:, 0] * row, rtol=1e-4, atol=1e-6)
      edited += (lengths_S[1:] > 0).sum()
    assert len(seen) == len(found_ESD)
  assert edited > 0  # some latents are active later too


def test_random_directions_are_as_long_as_the_edits_of_latents(on, monkeypatch):
  of, given = judging.judged('topk'), []
  genuine = ablation.sparsities
  monkeypatch.setattr(ablation, 'sparsities', lambda x, *rest: [given.append(x), genuine(x, *rest)][1])
  MEASURE.run(0, of, on)
  place = MEASURE.place(0, on)
  latent_ESD = MEASURE.contributions(place, of, on)
  n, removed_PSD = len(latent_ESD), place.x_SD - given[-1]
  once_PSD, all_PSD = removed_PSD[: 2 * n], removed_PSD[2 * n :]
  assert len(all_PSD) == 2 * n == 6
  close(all_PSD[:n], latent_ESD)
  close(once_PSD[:, 0], all_PSD[:, 0])
  assert (once_PSD[:, 1:] == 0).all()
  lengths_ES = np.linalg.norm(all_PSD[n:], axis=-1)
  wanted_E = np.linalg.norm(latent_ESD[:, 0], axis=-1)
  np.testing.assert_allclose(lengths_ES, np.repeat(wanted_E[:, None], 3, axis=1), rtol=1e-3)
  cosine = np.einsum('sd,sd->s', all_PSD[n], all_PSD[n, :1]) / lengths_ES[0] / lengths_ES[0, 0]
  np.testing.assert_allclose(cosine, 1, rtol=1e-4)


def test_channels_become_0_once_and_everywhere(on, tmp_path, monkeypatch):
  given = []
  monkeypatch.setattr(ablation, 'sparsities', lambda x, *rest: [given.append(x), np.ones(len(x))][1])
  fresh = judging.inputs(tmp_path)
  MEASURE.run(1, judging.judged('topk'), fresh)
  place = MEASURE.place(1, fresh)
  zero_PSD = given[0] != place.x_SD
  assert zero_PSD.shape == (8, 3, judging.D_MODEL) and (given[0][zero_PSD] == 0).all()
  channels_PD = zero_PSD[:, 0]
  assert (channels_PD.sum(axis=1) == 1).all() and (channels_PD[:4].sum(axis=0) <= 1).all()
  np.testing.assert_array_equal(channels_PD[:4], channels_PD[4:])
  assert not zero_PSD[:4, 1:].any()
  np.testing.assert_array_equal(zero_PSD[4:], np.repeat(channels_PD[4:, None], 3, axis=1))


def test_positions_that_do_not_count_stay(tmp_path, monkeypatch):
  given, genuine, fresh = [], Ablation.place, judging.inputs(tmp_path)
  counts_S = np.array([True, False, True])
  monkeypatch.setattr(ablation, 'sparsities', lambda x, *rest: [given.append(x), np.ones(len(x))][1])
  monkeypatch.setattr(Ablation, 'place', lambda *args: genuine(*args)._replace(counts_S=counts_S))
  for unit in range(5):
    MEASURE.run(unit, judging.judged('relu'), fresh)
    x_SD = genuine(MEASURE, unit, fresh).x_SD
    for edited_PSD in given[-2:]:
      np.testing.assert_array_equal((edited_PSD != x_SD)[:, 1], False)
      assert (edited_PSD != x_SD)[len(edited_PSD) // 2 :, 2].any()


def test_passes_from_t_are_those_of_whole_windows(on):
  """An edit at t leaves earlier logits alone, and later ones are those of the model run from the site as a whole."""
  subject, rng = on.subject, np.random.default_rng(0)
  for place in places(on):
    window_1T, here = ids(on, place), slice(place.start, place.start + 3)
    clean_TV = np.asarray(subject.logits(window_1T))[0]
    close(place.clean_SV, clean_TV[here])
    x_1TD = np.asarray(subject.residual(window_1T, on.site))
    close(x_1TD[0, here], place.x_SD)
    edited_PSD = place.x_SD + rng.standard_normal((9, *place.x_SD.shape)).astype(np.float32)
    whole_PTD = np.repeat(x_1TD, 9, axis=0)
    whole_PTD[:, here] = edited_PSD
    whole_PTV = np.asarray(subject.logits_from(subject.prefix(window_1T, on.site), whole_PTD, on.site, 0))
    close(whole_PTV[:, : place.start], np.repeat(clean_TV[None, : place.start], 9, axis=0))
    found_PSV = ablation._logits(edited_PSD, place.cache, place.start, on)
    close(found_PSV, whole_PTV[:, here])
    assert np.abs(found_PSV - place.clean_SV).max() > 0.1
    scores_P = ablation.sparsity(whole_PTV[:, here] - clean_TV[here])
    np.testing.assert_allclose(ablation.sparsities(edited_PSD, place, on), scores_P, rtol=1e-3)


def test_no_edit_is_exactly_no_change_and_is_left_out_and_counted(on):
  place = MEASURE.place(0, on)
  for rows in (1, 8):
    same_PSD = np.repeat(place.x_SD[None], rows, axis=0)
    found_PSV = ablation._logits(same_PSD, place.cache, place.start, on)
    np.testing.assert_array_equal(found_PSV, np.repeat(place.clean_SV[None], rows, axis=0))
  # Even where a program rounds some rows otherwise.
  rounded = place._replace(clean_SV=place.clean_SV + np.random.default_rng(0).normal(0, 1e-6, place.clean_SV.shape))
  assert np.isnan(ablation.sparsities(same_PSD, rounded, on)).all()
  silent = judging.judged('topk', w_dec_FD=np.zeros((16, judging.D_MODEL), np.float32))
  found = judging.numbers(MEASURE, silent, on)
  assert found.keys() == {'left_out', 'channel_once', 'channel_all'}
  assert found['left_out'] == 5 * 3 * 2 * 2  # at each place three latents and as many directions, in both variants
  idle = judging.judged('relu', b_enc_F=np.full(16, -1e9, np.float32))  # nothing is active
  assert judging.numbers(MEASURE, idle, on) == found | {'left_out': 0}


def test_places_are_the_same_for_all_autoencoders_and_leave_room(on):
  for measure in (MEASURE, Ablation(positions=99)):
    found = places(on, measure)
    assert len({place.window for place in found}) == len(found) == measure.units(on)
    for place in found:
      assert place.counts_S.all() and 1 <= place.start <= place.start + len(place.x_SD) <= 8
      assert len(place.x_SD) == min(measure.positions, 7)
  assert len({place.start for place in places(on)}) > 1
  assert Ablation(places=99).units(on) == 20
  here, there = (places(on, Ablation(5, 4, 3, seed)) for seed in (0, 1))
  assert [place.window for place in here] != [place.window for place in there]
  # More places, fewer edits: the first places stay.
  more = places(on, Ablation(9, 2, 3))
  assert [place.window for place in more][:5] == [place.window for place in places(on)]
  both = [judging.units(MEASURE, judging.judged('topk', k=k), on) for k in (2, 3)]
  for a, b in zip(*both, strict=True):
    for variant in ('once', 'all'):
      assert a.record[f'channel_{variant}'] == b.record[f'channel_{variant}']
      assert (a.record[f'latent_{variant}_pairs'], b.record[f'latent_{variant}_pairs']) == (2, 3)
  found = paired.differences(MEASURE, *([json.loads(json.dumps(unit.record)) for unit in units] for units in both))
  assert found['channel_all']['value'] == 0 and found['latent_all']['se'] > 0
  for name in ('latent_once', 'latent_over_channel_all'):
    one, other = (MEASURE.values(units)[name] for units in both)
    assert found[name]['value'] == pytest.approx(one.value - other.value)


@pytest.mark.parametrize('family', judging.FAMILIES)
def test_values_are_means_over_pairs(on, family):
  of = judging.judged(family)
  found = judging.values(MEASURE, of, on)
  if family == 'cs294a':  # its reconstruction is not a sum of latents
    assert found == {} and MEASURE.flops(of, on) == 0
    return
  scores = {variant: [] for variant in ('once', 'all')}
  for place in places(on):
    contributions_ESD = MEASURE.contributions(place, of, on)
    for variant, positions in (('once', slice(1)), ('all', slice(None))):
      edited_ESD = np.repeat(place.x_SD[None], len(contributions_ESD), axis=0)
      edited_ESD[:, positions] -= contributions_ESD[:, positions]
      scores[variant].append(ablation.sparsities(edited_ESD, place, on))
  for variant, of_places in scores.items():
    all_P = np.concatenate(of_places)
    assert len(all_P) and 0 < all_P.min() and all_P.max() <= 1
    assert found[f'latent_{variant}'].value == pytest.approx(all_P.mean(), rel=1e-5)
    assert found[f'latent_{variant}'].se > 0
    assert found[f'random_{variant}'].value > 0 and found['left_out'].value == 0
    sizes_U = np.array([len(p) for p in of_places])
    records = [unit.record for unit in judging.units(MEASURE, of, on)]
    channel_U = np.array([record[f'channel_{variant}'] for record in records]) / 4
    ratio = sum(p.sum() for p in of_places) / (channel_U * sizes_U).sum()
    assert found[f'latent_over_channel_{variant}'].value == pytest.approx(ratio, rel=1e-5)
