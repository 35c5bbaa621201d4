"""Every figure shows its points, its law, what was refused and why, and its warnings; none breaks on hostile names."""

import dataclasses
import io

import numpy as np
import pandas as pd
import pytest

from analysis import family, fit, frontier, isoflop, learning_rate, plots
from analysis.figures import style
from sae_jax.errors import UserError
from tests import full_ledger


@pytest.fixture(scope='module')
def found():
  return full_ledger.findings()


def drawn(figure):
  """Draws, so that bad mathtext, empty layouts and missing glyphs show; returns every visible text."""
  figure.savefig(io.BytesIO(), format='png', dpi=40)
  texts = [t for ax in figure.axes for t in (ax.title, ax.xaxis.label, ax.yaxis.label, *ax.texts)]
  texts += [t for box in figure.legends for t in box.get_texts()] + figure.texts + [figure._supxlabel]
  return '\n'.join(t.get_text() for t in texts if t)


def runs(sizes=(100, 200, 400, 800, 1600), b=3e5, tokens=1e7):
  """Curves of L = 0.1 + 4 n^-0.5 + b T^-0.5: a valley over n at equal n T."""
  frames = []
  for n in sizes:
    t = np.geomspace(1e3, tokens, 40)
    nmse = 0.1 + 4 * n**-0.5 + b**0.5 * t**-0.5
    frames.append(
      pd.DataFrame({'id': f'n{n}', 'state': 'done', 'n_latents': n, 'k': 5, 'flops_useful': n * t, 'nmse': nmse})
    )
  return pd.concat(frames, ignore_index=True)


def predictions(**change):
  frame = pd.DataFrame(
    {
      'n_latents': [128, 256, 128, 256],
      'k': [3, 3, 7, 7],
      'predicted': [0.3, 0.25, 0.2, 0.15],
      'low': [0.28, 0.24, 0.19, 0.14],
      'high': [0.32, 0.26, 0.21, 0.16],
      'measured': [0.31, 0.25, 0.2, 0.17],
    }
  )
  return frame.assign(**change)


def test_frontier_figure_shows_runs_envelope_law_band_and_dashed_extrapolation(found):
  one = found.families[0].targets[0].frontier
  mine = found.curves[found.curves['k'] == one.where['k']]
  (ax,) = plots.frontier(one, mine).axes
  thin = [line for line in ax.lines if line.get_linewidth() < 1 and line.get_marker() == 'None']
  assert len(thin) == mine['id'].nunique()
  solid, dashed = ([ln for ln in ax.lines if ln.get_linestyle() == s and ln.get_linewidth() > 1] for s in ('-', '--'))
  assert len(solid) == len(dashed) == 1
  assert solid[0].get_xdata()[-1] == pytest.approx(one.table['flops_useful'].max())  # no data, no solid line
  assert dashed[0].get_xdata()[0] == pytest.approx(solid[0].get_xdata()[-1])
  assert len(ax.collections) == 2  # the band over the data and beyond
  envelope = frontier.envelope(mine)
  points = sum(len(line.get_xdata()) for line in ax.lines if line.get_marker() != 'None')
  assert points == len(one.table) + (~envelope['used']).sum()


def test_frontier_figure_of_a_joint_fit_shows_its_cells(found):
  (ax,) = plots.frontier(found.families[0].joint).axes
  assert sum(line.get_marker() not in ('None', None) for line in ax.lines) == len(full_ledger.KS)
  with pytest.raises(UserError, match='flops_useful'):
    plots.frontier(
      dataclasses.replace(found.families[0].joint, table=found.families[0].joint.table.drop(columns='flops_useful'))
    )


def test_every_figure_of_a_fit_names_units_law_and_warnings(found):
  one = found.families[0].targets[0]
  warned = one.power.warned({'code': 'asymptote_not_identified', 'message': 'x'})
  for figure, words in (
    (plots.power(warned), ('latents n', 'normalised MSE', '$L(n) = e', '! asymptote not identified')),
    (
      plots.joint(found.families[0].joint.warned(*warned.warnings)),
      ('latents n', r'\alpha', '! asymptote not identified'),
    ),
    (plots.residuals(found.families[0].joint.warned(*warned.warnings)), ('in %', '! asymptote not identified')),
    (
      plots.growth(one.converged.warned(*warned.warnings)),
      ('tokens to convergence T', '$T(n) = c', '! asymptote'),
    ),
    (
      plots.allocation(one.tokens.warned(*warned.warnings), found.families[0].cost),
      ('training tokens T', 'C^{\\,p}', '! asymptote'),
    ),
    (
      plots.learning_rates(one.rates, one.learning_rate, ['few_points']),
      ('learning rate', r'$\eta(n) = a', '! few points'),
    ),
    (plots.isoflop(*one.profiles, {'k': 3}, ['few_points']), ('latents n', '$k$ = 3', '! few points')),
    (plots.family(one.subjects, ['few_points']), ('latents n', 'planted-a', 'planted-b', '! few points')),
  ):
    shown = drawn(figure)
    assert all(word in shown for word in words), (words, shown)


