import importlib
import json
import pathlib
import re

import numpy as np
import pandas as pd
import pytest

from analysis import fit, laws, plots, table

GAO = str(pathlib.Path(laws.__file__).parent / 'data' / 'gao2024_gpt4_L_n_k.csv')
PLOTTED = dict(
  alpha=-0.42271827, beta_k=0.2397685, beta_n=-0.02708159, gamma=-0.03828648, zeta=-1.31862432, eta=-0.0964778
)


@pytest.fixture(params=sorted(laws.LAWS))
def law(request):
  return laws.LAWS[request.param]


def test_law_gradient_is_that_of_finite_differences(law):
  rng = np.random.default_rng(0)
  u_NQ, theta_MP = rng.normal(size=(5, len(law.axes))), 0.5 * rng.normal(size=(3, len(law.names)))
  _, jacobian_MNP, _ = law.log_prediction(theta_MP, u_NQ)
  for p in range(theta_MP.shape[1]):
    step_P = 1e-6 * (np.arange(theta_MP.shape[1]) == p)
    above, below = (law.log_prediction(theta_MP + sign * step_P, u_NQ)[0] for sign in (1, -1))
    np.testing.assert_allclose(jacobian_MNP[:, :, p], (above - below) / 2e-6, atol=1e-8)


def test_law_formulas_hold_for_the_published_constants():
  x1, x2 = np.array([2.0, 5.0, 7.0]), np.array([3.0, 2.0, 11.0])
  u_NQ = np.log(np.stack([x1, x2], axis=1))
  e, a, b, c, d = 0.2, 1.5, 0.3, 0.7, 0.9
  inside = {
    'power': ([np.log(e), np.log(a), -b], e + a * x1**-b),
    'power_no_floor': ([np.log(a), -b], a * x1**-b),
    'additive2': ([np.log(e), np.log(a), -b, np.log(c), -d], e + a * x1**-b + c * x2**-d),
  }
  outside = {'power': (e, a, b), 'power_no_floor': (a, b), 'additive2': (e, a, b, c, d)}
  for name, (theta, expected) in inside.items():
    law, theta_1P = laws.LAWS[name], np.array([theta])
    np.testing.assert_allclose(np.exp(law.log_prediction(theta_1P, u_NQ)[0][0]), expected)
    np.testing.assert_allclose(law.outside(theta_1P)[0], outside[name])


def test_joint_law_draws_the_published_curves():
  points = table.read_csv(GAO)
  theta_1P = np.array([[PLOTTED[name] for name in laws.JOINT_NK.names]])
  u_NQ = np.log(table.positive(points, ['n_latents', 'k']))
  np.testing.assert_allclose(laws.JOINT_NK.log_prediction(theta_1P, u_NQ)[0][0], np.log(points['paper_fit']), atol=2e-6)


def test_printed_constants_predict_every_published_point():
  """They are another set than the plotted ones: near in what they predict, not in their values."""
  points = table.read_csv(GAO)
  printed = dict(alpha=-0.50, beta_k=0.26, beta_n=-0.017, gamma=-0.042, zeta=-1.32, eta=-0.085)
  theta_1P = np.array([[printed[name] for name in laws.JOINT_NK.names]])
  u_NQ = np.log(table.positive(points, ['n_latents', 'k']))
  ratio_N = np.exp(laws.JOINT_NK.log_prediction(theta_1P, u_NQ)[0][0]) / points['normalized_mse'].to_numpy()
  assert len(ratio_N) == 45 and np.abs(ratio_N - 1).max() < 0.03
  assert ratio_N.mean() == pytest.approx(0.991, abs=2e-3)


def test_law_starts_are_finite_and_at_the_level_of_the_data(law):
  rng = np.random.default_rng(1)
  u_NQ, v_N = rng.uniform(1, 9, size=(7, len(law.axes))), rng.normal(-2, 0.1, size=7)
  theta_MP = law.starts(u_NQ, v_N, 50, rng)
  assert theta_MP.shape == (50, len(law.names))
  f_MN, *_ = law.log_prediction(theta_MP, u_NQ)
  assert np.isfinite(f_MN).all() and abs(np.median(f_MN) - v_N.mean()) < 1


def test_a_law_is_added_by_one_file_and_its_entry(tmp_path, monkeypatch, capsys):
  """The file is the one that docs/add_a_law.md shows."""
  page = (pathlib.Path(laws.__file__).parents[1] / 'docs' / 'add_a_law.md').read_text()
  (tmp_path / 'bent.py').write_text(re.findall(r'```python\n(.*?)```', page, re.DOTALL)[0])
  monkeypatch.syspath_prepend(tmp_path)
  added = importlib.import_module('bent').BENT
  monkeypatch.setitem(laws.LAWS, added.name, added)
  n = np.geomspace(100, 10_000, 7)
  table_of = pd.DataFrame({'n_latents': n, 'nmse': 3 * n ** -(0.2 + 0.02 * np.log(n))})
  table_of.to_csv(tmp_path / 'points.csv', index=False)
  how = ['--law=bent', '--bootstrap=5', '--holdout=n_latents>5000', f'--json={tmp_path / "fit.json"}']
  with pytest.raises(SystemExit) as code:
    fit.main([str(tmp_path / 'points.csv'), *how])
  assert code.value.code == 0 and added.formula in capsys.readouterr().out
  entry = json.loads((tmp_path / 'fit.json').read_text())
  assert [p['estimate'] for p in entry['params'].values()] == pytest.approx([3, 0.2, 0.02], rel=1e-6)
  assert entry['holdout']['max_rel_err'] < 1e-6
  (ax,) = plots.power(fit.fit_law(table_of, 'bent', bootstrap=0)).axes
  assert r'n^{-(b + c \ln n)}' in ax.get_title()
