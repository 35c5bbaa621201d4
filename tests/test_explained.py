"""Explained latents: planted ratios are found within their errors, verdicts follow from intervals, and figures are drawn."""

import shutil

import numpy as np
import pandas as pd
import pytest

from analysis import explained, explained_cells, read_ledger
from analysis.explained_cells import F1, PRECISION, RECALL
from analysis.figures import explained as figures
from analysis.figures import style
from sae_jax.errors import UserError
from sae_jax.measures.names import VERSIONS
from tests import cells, planted_ledger, planted_measures

SIZES, KS = (1024, 2048, 4096), (3, 7)


@pytest.fixture(autouse=True, scope='module')
def versions():
  with pytest.MonkeyPatch.context() as patched:
    for name in ('n2g', 'simulate', 'ablation'):
      patched.setitem(VERSIONS, name, 1)
    yield


@pytest.fixture(scope='module')
def ledger(tmp_path_factory, versions):
  """Two families, of which topk has twice the recall of relu and 0.9 times its precision."""
  path = planted_ledger.write(tmp_path_factory.mktemp('two') / 'runs', sizes=SIZES, ks=KS)
  planted_ledger.write_penalised(path, sizes=SIZES[1:], coefficients=(0.01, 0.03))
  return planted_measures.explain(path)


def found_in(ledger):
  return explained_cells.find(read_ledger.load_ledger(str(ledger)))


@pytest.fixture(scope='module')
def found(ledger):
  return found_in(ledger)


def test_planted_values_are_read_off_at_equal_l0(found):
  places = {(p.family, p.n, p.l0): p for p in found.places}
  assert {key for key in places if key[0] == 'topk'} == {('topk', n, k) for n in SIZES for k in KS}
  assert ('relu', 2048, 7.0) in places and all(n != 1024 for name, n, _ in places if name == 'relu')
  for n in SIZES[1:]:
    for name in ('topk', 'relu'):
      value, se = found.value(places[name, n, 7.0], RECALL)
      expected = planted_measures.RECALL[name] * (n / 1024) ** planted_measures.RECALL_N
      assert 0 < se < 0.05 * expected and abs(value - expected) < 4 * se + 0.01 * expected


def test_planted_ratios_lie_in_their_intervals_and_verdicts_follow(found):
  both = found.pairs('topk', 'relu', RECALL)
  for column, ratio in ((RECALL, 2.0), (PRECISION, 0.9)):
    number = found.ratio(both, column)
    assert number.low < ratio < number.high < 1.1 * number.low
  said = {one.claim: one.verdict for one in explained.verdicts(found)}
  assert said.pop('precision of topk is more than 0.9 times that of relu') == 'undecided'
  assert said.pop('a latent touches less than a channel, edited at all positions') == 'undecided'
  assert {*said.values()} == {'reproduced'} and len(said) == 8


def test_powers_of_what_moves_together_are_not_known():
  n = np.array([512.0, 1024, 2048, 4096, 1024])
  rows = {'activation': 'topk', 'n_latents': n, 'l0': n / 128, RECALL: n**0.25}
  for last, known in ((8.0, False), (16.0, True)):
    rows['l0'][-1] = last
    some = explained_cells.Explained(pd.DataFrame(rows), [])
    slopes = [some.slope(RECALL, x) for x in ('n_latents', 'l0')]
    assert [slope.known for slope in slopes] == [known] * 2
  assert slopes[0].value == pytest.approx(0.25)


def test_what_does_not_hold_is_not_reproduced(ledger, tmp_path):
  copy = shutil.copytree(ledger, tmp_path / 'runs')
  planted_measures.explain(copy, recall={'topk': 0.13}, precision={'topk': 0.5})
  said = {one.claim: one for one in explained.verdicts(found_in(copy))}
  for claim in ('recall of topk is more than 1.5', 'precision of topk is more than 0.9', 'F1 of topk is above'):
    (one,) = (one for name, one in said.items() if name.startswith(claim))
    assert one.verdict == 'not reproduced' and 'mean over n = 2,048, 4,096' in one.why


