"""The batched solver against a slow reference from scipy."""

import pathlib

import numpy as np
import pytest
from scipy import optimize

from analysis import laws, table
from analysis.fitting import solve

GAO = str(pathlib.Path(laws.__file__).parent / 'data' / 'gao2024_gpt4_L_n_k.csv')


@pytest.fixture(scope='module')
def gao():
  points = table.read_csv(GAO)
  return np.log(table.positive(points, ['n_latents', 'k'])), np.log(points['normalized_mse'].to_numpy())


def test_solver_finds_the_optimum_of_a_variable_projection(gao):
  """The reference searches the exponents only; for each, the amplitudes (alpha, zeta) are solved inside."""
  u_NQ, v_N = gao
  exponents = [laws.JOINT_NK.names.index(name) for name in ('beta_k', 'beta_n', 'gamma', 'eta')]
  amplitudes = [laws.JOINT_NK.names.index(name) for name in ('alpha', 'zeta')]
  warm_2 = np.array([-0.4, -1.3])

  def full(outer_4, inner_2):
    theta_P = np.empty(6)
    theta_P[exponents], theta_P[amplitudes] = outer_4, inner_2
    return theta_P

  def projected(outer_4):
    inner = optimize.least_squares(
      lambda a: solve.at(laws.JOINT_NK, full(outer_4, a), u_NQ, v_N)[0],
      warm_2,
      lambda a: solve.at(laws.JOINT_NK, full(outer_4, a), u_NQ, v_N)[1][:, amplitudes],
      xtol=1e-14,
      ftol=1e-14,
      gtol=1e-14,
    )
    return inner.fun

  reference = optimize.least_squares(
    projected, [0.2, -0.05, -0.03, -0.1], x_scale='jac', xtol=1e-12, ftol=1e-12, gtol=1e-12
  )
  theta_P, value, *_ = solve.estimate(laws.JOINT_NK, u_NQ, v_N, np.ones(45), np.inf, np.random.default_rng(0))
  assert value == pytest.approx(reference.cost, rel=1e-6)
  np.testing.assert_allclose(theta_P[exponents], reference.x, rtol=1e-3)


def test_solver_keeps_what_is_not_free(gao):
  u_NQ, v_N = gao
  start_1P = laws.JOINT_NK.starts(u_NQ, v_N, 1, np.random.default_rng(0))
  free_1P = np.array([[1.0, 0, 1, 1, 1, 0]])
  theta_1P, (value,) = solve.constrained(laws.JOINT_NK, u_NQ, v_N, start_1P, free_1P)
  assert (theta_1P[:, [1, 5]] == start_1P[:, [1, 5]]).all()
  residual_N, jacobian_NP = solve.at(laws.JOINT_NK, theta_1P[0], u_NQ, v_N)
  assert value == pytest.approx(residual_N @ residual_N / 2)
  gradient_P = residual_N @ jacobian_NP / np.linalg.norm(jacobian_NP, axis=0) / np.linalg.norm(residual_N)
  assert np.abs(gradient_P[[0, 2, 3, 4]]).max() < 1e-4


def test_narrow_curved_valley_takes_few_steps(monkeypatch):
  """Steps of the first order alone crawl along it: after 120 of them no start has arrived."""
  monkeypatch.setattr(solve, '_STEPS', 120)
  n_N = np.geomspace(1024, 32768, 6)
  v_N = np.log((0.24 + 0.85 * n_N**-0.069) * np.exp(0.001 * np.random.default_rng(0).normal(size=6)))
  law = laws.LAWS['power']
  _, _, agree, _ = solve.estimate(law, np.log(n_N)[:, None], v_N, np.ones(6), np.inf, np.random.default_rng(0))
  assert agree == 1
