import numpy as np
import pandas as pd
import pytest

from analysis import family
from sae_jax.errors import UserError


def planted(exponents=(0.2, 0.2, 0.2), noise=0.01, seed=0, floor=0.0):
  rng = np.random.default_rng(seed)
  n = 2.0 ** np.arange(7, 14)
  return pd.concat(
    [
      pd.DataFrame(
        {
          'subject': f's{i}',
          'n_latents': n,
          'nmse': (floor * (1 + i) + (1 + i) * n**-b) * np.exp(noise * rng.normal(size=len(n))),
        }
      )
      for i, b in enumerate(exponents)
    ],
    ignore_index=True,
  )


def test_family_recovers_separate_exponents():
  truth = [0.30, 0.22, 0.17]
  found = family.fit_family(planted(truth))
  rows = found.exponents()
  assert found.verdict == 'separate' and rows['subject'].tolist() == ['s0', 's1', 's2']
  np.testing.assert_allclose(rows['exponent'], truth, atol=0.01)


def test_family_intervals_hold_the_exponents_at_the_nominal_rate():
  truth, count = np.array([0.30, 0.22, 0.17]), 40
  frames = [family.fit_family(planted(truth, seed=s)).exponents() for s in range(count)]
  hits = sum(int(((f['low'].to_numpy() < truth) & (truth < f['high'].to_numpy())).sum()) for f in frames)
  assert abs(hits - 0.9 * 3 * count) <= 5 * np.sqrt(3 * count * 0.09)


def test_family_with_a_floor_recovers_separate_exponents():
  truth = (0.5, 0.35)
  rows = family.fit_family(planted(truth, noise=0.0, floor=0.05), floor=True).exponents()
  np.testing.assert_allclose(rows['exponent'], truth, rtol=1e-3)


def test_family_calls_a_common_exponent_separate_as_rarely_as_it_says():
  wrong = sum(family.fit_family(planted(seed=s)).verdict == 'separate' for s in range(40))
  assert wrong <= 40 * 0.05 + 5 * np.sqrt(40 * 0.05 * 0.95)
  assert family.fit_family(planted()).common.params['b']['estimate'] == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
  ('points', 'by', 'words'),
  [
    (planted(), 'model', "'model'"),
    (planted((0.2,)), 'subject', '1 value'),
    (planted().iloc[:-6], 'subject', "'s2' has 1 sizes"),
    (planted().assign(subject=[None] + ['a', 'b'] * 10), 'subject', 'missing in 1'),
    (planted().assign(nmse=0.0), 'subject', 'nmse=0'),
  ],
)
def test_family_refuses(points, by, words):
  with pytest.raises(UserError, match=words) as caught:
    family.fit_family(points, by)
  assert '\n' not in str(caught.value)