def test_errors_add_in_squares_over_latents_and_as_they_are_over_windows(found):
  weight_C = np.zeros(len(found.cells))
  weight_C[:2] = 0.5
  between = explained_cells.Place('topk', 1024, 5.0, 5.0, weight_C)
  for column, norm in ((RECALL, np.hypot), ('simulate/kl', np.add)):
    one, two = found.cells[f'{column}_se'].to_numpy()[:2] / 2
    assert found.value(between, column) == pytest.approx((found.cells[column][:2].mean(), norm(one, two)))
  ratio = found.ratio([(between, between)], RECALL)
  assert ratio == pytest.approx((1, 1, 1))  # of a place with itself nothing is unknown


def two_seeds(column, values, se):
  """Two families, of which the first has two seeds, and the place of each."""
  rows = {'activation': ['topk', 'topk', 'relu'], 'setting': ['a', 'a', 'b'], column: values, f'{column}_se': se}
  weights = np.array([0.5, 0.5, 0]), np.array([0, 0, 1.0])
  places = [explained_cells.Place(name, 1, 8.0, 8.0, w) for name, w in zip(('topk', 'relu'), weights, strict=True)]
  return explained_cells.Explained(pd.DataFrame(rows), places), places


def test_scatter_of_seeds_is_beside_that_of_windows_and_holds_that_of_latents():
  scatter = np.std([3.0, 3.2], ddof=1) / 3.1
  found, (both, single) = two_seeds('simulate/kl', [3.0, 3.2, 4.0], [0.3, 0.3, 0.2])
  # The two seeds see the same windows, and are draws of their own.
  assert found.value(both, 'simulate/kl')[1] == pytest.approx(np.hypot(0.3, scatter * np.hypot(3.0, 3.2) / 2))
  assert found.value(single, 'simulate/kl')[1] == pytest.approx(np.hypot(0.2, 4.0 * scatter))
  found, (both, single) = two_seeds(RECALL, [3.0, 3.2, 4.0], [0.01, 0.5, 0.6])
  assert found.value(both, RECALL)[1] == pytest.approx(np.hypot(3.0 * scatter, 0.5) / 2)
  assert found.value(single, RECALL)[1] == 0.6


@pytest.mark.parametrize(
  ('column', 'values'), [('simulate/kl_over_bigram', [0.02, 0.12, 2.0]), ('x/y', [-0.05, 0.05, 2.0])]
)
def test_scatter_of_what_can_be_near_0_is_absolute(column, values):
  found, (_, single) = two_seeds(column, values, [0.0, 0.0, 0.05])
  assert found.value(single, column)[1] == pytest.approx(np.hypot(0.05, np.std(values[:2], ddof=1)))


def test_verdicts_on_n_and_l0_carry_the_share_that_is_explained():
  rows = {'activation': 'topk', 'n_latents': [256, 4096], 'l0': 8.0, 'setting': ['a', 'b'], F1: [0.30, 0.29]}
  frame = pd.DataFrame(rows | {'n2g/eligible': [0.977, 0.405], 'n2g/silent': [0.044, 0.181]})
  places = [
    explained_cells.Place('topk', n, 8.0, 8.0, one) for n, one in zip(rows['n_latents'], np.eye(2), strict=True)
  ]
  found = explained_cells.Explained(frame, places)
  said = [one.why for one in explained.verdicts(found) if 'larger' in one.claim or 'sparser' in one.claim]
  shares = ['of explained latents alone, 0.405 to 0.977 of all', '0.405 to 0.977 of all explained, the others 0']
  assert [share in why for share, why in zip(np.repeat(shares, 2), said, strict=True)] == [True] * 4
  main = explained.tables(found)[1]
  assert main.heads[3:] == ['explained', 'never predicted', 'F1']
  assert [row[3:] for row in main.rows] == [['0.977', '0.044', '0.3'], ['0.405', '0.181', '0.29']]
  without = explained_cells.Explained(frame.drop(columns='n2g/eligible'), places)
  assert any(one.why.startswith('power of n in F1 of topk: ') for one in explained.verdicts(without))


