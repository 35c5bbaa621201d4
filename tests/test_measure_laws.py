"""Planted laws from the NMSE to a measure are found, families are compared with paired errors, and the page shows it."""

import json
import re
import shutil

import numpy as np
import pytest

from analysis import equal_l0, fit, measure_laws, page, read_ledger, report, table
from analysis.figures import measures as figure
from analysis.figures import style
from analysis.fitting import solve
from sae_jax import files
from sae_jax.measures import paired, results
from sae_jax.measures.downstream import Downstream
from tests import cells, planted_ledger, planted_measures

SIZES, KS = (1024, 2048, 4096), (3, 7)


@pytest.fixture(autouse=True)
def few_starts(monkeypatch):
  monkeypatch.setattr(solve, '_STARTS', 8)  # one term has one minimum


@pytest.fixture(scope='module')
def ledger(tmp_path_factory):
  """Cells of one family with a KL that is a power of the NMSE."""
  path = planted_ledger.write(tmp_path_factory.mktemp('one') / 'runs', sizes=SIZES, ks=KS)
  return planted_measures.everywhere(path)


@pytest.fixture(scope='module')
def families(tmp_path_factory):
  """Two families, of which relu has 1.15 times the KL at equal NMSE."""
  path = planted_ledger.write(tmp_path_factory.mktemp('two') / 'runs', sizes=SIZES[1:], ks=KS)
  planted_ledger.write_penalised(path, sizes=SIZES[1:], coefficients=(0.01, 0.03))
  return planted_measures.everywhere(path, over={'relu': 1.15})


@pytest.fixture(scope='module')
def found(ledger):
  return measure_laws.analyse(ledger, read_ledger.load_ledger(ledger), None, 0)


@pytest.fixture(scope='module')
def compared(families):
  rows = read_ledger.load_ledger(families)
  return measure_laws.analyse(families, rows, equal_l0.compare(rows), 0)


def test_a_planted_law_is_found_with_its_held_out_error(found):
  (one,) = found
  assert [value.name for value in one.values] == ['kl', 'delta_ce', 'recovered_zero']
  kl = one.values[0]
  assert kl.law.params['p']['estimate'] == pytest.approx(planted_measures.EXPONENT, abs=0.02)
  assert kl.law.holdout['rule'] == 'n_latents>2048' and kl.law.holdout['max_rel_err'] < 0.02
  assert kl.pair.floored.law.name == 'power' and kl.alike == (pytest.approx(1, abs=0.06), pytest.approx(1, abs=0.15))
  assert f'{planted_measures.EXPONENT:.1f}' in kl.sentence and 'offset at NMSE = 0 is' in kl.sentence
  share = one.values[2]
  assert share.law is None and not share.refused and share.alike[0] < -0.9
  grid, orders = one.tables()
  assert [row[0] for row in grid.rows] == ['1,024', '2,048', '4,096'] and grid.heads[1:] == ['k=3', 'k=7']
  assert re.fullmatch(r'\d\.\d+ ± 0\.\d+', grid.rows[0][1]) and len(orders.rows) == 3
  assert next((entry['law'], entry['y']) for entry in one.to_json()) == ('growth', 'downstream/kl')


def test_a_table_of_measures_is_fitted_by_the_command(ledger, tmp_path, capsys):
  read_ledger.load_ledger(ledger).to_csv(tmp_path / 't.csv', index=False)
  argv = [str(tmp_path / 't.csv'), '--law=growth', '--x=nmse', '--y=downstream/kl', '--bootstrap=0']
  with pytest.raises(SystemExit) as code:
    fit.main([*argv, '--holdout=n_latents>2048', f'--json={tmp_path / "fit.json"}'])
  assert code.value.code == 0
  assert 'downstream/kl(NMSE)   (growth: downstream/kl over nmse, 6 points)' in capsys.readouterr().out
  made = json.loads((tmp_path / 'fit.json').read_text())
  assert made['y'] == 'downstream/kl'
  assert made['params']['p']['estimate'] == pytest.approx(planted_measures.EXPONENT, abs=0.05)
  with pytest.raises(SystemExit) as code:
    fit.main([*argv, '--holdout=downstream/kl_se<1e-9'])
  assert code.value.code == 2 and 'holds nothing out' in capsys.readouterr().err