def test_warning_codes_say_for_which_k(found):
  first, second = (one.power for one in found.families[0].targets)
  doubt = {'code': 'few_points', 'message': ''}
  assert style.codes([first.warned(doubt), second]) == [f'few_points (k = {first.where["k"]:g})']
  assert style.codes([first.warned(doubt), second.warned(doubt)]) == ['few_points']


def test_isoflop_figure_marks_minima_and_says_why_budgets_are_refused():
  budgets = [8.5e8, 1e9, 2e9, 4e9]
  points, best = isoflop.profiles(runs(), budgets)
  verdicts = best['verdict'].tolist()
  assert {'minimum', 'edge'} <= set(verdicts)
  figure = plots.isoflop(points, best)
  (ax,) = figure.axes
  marks = [line for line in ax.lines if line.get_marker() == '|' and line.get_color() == 'black']
  minima = best[best['verdict'] == 'minimum']
  np.testing.assert_allclose([m.get_xdata()[0] for m in marks], minima['n_latents'])
  np.testing.assert_allclose([m.get_ydata()[0] for m in marks], minima['nmse'])
  shown = ' '.join(drawn(figure).split())
  for reason in best.loc[best['verdict'] != 'minimum', 'reason']:
    assert reason in shown
  assert f'{verdicts.count("edge")} of 4 budgets refused: edge' in shown
  dotted = [line for line in ax.lines if line.get_linestyle() == ':']
  assert len(dotted) == len(best) - len(minima)
  refused = best[best['verdict'] != 'minimum']
  assert 'least loss of the parabola' in shown
  assert 'least loss of the parabola' not in drawn(plots.isoflop(points, refused))  # nothing is marked so


def test_growth_figure_of_best_sizes_crosses_out_refused_budgets():
  budgets = [8.5e8, 1e9, 2e9, 4e9]
  fitted = isoflop.fit_best_size(runs(), budgets, bootstrap=0)
  assert 4e9 not in fitted.table['budget'].to_numpy()
  figure = plots.growth(fitted, refused=[4e9])
  (ax,) = figure.axes
  crosses = [line for line in ax.lines if line.get_marker() == 'x']
  assert [line.get_xdata().tolist() for line in crosses] == [[4e9]]
  assert '$n_{\\mathrm{opt}}(C) = c' in drawn(figure)


def test_learning_rate_figure_refuses_a_size_whose_best_rate_is_at_the_edge(found):
  cells = found.families[0].targets[0].rates
  largest = cells['n_latents'].max()
  cut = cells[(cells['n_latents'] < largest) | (cells['learning_rate'] < cells['learning_rate'].median())]
  cut = cut[(cut['n_latents'] < largest) | (cut['nmse'] > cells.loc[cells['n_latents'] == largest, 'nmse'].min())]
  fitted = learning_rate.fit_learning_rate(cut, bootstrap=0)
  figure = plots.learning_rates(cut, fitted)
  left, right = figure.axes
  shown = drawn(figure)
  assert f'$n$ = {largest:g}: refused' in shown and '1 of 6 sizes refused' in shown
  assert sum(line.get_marker() == '|' and line.get_color() == 'black' for line in left.lines) == 5
  (cross,) = (line for line in right.lines if line.get_marker() == 'x')
  assert cross.get_xdata().tolist() == [largest]
  assert len(plots.learning_rates(cut).axes) == 1  # valleys alone where there is no law


def test_family_figure_draws_every_subject_and_survives_its_name():
  n = 2.0 ** np.arange(7, 12)
  names = ['a$b^{c', '<b>&\n\\frac', 'x' * 300]
  points = pd.concat(
    [pd.DataFrame({'subject': s, 'n_latents': n, 'nmse': (i + 1) * n**-0.2}) for i, s in enumerate(names)]
  )
  found = family.fit_family(points.reset_index(drop=True))
  figure = plots.family(found)
  (ax,) = figure.axes
  drawn(figure)
  marked = [line for line in ax.lines if line.get_marker() != 'None']
  assert len(marked) == 3
  for i, line in enumerate(marked):
    mine = points[points['subject'] == found.subjects[i]]
    np.testing.assert_allclose(line.get_ydata(), mine['nmse'])