def test_a_mean_names_the_combinations_of_n_and_l0_that_it_lacks():
  cells_ = pd.DataFrame(
    {'activation': 'topk', 'setting': list('abcd'), 'simulate/kl_over_bigram': [0.1, 0.2, 0.3, np.nan]}
  )
  sizes, l0s = (1024, 1024, 2048, 2048), (8, 16, 8, 16)
  places = [explained_cells.Place('topk', *at, at[1], one) for *at, one in zip(sizes, l0s, np.eye(4), strict=True)]
  whys = [one.why for one in explained.verdicts(explained_cells.Explained(cells_, places)) if 'bigram' in one.claim]
  said = 'of topk, mean over n = 1,024, 2,048 and L0 = 8, 16'
  assert len(whys) == 1 and f'{said} (1 of 4 combinations missing: n = 2,048 at L0 = 16): ' in whys[0]
  cells_.loc[3, 'simulate/kl_over_bigram'] = 0.4
  assert any(f'{said}: ' in one.why for one in explained.verdicts(explained_cells.Explained(cells_, places)))


def test_errors_are_not_known_where_nothing_says_them():
  found, (both, single) = two_seeds('simulate/kl', [3.0, 3.2, 4.0], [np.nan] * 3)
  assert found.value(single, 'simulate/kl')[1] == pytest.approx(4.0 * np.std([3.0, 3.2], ddof=1) / 3.1)
  found.cells['setting'] = ['a', 'b', 'c']
  assert np.isnan(found.value(both, 'simulate/kl')[1]) and np.isnan(found.value(single, 'simulate/kl')[1])


def test_seeds_that_scatter_more_than_latents_make_the_error(ledger, tmp_path):
  copy = shutil.copytree(ledger, tmp_path / 'runs')
  c = planted_ledger.cell(2048, 7, 0.1 * 2048**-0.5, **{'train.seed': 1})
  folder = cells.write(str(copy), c, nmse=0.2, l0=7.0)
  said = {'recall': (0.9, 0.001), 'precision': (0.7, 0.001), 'f1': (0.5, 0.001)}
  planted_measures.finished(folder, 'n2g', said, [{'x': 1}])
  planted_measures.finished(folder, 'ablation', {'left_out': (0.0, 0.0)}, [{'x': 1}])
  found = found_in(copy)
  (place,) = (p for p in found.places if (p.family, p.n, p.l0) == ('topk', 2048, 7.0))
  twice = found.cells[RECALL][place.weight_C > 0].to_numpy()
  value, se = found.value(place, RECALL)
  assert len(twice) == 2 and value == pytest.approx(twice.mean())
  assert se == pytest.approx(np.std(twice, ddof=1) / twice.mean() * np.hypot(*twice) / 2)
  assert found.value(place, 'ablation/left_out') == (0.0, 0.0)


def test_a_single_cell_near_an_l0_stands_for_it_and_its_own_l0_is_shown(ledger, tmp_path):
  copy = shutil.copytree(ledger, tmp_path / 'runs')
  relu = found_in(copy).cells.query('activation == "relu"')
  near = relu.iloc[(np.log(relu['l0'] / 7)).abs().argsort()[:1]]
  for cell in set(relu['id']) - set(near['id']):
    shutil.rmtree(copy / 'cells' / cell)
  found = found_in(copy)
  (place,) = (p for p in found.places if p.family == 'relu')
  assert place.l0 == 7 and place.reached == pytest.approx(near['l0'].item()) and place.weight_C.max() == 1
  main = explained.tables(found)[1]
  assert [row[2] for row in main.rows if row[0] == 'relu'] == [f'{place.reached:.3g}']
  assert next(row[:3] for row in explained.tables(found)[2].rows) == ['topk', f'{place.n:,.0f}', '7']


def test_shares_stay_shares_where_cells_do_not_quite_reach_an_l0(found):
  """Read off along the line through its two cells, a share of 1 at the last one would be more than 1 beyond."""
  cells_ = found.cells.sort_values(['n_latents', 'l0']).reset_index(drop=True)
  relu = cells_['activation'] == 'relu'
  cells_.loc[relu, 'l0'] = np.resize([4.0, 6.7], relu.sum())  # the second of each size is a little below 7
  cells_['n2g/eligible'] = np.where(cells_['l0'] > 5, 1.0, 0.9)
  of = explained_cells.find(cells_)
  places = [place for place in of.places if place.family == 'relu' and place.l0 == 7]
  assert places and [place.reached for place in places] == pytest.approx([6.7] * len(places))
  assert [of.value(place, 'n2g/eligible')[0] for place in places] == [1.0] * len(places)


