"""Several curves in one table: planted exponents and amplitudes come back, and curves that differ are told so."""

import json

import numpy as np
import pandas as pd
import pytest

import analysis
from analysis import fit, grouped, table
from sae_jax.errors import UserError

N = 2.0 ** np.arange(8, 17)
AMPLITUDES = {'small': (3.0, 0.10), 'large': (1.5, 0.05)}


def models(b=(0.4, 0.4), noise=0.0, seed=0):
  rng = np.random.default_rng(seed)
  return pd.concat(
    [
      pd.DataFrame({'model': name, 'n_latents': N, 'nmse': (e + a * N**-one) * np.exp(noise * rng.normal(size=len(N)))})
      for (name, (a, e)), one in zip(AMPLITUDES.items(), b, strict=True)
    ],
    ignore_index=True,
  )


def estimates(found):
  return {name: p['estimate'] for name, p in found.params.items()}


def test_common_exponent_and_amplitudes_of_each_are_recovered():
  found = grouped.fit_by(models(), 'model', 'power', bootstrap=0)
  truth = {'b': 0.4} | {f'{p}[{m}]': v for m, (a, e) in AMPLITUDES.items() for p, v in (('a', a), ('e', e))}
  assert estimates(found.common) == pytest.approx(truth, rel=1e-5)
  assert [one.where for one in found.fits] == [{'model': 'small'}, {'model': 'large'}]
  for one, (a, e) in zip(found.fits, AMPLITUDES.values(), strict=True):
    assert estimates(one) == pytest.approx({'a': a, 'e': e, 'b': 0.4}, rel=1e-5)


def test_one_curve_for_two_models_has_another_exponent_and_says_so():
  points = models().drop(index=[6, 7, 8, 9, 10, 11])  # the small sizes of one, the large ones of the other
  pooled = fit.fit_law(points, 'power', bootstrap=0)
  separate = grouped.fit_by(points, 'model', 'power', bootstrap=0)
  assert abs(pooled.params['b']['estimate'] - 0.4) > 0.05 and 'pooled' in {w['code'] for w in pooled.warnings}
  assert separate.common.params['b']['estimate'] == pytest.approx(0.4, rel=1e-5)
  assert 'pooled' not in {w['code'] for one in (*separate.fits, separate.common) for w in one.warnings}


def test_joint_law_of_three_models_shares_its_exponents():
  truth = dict(alpha=0.5, beta_k=0.1, beta_n=-0.1, gamma=-0.03)
  n, k = np.array([(n, k) for n in N[:6] for k in (4.0, 11.0, 41.0)]).T
  log = truth['beta_k'] * np.log(k) + truth['beta_n'] * np.log(n) + truth['gamma'] * np.log(k) * np.log(n)
  points = pd.concat(
    [
      pd.DataFrame({'layer': layer, 'n_latents': n, 'k': k, 'nmse': np.exp(0.5 - 0.2 * layer + log)})
      for layer in (1, 2, 7)
    ],
    ignore_index=True,
  )
  found = grouped.fit_by(points, 'layer', 'joint_nk_no_floor', bootstrap=0)
  levels = {f'alpha[{layer}]': 0.5 - 0.2 * layer for layer in (1, 2, 7)}
  del truth['alpha']
  assert estimates(found.common) == pytest.approx(truth | levels, rel=1e-6)
  assert found.to_json()[1]['where'] == {'layer': 2}
  at = points.tail(1).assign(**{'layer=1': 1.0, 'layer=2': 1.0, 'layer=7': np.e})
  np.testing.assert_allclose(found.common.predict(at), points['nmse'].iloc[-1], rtol=1e-6)


def test_common_exponent_is_known_better_than_each_and_its_interval_holds_the_truth():
  widths, inside, count = [], 0, 5
  for seed in range(count):
    found = grouped.fit_by(models(noise=0.005, seed=seed), 'model', 'power', bootstrap=0)
    fitted = [one.params['b'] for one in (found.common, *found.fits)]
    widths.append([p['high'] - p['low'] for p in fitted])
    inside += fitted[0]['low'] <= 0.4 <= fitted[0]['high']
  common, *own = np.mean(widths, axis=0)
  assert common < 0.85 * min(own) and inside >= 0.9 * count - 3 * np.sqrt(0.09 * count)