def test_families_apart_at_equal_nmse_are_told_apart(compared):
  (one,) = compared
  kl = one.values[0]
  assert kl.law.params['p']['estimate'] == pytest.approx(planted_measures.EXPONENT, abs=0.05)
  assert {'c[relu]', 'c[topk]'} < set(kl.law.params)
  first, levels, orders = one.tables()
  assert levels.heads == ['family', 'kl', 'delta_ce'] and [row[0] for row in levels.rows] == ['relu']
  assert float(levels.rows[0][1].split()[0]) == pytest.approx(1.15, rel=0.01)
  assert first.title == 'downstream/kl at L0 = 7' and {row[0] for row in first.rows} == {'topk', 'relu'}
  assert [row[-1] for row in orders.rows] == ['0'] * 3  # two families are no order


def test_a_value_at_equal_l0_lies_between_its_cells_and_its_paired_error_is_that_of_paired_differences(
  families, compared
):
  kl = compared[0].values[0]
  at, n = kl.at_l0, 2048
  cells = kl.cells[kl.cells['n_latents'] == n].set_index('activation')
  own = cells.loc['topk'].set_index('k')['downstream/kl']
  assert at.value('topk', n)[0] == pytest.approx(own[7], rel=1e-9)  # its L0 is its k
  relu = cells.loc['relu'].sort_values('l0')
  u, share = np.log(relu['l0'].to_numpy()), np.log(7.0)
  between = relu['downstream/kl'].iloc[0] + np.diff(relu['downstream/kl'])[0] * (share - u[0]) / np.diff(u)[0]
  assert at.value('relu', n)[0] == pytest.approx(between, rel=1e-9)
  # All weight on one cell of each: the difference of these two cells.
  found = at.of
  pair = [found.cells.index[found.cells['activation'] == name][0] for name in ('relu', 'topk')]
  rows = []
  for c in pair:
    folder = files.join(families, 'cells', found.cells['id'][c])
    result = results.read(folder, found.cells['id'][c])['downstream']
    rows.append(results.records(folder, result))
  expected = paired.differences(Downstream(), *rows)['kl']
  dropped = [paired.dropped(Downstream(), some)['kl'] for some in rows]
  assert paired.error(dropped[0] - dropped[1]) == pytest.approx(expected['se'], rel=1e-9)
  for size in SIZES[1:]:
    less, error, apart = at.difference('relu', size)
    assert less > 0 and 0 < error < 0.7 * apart  # windows move both families alike


def test_cells_that_were_not_measured_change_nothing_at_equal_l0(families, compared, tmp_path):
  copy = tmp_path / 'runs'
  shutil.copytree(families, copy)
  second = planted_ledger.cell(2048, 3, 0.1 * 2048**-0.5, **{'train.seed': 1})
  longer = planted_ledger.cell(2048, 7, 0.1 * 2048**-0.5, **{'train.tokens': planted_ledger.BATCH * 4000})
  others = [planted_ledger.cell(n, k, 0.01, **{'sae.activation': 'batchtopk'}) for n in SIZES[1:] for k in KS]
  for c in (second, longer, *others):
    cells.write(str(copy), c, nmse=0.2 + 0.1 / c.sae.k, l0=float(c.sae.k))
  rows = read_ledger.load_ledger(str(copy))
  among = equal_l0.compare(rows)
  assert 'batchtopk' in among.families
  (one,) = measure_laws.analyse(str(copy), rows, among, 0)
  assert [table.rows for table in one.tables()] == [table.rows for table in compared[0].tables()]
  drawn, known = (figure.value(some.values[0]).axes[2].lines for some in (one, compared[0]))
  assert len(drawn) == len(known)  # no law of a family that has none
  unmeasured = rows.assign(**{column: np.nan for column in rows.columns if column.startswith('downstream/')})
  unmeasured.attrs = rows.attrs
  for folder in copy.glob('cells/*/measures'):
    shutil.rmtree(folder)
  assert measure_laws.analyse(str(copy), unmeasured, among, 0) == []


def test_a_cell_without_lines_has_values_and_no_paired_error(families, compared, tmp_path):
  copy = tmp_path / 'runs'
  shutil.copytree(families, copy)
  for path in copy.glob('cells/*/measures/downstream.jsonl'):
    path.write_bytes(path.read_bytes()[:-20])
    path.with_suffix('.jsonl').write_text('nothing\n')
  found = measure_laws.at_l0(str(copy), compared[0].values[0].at_l0.of.cells)['downstream/kl']
  known = compared[0].values[0].at_l0
  np.testing.assert_array_equal(found.value_FNL, known.value_FNL)
  assert np.isnan(found.value('relu', 2048)[1]) and np.isnan(found.difference('relu', 2048)[1:]).all()