def test_command_draws_and_writes_everything(ledger, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(style, 'saved', lambda fig: {'png': b'x', 'pdf': b'y'})  # rendering takes most of the time
  with pytest.raises(SystemExit) as code:
    explained.main([f'--ledger={ledger}', f'--out={tmp_path}'])
  assert code.value.code == 0
  assert 'recall of topk is more than 1.5 times that of relu (Figure 24): reproduced' in capsys.readouterr().out
  drawn = {f'{name}.{kind}' for name in ('latents', 'by_n', 'by_l0') for kind in ('png', 'pdf')}
  assert {p.name for p in tmp_path.iterdir()} == drawn | {'tables.md', 'points.csv'}
  text = (tmp_path / 'tables.md').read_text()
  assert (
    'nan' not in text and text.count('###') == 6 and '| topk in the paper |  |  | about 0.9 | more than 1.5 |' in text
  )
  assert len((tmp_path / 'points.csv').read_text().splitlines()) == 1 + len(found_in(ledger).places)


def test_latents_of_both_families_are_drawn_with_their_means(found, ledger):
  (title, row), (other, _) = found.shown
  assert title.startswith('topk, n = 4,096') and other.startswith('relu, n = 4,096')
  precision_E, recall_E = explained_cells.scores(ledger, row['id'])
  assert np.nanmean(precision_E) == pytest.approx(row[PRECISION]) and np.nanmean(recall_E) == pytest.approx(row[RECALL])
  shown = [('a', np.array([0.1, 0.9, np.nan, 0.2]), np.array([0.8, 0.9, 0.0, 0.2]))]
  left, means = figures.latents(found, shown).axes
  assert left.get_title() == 'a\n3 of 4 latents are ever predicted' and left.texts[0].get_text().endswith(
    'precision:\n25 %'
  )
  assert [text.get_text() for text in means.get_yticklabels()] == ['topk', 'relu']


def test_one_family_is_drawn_by_its_sparsities(ledger, tmp_path):
  copy = shutil.copytree(ledger, tmp_path / 'runs')
  for cell in found_in(copy).cells.query('activation == "relu"')['id']:
    shutil.rmtree(copy / 'cells' / cell)
  found = found_in(copy)
  assert [title for title, _ in found.shown] == ['topk, n = 4,096, L0 = 3', 'topk, n = 4,096, L0 = 7']
  drawn = figures.drawn(found, str(copy))
  assert {*drawn} == {'latents', 'by_n', 'by_l0'}
  assert [t.get_text() for t in drawn['by_n'].legends[0].get_texts()][:2] == ['L0 = 3', 'L0 = 7']
  said = {one.claim: one for one in explained.verdicts(found)}
  assert said['F1 of topk is above that of relu'].verdict == 'undecided'
  assert 'no n and L0 has both topk and relu: not known' in said['F1 of topk is above that of relu'].why


def one_cell(path, *, said=None, **changes):
  """A ledger of one cell, asked for an L0 of 7, with an n2g that says this."""
  folder = cells.write(str(path), planted_ledger.cell(1024, 7, 0.003), **{'nmse': 0.2, 'l0': 7.0} | changes)
  said = {'eligible': 0.5, 'recall': 0.3, 'precision': 0.7, 'f1': 0.4} if said is None else said
  planted_measures.finished(folder, 'n2g', {name: (value, 0.01) for name, value in said.items()}, [{'x': 1}])
  return str(path)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'l0': 4.0}, ('within 25 % of an L0 that was asked for (7)', 'topk with n = 1,024 has L0 = 4;', 'come nearer')),
    ({'nmse': 1.2}, ('the least NMSE is 1.2 ', 'only those with an NMSE below 1', 'train them longer')),
    ({'said': {'eligible': 0.0}}, ('no latent was explained in any of 1 cells', 'n2g/eligible is 0', 'more active')),
    ({'said': {'eligible': 0.1}}, ('1 cells with n2g none has n2g/recall', 'active on the held-out', '--windows=N')),
  ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys, changes, words):
  with pytest.raises(SystemExit) as code:
    explained.main([f'--ledger={one_cell(tmp_path, **changes)}', f'--out={tmp_path / "out"}'])
  (line,) = capsys.readouterr().err.splitlines()
  assert code.value.code == 2 and all(word in line for word in words), line