def test_exponents_that_differ_are_told():
  for b, differ in (((0.4, 0.4), False), ((0.4, 0.6), True)):
    found = grouped.fit_by(models(b, noise=0.002), 'model', 'power', bootstrap=30)
    assert (found.p_common < 0.05) is differ
    assert ('exponents_differ' in {w['code'] for w in found.common.warnings}) is differ
    interval = found.common.diagnostics['interval']
    assert interval['resamples'] == 30 and interval['by'] == 'row within model'
    for p in found.common.params.values():
      assert p['low'] <= p['estimate'] <= p['high']


def test_holdout_is_of_every_curve_and_of_the_common_law():
  found = grouped.fit_by(models(), 'model', 'power', bootstrap=0, holdout='n_latents>16384')
  assert [one.holdout['n_held_out'] for one in (*found.fits, found.common)] == [2, 2, 4]
  assert found.common.holdout['max_rel_err'] < 1e-6


def test_holdout_of_a_whole_curve_is_said():
  points = models().assign(n_latents=np.concatenate([N, N * 2**10]))
  found = grouped.fit_by(points, 'model', 'power_no_floor', bootstrap=0, holdout='n_latents>100000')
  assert found.fits[0].holdout is None and found.common.holdout is None
  (message,) = [w['message'] for w in found.common.warnings if w['code'] == 'no_holdout']
  assert "'n_latents>100000' holds out every row of model=large" in message


@pytest.mark.parametrize(
  ('how', 'words'),
  [
    (dict(by='site'), "no column 'site'"),
    (dict(by='n_latents'), 'a variable of the fit'),
    (dict(by='who'), '1 values, not 2 to 20'),
    (dict(by='row'), 'row=0: '),
    (dict(by='some'), 'missing in 1 rows'),
    (dict(by='few'), 'few=b: n_latents has one value'),
    (dict(by='model', holdout='nope>3'), 'names no column'),
    (dict(by='model', holdout='n_latents>1e9'), 'holds nothing out'),
  ],
)
def test_fit_by_refuses(how, words):
  points = models().assign(who='me', row=range(18), some=['a'] * 17 + [None], few=['a'] * 17 + ['b'])
  with pytest.raises(UserError, match=words) as caught:
    grouped.fit_by(points, law='power', bootstrap=0, **how)
  assert '\n' not in str(caught.value)


def test_fit_command_by_a_column_writes_a_list(tmp_path, capsys):
  models(noise=0.002).to_csv(tmp_path / 't.csv', index=False)
  out = tmp_path / 'fits.json'
  arguments = [str(tmp_path / 't.csv'), '--law=power', '--x=n_latents', '--bootstrap=5', f'--json={out}']
  with pytest.raises(SystemExit) as code:
    fit.main(arguments)
  assert code.value.code == 0 and 'warning: pooled: model tells apart' in capsys.readouterr().out
  assert isinstance(json.loads(out.read_text()), dict)
  with pytest.raises(SystemExit) as code:
    fit.main([*arguments, '--by=model'])
  assert code.value.code == 0
  printed = capsys.readouterr().out
  small, large, common = json.loads(out.read_text(), parse_constant=pytest.fail)
  assert (small['where'], large['where'], common['by']) == ({'model': 'small'}, {'model': 'large'}, 'model')
  assert set(common['params']) == set(common['meaning']) == {'e[small]', 'e[large]', 'a[small]', 'a[large]', 'b'}
  assert common['x'] == ['n_latents'] and common['n_points'] == 18 and 0 <= common['p_common'] <= 1
  assert 'L(n), model = small' in printed and 'a[large]' in printed and 'pooled' not in printed


def test_names_of_a_notebook_are_there():
  assert analysis.fit_by is grouped.fit_by and analysis.read_csv is table.read_csv