@pytest.mark.parametrize('x, y, expected', [([1, 2, 3], [10, 20, 30], 1), ([1, 2, 3], [3, 2, 1], -1)])
def test_rank_correlations_of_an_order_and_its_reverse(x, y, expected):
  for alike in (measure_laws.spearman, measure_laws.kendall):
    assert alike(np.array(x, float), np.array(y, float)) == pytest.approx(expected)


def test_rank_correlations_with_ties_are_the_published_ones():
  x, y = np.array([1, 2, 2, 3, 4, 4, 5, 6.0]), np.array([2, 1, 2, 2, 5, 3, 4, 9.0])
  # As scipy.stats.kendalltau and spearmanr say.
  assert measure_laws.kendall(x, y) == pytest.approx(0.7452413135)
  assert measure_laws.spearman(x, y) == pytest.approx(0.8642633971)
  assert np.isnan(measure_laws.kendall(np.ones(3), y[:3]))


@pytest.mark.parametrize(
  'value, se, text', [(0.3291, 0.0224, '0.329 ± 0.022'), (12.34, 3.0, '12.3 ± 3.0'), (0.5, np.nan, '0.5')]
)
def test_errors_say_how_many_digits_are_shown(value, se, text):
  assert measure_laws.with_error(value, se) == text


def test_report_has_a_section_a_figure_and_a_law_for_each_measure(ledger, tmp_path, monkeypatch):
  monkeypatch.setattr(report, '_family_figures', lambda found, family: {})  # drawing takes most of the time
  path = report.write(report.analyse(ledger, bootstrap=0), str(tmp_path), 'measured')
  text = (tmp_path / 'index.html').read_text()
  assert path.endswith('index.html') and text.count('<h2>Measured: downstream</h2>') == 1
  names = {p.name for p in tmp_path.iterdir()}
  drawn = [f'measure_downstream_{name}' for name in ('kl', 'delta_ce', 'recovered_zero')]
  assert {f'{name}.{kind}' for name in drawn for kind in ('png', 'pdf')} < names
  assert set(page.figure_digests(text)) >= {f'{name}.png' for name in drawn}
  assert 'downstream/kl' in [entry['y'] for entry in json.loads((tmp_path / 'laws.json').read_text())]
  assert 'downstream/kl_se' in table.read_csv(str(tmp_path / 'table.csv'))


def test_families_are_drawn_in_one_figure(compared):
  one = compared[0].values[0]
  fig = figure.value(one)
  left, middle, right = fig.axes
  assert left.get_title() == 'at L0 = 7' and middle.get_title().startswith('at n = ')
  assert right.get_xlabel() == 'normalised MSE' and len(right.lines) >= 2 + 4  # points, and two laws with their dashes
  labels = [text.get_text() for text in fig.legends[0].get_texts()]
  assert labels[:2] == ['topk', 'relu'] and labels[-1] == 'bars: ± one standard error'


def test_text_of_a_measure_never_becomes_markup_nor_a_path(tmp_path, monkeypatch):
  monkeypatch.setattr(report, '_family_figures', lambda found, family: {})
  path = planted_ledger.write(tmp_path / 'runs', sizes=(1024, 2048), ks=(3,))
  bad = '../<b onload=1>$x^2$_{'
  for folder in (tmp_path / 'runs' / 'cells').iterdir():
    planted_measures.measure(str(folder), planted_measures.records(0.5))
    (one,) = results.read(str(folder), folder.name).values()
    renamed = {bad: one.values['kl'] | {'units': '<i>$'}}
    results.write(str(folder), folder.name, {'downstream': results.Result(one.key, renamed)})
  found = report.analyse(path, bootstrap=0)
  report.write(found, str(tmp_path / 'out'), 'markup')
  text = (tmp_path / 'out' / 'index.html').read_text()
  assert '<b onload' not in text and '&lt;b onload' in text
  (png,) = (tmp_path / 'out').glob('measure_*.png')
  assert re.fullmatch(r'measure_\w+\.png', png.name)
  assert style.saved(figure.value(found.measures[0].values[0]))['png']