def test_all_that_is_in_no_comparison_is_said_and_stands_beside_the_tables(tmp_path, capsys, monkeypatch):
  rows = [
    # activation, n_latents, k, l0, nmse, tokens, recall
    ('topk', 1024, 7, 7.0, 0.2, 100, 0.3),
    ('topk', 1024, 13, 13.0, 0.5, 100, 0.3),  # more active latents, and worse
    ('topk', 1024, 3, 3.0, 0.3, 100, 0.3),
    ('topk', 1024, 5, 5.0, 0.25, 900, 0.3),
    ('topk', 2048, 7, 7.0, 1.5, 100, 0.3),
    ('topk', 4096, 7, 7.0, 0.2, 100, np.nan),
    ('relu', 1024, np.nan, 30.0, 0.2, 100, 0.3),
  ]
  table = pd.DataFrame(rows, columns=['activation', 'n_latents', 'k', 'l0', 'nmse', 'tokens', RECALL])
  table.insert(0, 'id', [f'cell{i}' for i in range(len(rows))])
  stale = {'code': 'measures_stale', 'message': '1 measures of cells are left out: old'}
  table.attrs['warnings'] = [stale]
  monkeypatch.setattr(read_ledger, 'load_ledger', lambda path: table)
  monkeypatch.setattr(figures, 'drawn', lambda found, ledger: {})
  with pytest.raises(SystemExit) as code:
    explained.main(['--ledger=x', f'--out={tmp_path}'])
  assert code.value.code == 0
  printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith('warning: ')]
  named = {
    'measures_stale': 'old',
    'not_explained': '1 of 7 finished cells have no n2g/recall and are in no comparison: cell5 n=4096',
    'no_better_than_mean': 'cell4',
    'other_tokens': 'cell3 n=1024 k=5: 900',
    'beaten': 'topk 1024 k=13 (NMSE 0.5)',
    'no_equal_l0': 'relu with n = 1,024 has L0 = 30',
  }
  assert [line.split(': ')[1] for line in printed] == [*named]
  assert all(word in line for word, line in zip(named.values(), printed, strict=True)), '\n'.join(printed)
  text = (tmp_path / 'tables.md').read_text()
  assert all(f'| {code} | ' in text for code in named) and '### Warnings' in text
  table[RECALL] = np.nan
  with pytest.raises(UserError, match=r'no finished cell has n2g/recall; .* measures it \(1 measures .*: old\)'):
    explained_cells.find(table)


def test_l0s_below_1_are_not_rounded_to_0(tmp_path):
  table = read_ledger.load_ledger(one_cell(tmp_path, l0=0.4)).assign(k=np.nan)
  assert [place.l0 for place in explained_cells.find(table).places] == [0.4]


def test_arrays_of_another_digest_and_ledgers_without_explanations_are_refused(ledger, tmp_path, capsys):
  copy = shutil.copytree(ledger, tmp_path / 'runs')
  cell = found_in(copy).shown[0][1]['id']
  (copy / 'cells' / cell / 'measures' / 'n2g.2.safetensors').write_bytes(b'x')
  with pytest.raises(UserError, match=r'n2g\.2\.safetensors does not fit its digest\); delete its n2g\.jsonl and'):
    explained_cells.scores(str(copy), cell)
  for folder in copy.glob('cells/*/measures'):
    shutil.rmtree(folder)
  with pytest.raises(SystemExit) as code:
    explained.main([f'--ledger={copy}', f'--out={tmp_path / "out"}'])
  assert code.value.code == 2 and '--measures=n2g,simulate,ablation' in capsys.readouterr().err
