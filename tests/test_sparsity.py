"""Rows belong together by family and target, which is a k or, lacking one, a coefficient."""

import numpy as np
import pandas as pd
import pytest

from analysis import convergence, doubts, fit, learning_rate, seeds, sparsity, table
from sae_jax.errors import UserError

NAN = np.nan


def rows(**columns):
  """Four cells of two families: one asked for two k, the other for two coefficients."""
  return pd.DataFrame(
    {
      'id': list('abcd'),
      'activation': ['one', 'one', 'two', 'two'],
      'n_latents': 64,
      'k': [7, 3, NAN, NAN],
      'sparsity': [NAN, NAN, 0.5, 0.05],
      'l0': [7.0, 3.0, 2.0, 9.0],
      'learning_rate': 1e-3,
      'nmse': [0.2, 0.3, 0.4, 0.25],
    }
    | columns
  )


def test_targets_are_each_said_once_k_first():
  twice = pd.concat([rows(), rows()])
  assert sparsity.targets(twice) == [{'k': 3}, {'k': 7}, {'sparsity': 0.05}, {'sparsity': 0.5}]
  assert [type(value) for target in sparsity.targets(twice) for value in target.values()] == [int, int, float, float]
  assert sparsity.targets(twice.drop(columns=['k', 'sparsity'])) == []
  assert [sparsity.named(rows(), row) for row in rows().to_dict('records')][1:3] == ['one, k=3', 'two, sparsity=0.5']
  assert sparsity.named(rows()[:2], rows().loc[1].to_dict()) == 'k=3'  # one family: its name says nothing
  assert sparsity.at(rows(), {'activation': 'two', 'sparsity': 0.05})['id'].tolist() == ['d']


@pytest.mark.parametrize(
  'change', [{'sparsity': NAN}, {'sparsity': 0.0}, {'k': [7, 0, NAN, NAN]}, {'k': [7, -3, NAN, NAN]}]
)
def test_a_row_without_a_target_is_named(change):
  sparsity.check(rows())
  with pytest.raises(UserError, match=r'k=(nan|0\.0|-3\.0) in row [23] .* a column sparsity; correct that row'):
    sparsity.check(rows(**change))
  with pytest.raises(UserError, match='row 3'):
    sparsity.check(rows().drop(columns='sparsity'))


def test_the_best_learning_rate_is_of_one_family_and_target():
  other = rows(learning_rate=2e-3, id=list('efgh'), nmse=[0.1, 0.4, 0.3, 0.3])
  best = table.best_learning_rate(pd.concat([rows(), other], ignore_index=True))
  assert sorted(best['id']) == ['b', 'd', 'e', 'g']
  (edge,) = (w['message'] for w in best.attrs['warnings'])
  assert 'n=64, two, sparsity=0.05: 0.001 is the lowest of 2' in edge and 'n=64, one, k=3' in edge
  found = learning_rate.valleys(pd.concat([rows(), other], ignore_index=True))
  assert found['rates'].tolist() == [2] * 4 and found['sparsity'].notna().sum() == 2


def test_loss_must_fall_with_k_and_with_a_smaller_coefficient():
  assert convergence.risen_cells(rows()) == []
  assert convergence.risen_cells(rows(nmse=[0.3, 0.2, 0.25, 0.4])) == [
    'a (n=64: 0.3 at k=7, 0.2 at k=3)',
    'd (n=64: 0.4 at sparsity=0.05, 0.25 at sparsity=0.5)',
  ]
  # At a fixed coefficient a larger autoencoder may choose to be sparser, and at a fixed k it may not be worse.
  larger = rows(n_latents=128, nmse=[0.25, 0.35, 0.45, 0.3], id=list('efgh'))
  risen = convergence.risen_cells(pd.concat([rows(), larger], ignore_index=True))
  assert risen == ['f (one, k=3: 0.35 at n=128, 0.3 at n=64)', 'e (one, k=7: 0.25 at n=128, 0.2 at n=64)']
  (warned,) = convergence.risen_warnings(rows(nmse=[0.2, 0.3, 0.25, 0.4])[2:])
  assert warned['message'].startswith('loss must fall with a smaller coefficient, and does not at d')


def repeats(setting=True):
  """A law over n and L0 through three coefficients and two seeds, whose L0 no two cells share."""
  rng = np.random.default_rng(0)
  made = []
  for n in (64, 128, 256, 512):
    for coefficient in (0.01, 0.03, 0.1):
      for seed in (0, 1):
        l0 = coefficient**-0.6 * np.exp(0.02 * rng.normal())
        nmse = 2 * n**-0.3 * l0**-0.2 * np.exp(0.03 * rng.normal())
        made.append({'n_latents': n, 'sparsity': coefficient, 'l0': l0, 'seed': seed, 'nmse': nmse})
  out = pd.DataFrame(made).assign(k=NAN, activation='two')
  out['target'] = [f'sparsity={value:g}' for value in out['sparsity']]
  return (
    out.assign(setting=[f'{n}{c}' for n, c in zip(out['n_latents'], out['sparsity'], strict=True)]) if setting else out
  )


def test_seeds_are_repeats_of_a_setting_though_they_measure_another_l0():
  x = ['n_latents', 'l0']
  index_N = seeds.replicates(repeats(), x)
  assert index_N is not None and np.bincount(index_N).tolist() == [2] * 12
  assert seeds.replicates(repeats(setting=False), x) is None  # nothing says which rows repeat which
  found = fit.fit_law(repeats(), 'joint_nk_no_floor', x, bootstrap=0)
  assert found.diagnostics['seed_noise']['freedom'] == 12


def test_a_law_over_l0_is_not_said_to_pool_what_was_asked_for():
  bent = repeats()
  bent['nmse'] *= np.exp(0.3 * (np.log(bent['l0']) - 2) ** 2)  # what the law leaves over goes with the coefficient
  found = fit.fit_law(bent, 'joint_nk_no_floor', ['n_latents', 'l0'], bootstrap=0)
  assert not {'pooled', 'equal_x'} & {w['code'] for w in found.warnings}
  pooled = doubts.of_residuals(bent, found.law, ['n_latents'], 'nmse', found.residuals(), None)
  assert 'sparsity' in pooled[0]['message']  # a law over n alone does pool them


def test_two_families_in_one_fit_are_said_to_be_pooled():
  two = pd.concat([repeats(), repeats().assign(activation='three', nmse=repeats()['nmse'] * 1.5)], ignore_index=True)
  found = fit.fit_law(two, 'joint_nk_no_floor', ['n_latents', 'l0'], bootstrap=0)
  (pooled,) = (w['message'] for w in found.warnings if w['code'] == 'pooled')
  assert pooled.startswith('activation ') and '--by=activation' in pooled


def test_a_law_over_l0_speaks_of_l0():
  found = fit.fit_law(repeats(), 'joint_nk', ['n_latents', 'l0'], bootstrap=0)
  assert found.label == 'L(n, L0)' and found.to_json()['x'] == ['n_latents', 'l0']
  assert found.to_json()['formula'].startswith('L(n,L0) = exp(alpha + beta_k ln L0 + beta_n ln n')
  assert found.to_json()['meaning']['eta'] == 'exponent of L0 in the irreducible loss'
  assert 'ln L0' in found.summary() and ' k' not in found.summary().splitlines()[1]
