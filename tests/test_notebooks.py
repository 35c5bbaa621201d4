"""Every notebook runs from top to bottom as plain Python, shows what it claims, and is the same as .py and .ipynb."""

import pathlib
import re
import runpy

import jupytext
import nbformat
import numpy as np
import pytest

import analysis
from analysis.fitting import solve
from tests import planted_ledger

FOLDER = pathlib.Path(analysis.__file__).parent / 'notebooks'


@pytest.fixture(scope='module')
def ledger(tmp_path_factory):
  path = planted_ledger.write(tmp_path_factory.mktemp('notebooks'), rates=(0.3, 1.0, 3.0))
  return planted_ledger.write_penalised(path, coefficients=planted_ledger.COEFFICIENTS[:2])


@pytest.fixture
def run(monkeypatch, ledger):
  monkeypatch.setenv('SAE_LEDGER', ledger)
  monkeypatch.setenv('SAE_BOOTSTRAP', '20')
  monkeypatch.setenv('MPLBACKEND', 'Agg')
  return lambda name: runpy.run_path(str(FOLDER / f'{name}.py'))


def test_notebook_files_are_the_known_ones():
  known = {'fit_a_ledger', 'plan_next_sweep', 'refit_published'}
  assert {p.stem for p in FOLDER.glob('*.py')} == {p.stem for p in FOLDER.glob('*.ipynb')} == known


@pytest.mark.parametrize('path', sorted(FOLDER.glob('*.py')), ids=lambda path: path.stem)
def test_notebook_pair_holds_the_same_cells(path):
  script, paired = jupytext.read(path), nbformat.read(path.with_suffix('.ipynb'), as_version=4)
  nbformat.validate(paired)
  cells = [(cell.cell_type, cell.source) for cell in script.cells]
  assert len(cells) > 4
  remedy = f'run jupytext --sync {path.relative_to(FOLDER.parent.parent)}'
  assert cells == [(cell.cell_type, cell.source) for cell in paired.cells], remedy
  assert script.metadata['jupytext']['formats'] == paired.metadata['jupytext']['formats'] == 'ipynb,py:percent'
  code = [cell for cell in paired.cells if cell.cell_type == 'code']
  assert not any(cell.outputs or cell.execution_count for cell in code), 'strip the outputs'


def test_notebook_fits_a_ledger(run, capsys):
  seen = run('fit_a_ledger')
  assert seen['joint'].predict({'n_latents': 5000, 'k': 7})[0] == pytest.approx(planted_ledger.loss(5000, 7), rel=0.01)
  assert (seen['valleys']['verdict'] == 'minimum').all()
  assert seen['growth'] and seen['envelope'] and seen['rate'] and seen['budgets']  # each has its figure
  truth = planted_ledger.loss(2 * planted_ledger.SIZES[-1], planted_ledger.KS[-1])
  assert seen['found'].low < truth < seen['found'].high
  assert 'growth: converged_tokens' in capsys.readouterr().out


def test_notebook_fits_a_family_that_has_no_k(run, monkeypatch):
  monkeypatch.setenv('SAE_FAMILY', 'relu')
  monkeypatch.setenv('SAE_BOOTSTRAP', '0')
  monkeypatch.setattr(solve, '_STARTS', 16)  # these tables are easy, and starts are most of the time
  seen = run('fit_a_ledger')
  assert seen['joint'].x == ('n_latents', 'l0') and set(seen['runs']['activation']) == {'relu'}
  assert seen['envelope'] and seen['budgets'] and seen['at']['sparsity'] == planted_ledger.COEFFICIENTS[1]


def test_notebook_refits_the_published_figure(run, capsys):
  seen = run('refit_published')
  assert seen['difference'].max() < 1e-3  # our law lies on the paper's dashed curves
  (ax,) = analysis.plots.joint(seen['fit']).axes
  broad = [line for line in ax.lines if line.get_linewidth() == 6]
  assert len(broad) == seen['points']['k'].nunique() == 5  # theirs, one a k, under ours
  assert all(line.get_zorder() < min(o.get_zorder() for o in ax.lines if o not in broad) for line in broad)
  published = np.concatenate([line.get_ydata() for line in broad])
  np.testing.assert_allclose(np.sort(published), np.sort(seen['points']['paper_fit']))
  assert seen['comparison'].verdict == 'supported'
  (printed,) = re.findall(r'printed: mean error ([-+.\d]+)%', capsys.readouterr().out)
  assert float(printed) == pytest.approx(-0.9, abs=0.1)  # predicts low


def test_notebook_plans_a_sweep(run, capsys):
  plan = run('plan_next_sweep')['plan']
  assert len(plan) == 3 * len(planted_ledger.KS)
  for _, line in plan.groupby('k'):
    assert (np.diff(line['width']) > 0).all() and (np.diff(line['nmse']) < 0).all()
  shown = capsys.readouterr().out
  assert 'held out: 3' in shown and 'grows as C^' in shown
