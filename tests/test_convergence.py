import numpy as np
import pandas as pd
import pytest

from analysis import convergence
from sae_jax.errors import UserError

P, C = 0.6, 40.0


def planted(sizes=(512, 1024, 2048, 4096, 8192), slow=(), noise=0.0):
  """Curves e + excess/T whose doubling improves by less than 1 % from exactly T = C n^P on."""
  rng = np.random.default_rng(0)
  frames = []
  for n in sizes:
    when = C * n**P
    # 1 - L(2T)/L(T) with L = 1 + g/T is (g/2T) / (1 + g/T); it is eps at T = g (1/2 - eps) / eps.
    scale = when * 0.01 / 0.49
    tokens = np.geomspace(when / 100, when * (1.5 if n in slow else 30), 60)
    loss = 0.2 * (1 + scale / tokens) * np.exp(noise * rng.normal(size=60))
    frames.append(
      pd.DataFrame({'id': f'n{n}', 'state': 'done', 'n_latents': n, 'k': 3, 'tokens': tokens, 'nmse': loss})
    )
  return pd.concat(frames, ignore_index=True)


def test_tokens_to_convergence_are_those_of_the_criterion():
  found = convergence.tokens_to_convergence(planted())
  np.testing.assert_allclose(found['converged_tokens'], C * found['n_latents'] ** P, rtol=0.02)
  assert (found['reason'] == '').all()


def test_tokens_to_convergence_grow_as_planted():
  fit = convergence.fit_convergence(planted(noise=2e-5), bootstrap=50)
  assert fit.params['p']['estimate'] == pytest.approx(P, abs=0.05)
  assert fit.params['p']['low'] <= P <= fit.params['p']['high']


def test_runs_that_do_not_converge_are_named_and_left_out():
  curves = planted(slow=(8192,))
  unfinished = planted((16384,)).assign(state='unfinished')
  flat = pd.DataFrame(
    {
      'id': 'flat',
      'state': 'done',
      'n_latents': 256,
      'k': 3,
      'tokens': [1.0, 4.0, 16.0],
      'nmse': 0.5,
    }
  )
  curves = pd.concat([curves, unfinished, flat], ignore_index=True)
  fit = convergence.fit_convergence(curves, bootstrap=0)
  assert sorted(fit.table['n_latents']) == [512, 1024, 2048, 4096]
  (warning,) = (w for w in fit.warnings if w['code'] == 'not_converged')
  assert 'n8192 (still improved by' in warning['message'] and 'flat (converged before' in warning['message']
  assert fit.params['p']['estimate'] == pytest.approx(P, abs=0.02)


def test_a_run_whose_l0_still_moves_has_not_converged():
  curves = planted((512, 1024))
  steps = curves.groupby('id')['tokens'].rank()
  # Of one the L0 stands still from the 45th measurement on, of the other it falls to the end, by 8 % a doubling.
  still, falling = np.where(steps < 45, 54 - steps, 9.0), 90 * np.exp(-0.08 * np.log2(curves['tokens']))
  found = convergence.tokens_to_convergence(curves.assign(l0=np.where(curves['id'] == 'n512', still, falling)))
  found = found.set_index('id')
  at = curves[(curves['id'] == 'n512') & (steps == 45)]['tokens'].iloc[0]
  assert found['converged_tokens']['n512'] == pytest.approx(at, rel=0.1) and at > 3 * C * 512**P
  assert found['reason'].to_dict() == {'n512': '', 'n1024': 'its L0 still moved by 8.33% over its last doubling'}
  unknown = convergence.tokens_to_convergence(curves.assign(l0=np.nan))
  pd.testing.assert_frame_equal(unknown, convergence.tokens_to_convergence(curves))


def test_a_plateau_in_the_middle_is_not_convergence():
  tokens = 2.0 ** np.arange(20)
  loss = np.concatenate([np.full(8, 0.9), np.geomspace(0.8, 0.3, 4), np.full(8, 0.3)])
  run = pd.DataFrame({'id': 'a', 'n_latents': 2, 'k': 1, 'tokens': tokens, 'nmse': loss})
  (converged,) = convergence.tokens_to_convergence(run)['converged_tokens']
  assert 2.0**10 <= converged <= 2.0**11


def test_unconverged_runs_are_warned_of():
  curves = planted(slow=(8192,))
  (warning,) = convergence.unconverged_warnings(curves, curves['id'].drop_duplicates())
  assert warning['code'] == 'still_improving' and '1 of 5' in warning['message']
  assert convergence.unconverged_warnings(curves, pd.Series(['n512'])) == []


@pytest.mark.parametrize(
  ('curves', 'eps', 'words'),
  [
    (planted(slow=(512, 1024, 2048, 4096)), 0.01, '1 of 5 runs converged'),
    (planted(), 0.0, 'eps=0'),
    (planted(), float('nan'), 'eps=nan'),
    (planted().drop(columns='k'), 0.01, "'k'"),
    (planted().head(0), 0.01, '0 of 0'),
  ],
)
def test_fit_convergence_refuses(curves, eps, words):
  with pytest.raises(UserError, match=words) as caught:
    convergence.fit_convergence(curves, eps)
  assert '\n' not in str(caught.value)
