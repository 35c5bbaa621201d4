import json

import numpy as np
import pandas as pd
import pytest

from analysis import fit, seeds
from analysis.fitting import resample

SETTINGS, REPEATS, SD = 11, 3, 0.01


def planted(e=0.0, sd=SD, of_setting=0.0, seed=0, repeats=REPEATS):
  """Every size with several seeds; `of_setting` is noise that its seeds share."""
  rng = np.random.default_rng(seed)
  n = np.repeat(2.0 ** np.arange(6, 6 + SETTINGS), repeats)
  shared = np.repeat(of_setting * rng.normal(size=SETTINGS), repeats)
  loss = (e + 3 * n**-0.4) * np.exp(shared + sd * rng.normal(size=len(n)))
  return pd.DataFrame({'n_latents': n, 'seed': np.tile(np.arange(repeats), SETTINGS), 'nmse': loss})


def law(points, name='power_no_floor', **more):
  return fit.fit_law(points, name, **({'bootstrap': 0} | more))


def test_seed_noise_is_the_pooled_scatter_within_settings():
  points = planted(of_setting=0.1)
  found = law(points).diagnostics['seed_noise']
  within = points.assign(v=np.log(points['nmse'])).groupby('n_latents')['v'].var()
  assert found['sd_log'] == pytest.approx(np.sqrt(within.mean()))
  assert found['freedom'] == SETTINGS * (REPEATS - 1)


def test_seed_noise_uses_only_repeats():
  points = planted()
  alone = pd.concat([points.iloc[:4], points.iloc[6::3]])  # repeats of the first size only; two of its four rows
  found = law(alone).diagnostics['seed_noise']
  assert found['freedom'] == 2
  assert found['sd_log'] == pytest.approx(np.log(points['nmse'].iloc[:3]).std())


@pytest.mark.parametrize(
  'points',
  [
    planted().drop(columns='seed'),
    planted().assign(seed=0),
    planted(repeats=1),
    planted().assign(setting=range(33)),
  ],
)
def test_seed_noise_is_null_without_repeats_of_a_setting(points):
  found = law(points)
  assert found.diagnostics['seed_noise'] is None and 'seed noise' not in found.summary()


def test_lack_of_fit_is_found_where_the_law_is_wrong():
  found = law(planted(e=0.2))
  assert found.diagnostics['seed_noise']['lack_of_fit_p'] < 1e-6
  assert 'lack_of_fit' in {w['code'] for w in found.warnings}
  assert 'lack of fit beyond it: p =' in found.summary()
  right = law(planted(e=0.2), 'power')
  assert right.diagnostics['seed_noise']['lack_of_fit_p'] > 0.01
  assert 'lack_of_fit' not in {w['code'] for w in right.warnings}


def test_lack_of_fit_of_a_right_law_is_as_rare_as_it_says(monkeypatch):
  monkeypatch.setattr('analysis.fitting.solve._STARTS', 4)
  count = 100
  p = [law(planted(seed=s)).diagnostics['seed_noise']['lack_of_fit_p'] for s in range(count)]
  for level in (0.1, 0.5):
    assert abs(np.mean(np.array(p) < level) - level) < 4 * np.sqrt(level * (1 - level) / count)


def test_lack_of_fit_needs_least_squares_scatter_and_settings_beyond_the_constants():
  for found in (law(planted(), objective='huber'), law(planted(sd=0.0)), law(planted().head(6))):
    assert np.isnan(found.diagnostics['seed_noise']['lack_of_fit_p'])
    json.dumps(found.to_json(), allow_nan=False)


def test_resamples_draw_settings_and_then_seeds():
  label_N = np.repeat(np.arange(SETTINGS), REPEATS)
  weight_BN = resample.weights(label_N, label_N, 3, 200, np.random.default_rng(0), within=True)
  assert (weight_BN[0] == 1).all() and len(weight_BN) == 201
  drawn_BS = weight_BN[1:].reshape(200, SETTINGS, REPEATS).sum(axis=2)
  assert (drawn_BS % REPEATS == 0).all() and (drawn_BS.sum(axis=1) == SETTINGS * REPEATS).all()
  inside_BSR = weight_BN[1:].reshape(200, SETTINGS, REPEATS)
  assert (np.ptp(inside_BSR, axis=2) > 0).mean() > 0.3
  assert inside_BSR.mean() == pytest.approx(1)


def test_resamples_of_settings_hold_noise_that_seeds_share(monkeypatch):
  """Rows are three times as many as settings; counted as independent they make intervals too narrow."""
  monkeypatch.setattr('analysis.fitting.solve._STARTS', 4)
  count, hits, alone = 40, 0, 0
  for s in range(count):
    points = planted(sd=0.002, of_setting=0.02, seed=s)
    found = law(points, bootstrap=40)
    assert found.diagnostics['interval']['by'] == 'setting, then seed'
    hits += found.params['b']['low'] <= 0.4 <= found.params['b']['high']
    rows = law(points.drop(columns='seed'), bootstrap=40)
    assert rows.diagnostics['interval']['by'] == 'row'
    alone += rows.params['b']['low'] <= 0.4 <= rows.params['b']['high']
  assert hits > alone and hits >= 0.9 * count - 5 * np.sqrt(count * 0.09)


def test_replicates_are_alike_in_setting_and_learning_rate():
  points = planted().assign(setting='a', learning_rate=0.1)
  assert len(np.unique(seeds.replicates(points, ['n_latents']))) == SETTINGS
  points['learning_rate'] = np.where(points['seed'] == 0, 0.2, 0.1)
  assert len(np.unique(seeds.replicates(points, ['n_latents']))) == 2 * SETTINGS
