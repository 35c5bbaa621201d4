import numpy as np
import pandas as pd
import pytest

from analysis import frontier, plots
from sae_jax.errors import UserError

E, A, B = 0.1, 4.0, 0.2
SIZES = [2**i for i in range(6, 12)]


def planted(sizes=SIZES, noise=0.0, seeds=(0,), points=17):
  """Runs whose curves touch L(C) = E + A C^-B at the compute that suits their size, and lie above it elsewhere."""
  rng = np.random.default_rng(0)
  frames = []
  for n in sizes:
    for seed in seeds:
      best = n * 1e6
      compute = best * np.geomspace(1 / 11, 5, points)
      compute[points // 2] = best
      compute.sort()
      loss = (E + A * compute**-B) * np.exp(0.02 * np.log(compute / best) ** 2 + noise * abs(rng.normal()))
      frames.append(
        pd.DataFrame(
          {
            'id': f'{n}.{seed}',
            'state': 'done',
            'n_latents': float(n),
            'k': 3.0,
            'step': np.arange(points),
            'flops_useful': compute,
            'flops_dense': 6 * compute,
            'nmse': loss,
          }
        )
      )
  return pd.concat(frames, ignore_index=True)


def test_envelope_is_the_running_minimum():
  curves = planted()
  found = frontier.envelope(curves, burn_in=0.0)
  for compute, loss in zip(found['flops_useful'], found['nmse'], strict=True):
    assert loss == curves.loc[curves['flops_useful'] <= compute, 'nmse'].min()
  assert (np.diff(found['nmse']) < 0).all()


def test_envelope_uses_only_compute_that_two_sizes_have_seen():
  curves = planted()
  found = frontier.envelope(curves, burn_in=0.0)
  first = curves.groupby('n_latents')['flops_useful'].min().sort_values().iloc[1]
  last = curves.groupby('n_latents')['flops_useful'].max().sort_values().iloc[-2]
  assert found['used'].tolist() == [first <= c <= last for c in found['flops_useful']]
  assert not found['used'].all() and found['used'].any()
  twice = frontier.envelope(pd.concat([planted([64]), planted([64]).assign(id='again')]))
  assert not twice['used'].any()  # two runs of one size are no choice of a size


def test_envelope_leaves_out_the_first_steps():
  curves = planted()
  lucky = curves['flops_useful'] == curves.loc[curves['n_latents'] == SIZES[-1], 'flops_useful'].min()
  curves.loc[lucky, 'nmse'] = 0.01  # the loss of an initialisation
  assert frontier.envelope(curves, burn_in=0.0)['nmse'].min() == 0.01
  assert frontier.envelope(curves)['nmse'].min() > E


def test_fit_frontier_recovers_a_planted_law():
  found = frontier.fit_frontier(planted(points=201), bootstrap=30)
  assert found.params['b']['estimate'] == pytest.approx(B, rel=0.15)
  compute = np.geomspace(SIZES[0], SIZES[-1], 9) * 1e6
  np.testing.assert_allclose(found.predict({'flops_useful': compute}), E + A * compute**-B, rtol=0.01)
  assert found.diagnostics['interval']['by'] == 'run'
  dense = frontier.fit_frontier(planted(points=201), 'flops_dense', bootstrap=0)
  assert dense.params['b']['estimate'] == pytest.approx(found.params['b']['estimate'], rel=1e-4)


def test_fit_frontier_resamples_runs_so_that_more_points_are_no_more_evidence():
  few, many = (
    frontier.fit_frontier(planted(points=p, noise=0.05, seeds=(0, 1)), bootstrap=100).params['b'] for p in (41, 161)
  )
  assert many['high'] - many['low'] > 0.6 * (few['high'] - few['low'])


def test_fit_frontier_predicts_compute_it_did_not_see():
  curves = planted(points=101)
  bound = 2**9.5 * 1e6
  found = frontier.fit_frontier(curves, bootstrap=0, holdout=f'flops_useful>{bound}')
  assert found.holdout['n_held_out'] == (found.table['flops_useful'] > bound).sum() > 0
  assert found.holdout['max_rel_err'] < 0.02


def test_fit_frontier_leaves_out_unfinished_runs_and_says_so():
  curves = planted(points=41)
  bad = planted([1024], points=41).assign(id='running', state='unfinished', nmse=0.001)
  found = frontier.fit_frontier(pd.concat([curves, bad], ignore_index=True), bootstrap=0)
  assert 'running' not in set(found.table['id'])
  assert 'cells_missing' in {w['code'] for w in found.warnings}


def test_fit_frontier_flags_one_run_and_an_edge_of_the_sweep():
  curves = planted([64, 128], points=41)
  curves.loc[curves['n_latents'] == 128, 'nmse'] *= 0.5
  codes = {w['code'] for w in frontier.fit_frontier(curves, bootstrap=0).warnings}
  assert {'one_run_dominates', 'edge_minimum'} <= codes
  assert not {'one_run_dominates', 'edge_minimum'} & {
    w['code'] for w in frontier.fit_frontier(planted(points=41), bootstrap=0).warnings
  }


@pytest.mark.parametrize(
  ('curves', 'words'),
  [
    (planted([64]), '0 points'),
    (planted().assign(state='failed'), 'no finished run'),
    (planted().assign(nmse=np.nan), 'no finished run'),
    (planted().drop(columns='flops_useful'), 'flops_useful'),
  ],
)
def test_fit_frontier_refuses(curves, words):
  with pytest.raises(UserError, match=words):
    frontier.fit_frontier(curves, bootstrap=0)


def test_frontier_figure_shows_every_run_and_the_law():
  curves = planted()
  found = frontier.fit_frontier(curves, bootstrap=20)
  (ax,) = plots.frontier(found, curves).axes
  assert ax.get_xscale() == ax.get_yscale() == 'log'
  assert 'FLOPs' in ax.get_xlabel() and 'MSE' in ax.get_ylabel()
  assert len(ax.lines) >= curves['id'].nunique() + 3