def test_growth_figure_of_downstream_loss_extrapolates_towards_better_autoencoders():
  nmse = np.geomspace(0.05, 0.5, 7)
  fitted = fit.fit_law(
    pd.DataFrame({'nmse': nmse, 'loss $increase_{': 3 * nmse**1.4}),
    'growth',
    ['nmse'],
    'loss $increase_{',
    bootstrap=0,
  )
  figure = plots.growth(fitted)
  assert 'NMSE' in drawn(figure)
  (ax,) = figure.axes
  (dashed,) = (line for line in ax.lines if line.get_linestyle() == '--')
  assert max(dashed.get_xdata()) == pytest.approx(nmse.min())


def test_calibration_figure_counts_what_is_inside():
  figure = plots.calibration(predictions())
  left, right = figure.axes
  assert '3 of 4' in figure.get_suptitle()
  assert '%' in right.get_ylabel() and 'measured' in left.get_xlabel()
  shown = drawn(figure)
  assert '$k$ = 3: 2 of 2 inside' in shown and '$k$ = 7: 1 of 2 inside' in shown
  hollow = [line for line in left.lines if line.get_markerfacecolor() == 'white' and len(line.get_xdata())]
  assert [line.get_xdata().tolist() for line in hollow] == [[0.17]]  # what missed its interval looks different


@pytest.mark.parametrize('change', [{'measured': np.nan}, {'low': -0.1}])
def test_calibration_figure_refuses(change):
  with pytest.raises(UserError, match=next(iter(change))):
    plots.calibration(predictions(**change))


def test_allocation_figure_is_solid_only_inside_the_data(found):
  one = found.families[0].targets[0]
  (ax,) = plots.allocation(one.tokens, found.families[0].cost).axes
  solid = next(line for line in ax.lines if line.get_linestyle() == '-' and line.get_linewidth() == 2)
  n, t = solid.get_xdata(), solid.get_ydata()
  assert n.min() >= min(full_ledger.SIZES) and n.max() <= max(full_ledger.SIZES)
  assert t.min() >= min(full_ledger.TOKENS) and t.max() <= max(full_ledger.TOKENS)
  ratio = full_ledger.BETA * full_ledger.B * t**-full_ledger.BETA
  np.testing.assert_allclose(full_ledger.ALPHA * full_ledger.A * n**-full_ledger.ALPHA, ratio, rtol=0.2)  # the optimum
  with pytest.raises(UserError, match='n_latents and tokens'):
    plots.allocation(found.families[0].joint, found.families[0].cost)


def test_colours_stay_apart_in_grey():
  for count in (2, 4, 6):
    rgb = [style.look(i, count)[0] for i in range(count)]
    grey = [0.299 * int(c[1:3], 16) + 0.587 * int(c[3:5], 16) + 0.114 * int(c[5:7], 16) for c in rgb]
    assert min(np.diff(grey)) > 15 and max(grey) < 200  # of 255: apart, and visible on white
    assert len({style.look(i, count)[1] for i in range(count)}) == count


@pytest.mark.parametrize(('tokens', 'expected'), [((1e5, 1e5, 1e5), 0), ((1e5, 5e4, 2.5e4), 1)])
def test_budgets_are_those_the_sweep_was_made_for(tokens, expected):
  frames = [runs((n,), tokens=t) for n, t in zip((100, 200, 400), tokens, strict=True)]
  curves = pd.concat(frames, ignore_index=True)
  found = isoflop.budgets(curves)
  if expected:
    np.testing.assert_allclose(found, [1e7])  # 100 x 1e5 = 200 x 5e4 = 400 x 2.5e4
  else:
    assert len(found) == 6 and found.max() == pytest.approx(1e7, rel=0.05)  # where the smallest run ends


def test_budgets_are_none_where_no_three_sizes_overlap():
  assert len(isoflop.budgets(runs((100, 200)))) == 0


def test_a_joint_law_that_is_not_determined_keeps_its_points_apart():
  n, k = (axis.ravel() for axis in np.meshgrid([64, 128, 256], [3, 4]))
  noise = np.exp(2.0 * np.random.default_rng(0).normal(size=6))
  points = pd.DataFrame({'n_latents': n, 'k': k, 'nmse': 2 * n**-0.3 * k**-0.2 * noise})
  found = fit.fit_law(points, 'joint_nk_no_floor', bootstrap=0)
  assert found.band({'n_latents': 1024, 'k': 3})[1][0] > 100 * points['nmse'].max()  # it knows nothing there
  (ax,) = plots.joint(found).axes
  low, high = ax.get_ylim()
  lines = np.concatenate([line.get_ydata() for line in ax.lines])
  assert lines.min() / 3.1 < low < lines.min() and lines.max() < high < 3.1 * lines.max()


def test_points_of_a_single_size_are_drawn_beside_that_size():
  _, (ax,) = style.axes(1)
  ax.plot([1024.0, 1024.0], [0.1, 0.2], 'o')
  style.ticks(ax, 'n_latents', [1024.0, 1024.0])
  assert ax.get_xlim() == (512, 2048) and ax.get_xticks().tolist() == [1024]
