"""Families at equal measured L0: planted differences are found whatever L0 each cell has, and intervals hold them."""

import numpy as np
import pandas as pd
import pytest

from analysis import equal_l0, family_tables
from analysis.figures import equal_l0 as figure
from analysis.fitting import solve
from sae_jax.errors import UserError
from tests import planted_families
from tests.planted_families import FAMILIES, KS, SIZES


@pytest.fixture(autouse=True)
def few_starts(monkeypatch):
  monkeypatch.setattr(solve, '_STARTS', 8)  # laws without a floor have one minimum


@pytest.fixture(scope='module')
def found():
  return equal_l0.compare(planted_families.table().sample(frac=1, random_state=0))


def truth(found):
  """The planted log losses [F, N, L]."""
  place = [(name, n, l0) for name in found.families for n in found.sizes for l0 in found.l0]
  return np.log([planted_families.loss(*one) for one in place]).reshape(found.loss_FNL.shape)


def test_planted_ratios_exponents_and_multipliers_are_found(found):
  assert found.l0.tolist() == list(KS) and found.main == 32 and found.reference == 'topk'
  np.testing.assert_allclose(found.loss_FNL, truth(found), atol=4 * planted_families.NOISE)
  assert found.ratio('relu', 'topk', 1024, 32).value == pytest.approx(1.2, rel=0.02)
  assert found.ratio('relu', 'topk').value == pytest.approx(1.2, rel=0.01)  # symmetric around 1,024
  assert found.steeper('topk', 'relu').value == pytest.approx(0.05, abs=0.004)
  assert found.steeper('relu', 'topk', l0=8).value == pytest.approx(-0.05, abs=0.01)
  # At 4,096 relu has 1.2 4^.05 times the loss, for which topk takes that to the power of 1/.25 fewer latents.
  n, latents = found.latents('relu', 'topk')
  assert n == 4096 and latents.value == pytest.approx((1.2 * 4**0.05) ** 4, rel=0.05)
  compute = found.compute(n, latents)
  few = 4096 / latents.value
  assert compute.value == pytest.approx((2 * 4096 + 8 * 32) / (2 * few + 8 * 32), rel=1e-3)
  assert found.ranked[0] in ('topk', 'gated') and found.ranked[-1] == 'relu'


def test_scatter_is_that_of_seeds_at_equal_l0(found):
  # A pair of seeds at two sizes of two families. What their L0s make of the loss is ten times the planted scatter.
  assert found.repeats and found.freedom == 16
  assert found.scatter == pytest.approx(planted_families.NOISE, rel=0.5)
  alone = equal_l0.compare(planted_families.table(repeated=()))
  assert not alone.repeats and alone.freedom == 4 * (len(SIZES) * len(KS) - 4)
  assert alone.scatter == pytest.approx(planted_families.NOISE, rel=0.3)


def test_intervals_hold_the_planted_truth_nine_times_in_ten(monkeypatch):
  monkeypatch.setattr(equal_l0, '_DRAWS', 500)
  rounds, hits = 30, np.zeros(4)
  for seed in range(rounds):
    # With as few seeds as a real sweep has: four pairs.
    one = equal_l0.compare(
      planted_families.table(seed, names=('topk', 'relu'), sizes=(256, 1024, 4096), ks=(16, 32), repeated=(256,))
    )
    _, latents = one.latents('relu', 'topk')
    for i, (number, wanted) in enumerate(
      (
        (one.ratio('relu', 'topk', 4096), 1.2 * 4**0.05),
        (one.ratio('relu', 'topk', 1024, 32), 1.2),
        (one.steeper('topk', 'relu'), 0.05),
        (latents, (1.2 * 4**0.05) ** 4),
      )
    ):
      hits[i] += number.low < wanted < number.high
  share = hits / rounds
  assert (share > 0.75).all() and share.mean() < 0.98, share


def test_laws_of_each_family_at_equal_l0(found):
  slopes = {fit.where['activation']: fit.params['b'] for fit in found.laws}
  assert set(slopes) == set(FAMILIES) and {fit.where['l0'] for fit in found.laws} == {32}
  for name, (_, exponent) in FAMILIES.items():
    assert slopes[name]['estimate'] == pytest.approx(exponent, abs=0.006) and slopes[name]['low'] < slopes[name]['high']
  for fit in found.joint:
    level, exponent = FAMILIES[fit.where['activation']]
    assert fit.predict({'n_latents': 1024, 'l0': 32})[0] == pytest.approx(0.2 * level, rel=0.01)
    assert fit.params['beta_n']['low'] < -exponent < fit.params['beta_n']['high'] and fit.x == ('n_latents', 'l0')


def test_figures_show_every_family_at_every_size(found):
  drawn = figure.frontiers(found)
  assert [ax.get_title() for ax in drawn.axes] == [f'n = {n:,}' for n in SIZES]
  left, right = figure.scaling(found).axes
  assert 'topk' in right.get_ylabel() and right.get_yscale() == 'linear' and left.get_yscale() == 'log'
  (box,) = drawn.legends
  assert {text.get_text() for text in box.get_texts()} == {*FAMILIES, 'L0 = 32'}


def test_a_cell_that_another_beats_at_fewer_latents_is_on_no_frontier():
  cells = planted_families.table(names=('topk', 'relu'))
  worse = (cells['activation'] == 'relu') & (cells['n_latents'] == 512) & (cells['k'] == 32)
  cells.loc[worse, 'nmse'] = 0.9
  one = equal_l0.compare(cells)
  assert one.ratio('relu', 'topk', 512, 32).value == pytest.approx(1.2 * 2**-0.05, rel=0.05)  # from its neighbours
  (said,) = (w['message'] for w in one.warnings if w['code'] == 'beaten')
  assert said.startswith('1 settings') and 'relu 512 k=32 (NMSE 0.9)' in said


def test_suspect_cells_are_named_once_a_kind():
  cells = planted_families.table(names=('topk', 'relu'))
  cells.loc[3, ['l0', 'nmse']] = [20.0, 0.3]
  cells.loc[[4, 5], 'dead_fraction'] = 0.2
  cells.loc[6, 'nmse'] = 1.3
  cells.loc[7, 'l0'] = np.nan
  cells.loc[8, 'nmse'] = np.nan
  said = {w['code']: w['message'] for w in equal_l0.compare(cells).warnings}
  assert said.keys() >= {'missed_target', 'many_dead', 'no_better_than_mean', 'not_measured'}
  assert said['missed_target'].startswith('1 of') and '000000000003 n=256 topk, k=16: 20' in said['missed_target']
  assert said['many_dead'].startswith('2 of') and said['not_measured'].startswith('2 of')
  assert '000000000006' in said['no_better_than_mean']


def test_copies_are_no_seeds_and_families_may_be_numbers():
  cells = planted_families.table(names=('topk', 'relu'), repeated=())
  twice = pd.concat([cells, cells.assign(id=cells['id'] + 'x', seed=1)])
  one, two = (
    equal_l0.compare(t.assign(activation=t['activation'].map({'topk': 1, 'relu': 2}))) for t in (cells, twice)
  )
  assert not two.repeats and two.scatter == one.scatter and two.ratio('2', '1') == one.ratio('2', '1')
  assert [w['message'].partition(' have ')[0] for w in two.warnings] == ['40 rows'] and one.warnings == []


def test_cells_of_more_tokens_stand_beside():
  cells = planted_families.table(names=('topk', 'relu'))
  long = cells.query('activation == "relu" and n_latents == 1024 and k == 32').iloc[:1]
  long = long.assign(id='long', tokens=4 * 512_000, nmse=0.9 * long['nmse'])
  one = equal_l0.compare(pd.concat([cells, long], ignore_index=True))
  assert one.others['id'].tolist() == ['long'] and 'long' not in one.cells['id'].tolist()
  assert one.others['over'].iloc[0] == pytest.approx(0.9, rel=0.02)
  assert one.others['over_reference'].iloc[0] == pytest.approx(0.9 * 1.2, rel=0.02)
  (table,) = (t for t in family_tables.tables(one, one.joint) if 'tokens' in t.title)
  assert table.rows[0][:4] == ['relu', '1,024', f'{long["l0"].iloc[0]:.3g}', '4']


def test_coefficients_instead_of_k_are_compared_at_some_l0():
  cells = planted_families.table().assign(sparsity=lambda rows: 1 / rows['k'], k=np.nan)
  one = equal_l0.compare(cells)
  assert one.repeats and 8 <= one.main <= 64
  assert one.ratio('relu', 'topk').value == pytest.approx(1.2, rel=0.02)
  bare = equal_l0.compare(cells[['activation', 'n_latents', 'l0', 'nmse']])  # nothing says what repeats what
  assert bare.ratio('relu', 'topk').value == pytest.approx(1.2, rel=0.03)


def test_a_family_that_reaches_no_l0_of_the_others_is_shown_without_numbers():
  cells = planted_families.table(names=('topk', 'relu', 'gated'))
  gated = cells['activation'] == 'gated'
  one = equal_l0.compare(cells[~gated | (gated & (cells['n_latents'] == 512) & (cells['k'] == 16))])
  assert np.isnan(one.ratio('gated', 'topk').value) and one.ranked[-1] == 'gated'
  assert not one.shared('gated', 'topk').any() and not one.shared('nobody', 'topk').any()
  rows = {row[0]: row[1:] for row in family_tables.tables(one, one.joint)[1].rows}
  assert set(rows['gated']) == {''} and all(rows['relu'])
  figure.frontiers(one), figure.scaling(one)


def test_two_seeds_alone_leave_the_interval_open_and_one_leaves_it_unknown():
  few = planted_families.table(names=('topk', 'relu'), sizes=(256, 1024), ks=(16, 32), repeated=())
  one = equal_l0.compare(few)
  assert np.isnan(one.scatter) and not one.ratio('relu', 'topk').known
  assert one.ratio('relu', 'topk').value == pytest.approx(1.15, rel=0.03)
  pair = equal_l0.compare(pd.concat([few, few.iloc[:1].assign(id='x', seed=1, nmse=few['nmse'][0] * 1.05)]))
  assert pair.freedom == 1 and pair.ratio('relu', 'topk').low < 1.0 < pair.ratio('relu', 'topk').high


REFUSED = {
  'one family': (lambda t: t[t['activation'] == 'topk'], 'cells of topk alone'),
  'no rows': (lambda t: t[:0], 'no family alone'),
  'no L0': (lambda t: t.assign(l0=np.nan), 'cells of no family alone'),
  'no column': (lambda t: t.drop(columns='l0'), "no column 'l0'"),
  'apart': (lambda t: t.assign(l0=t['l0'] * np.where(t['activation'] == 'topk', 1, 100)), 'no L0 is reached'),
  'no size': (lambda t: t.assign(n_latents=np.nan), 'n_latents=nan'),
  'no name': (lambda t: t.assign(activation=None), 'activation is missing'),
  'text': (lambda t: t.assign(nmse='good'), "nmse='good'"),
  'infinite': (lambda t: t.assign(l0=np.inf), 'l0=inf'),
  'copies': (lambda t: pd.concat([t, t[:1]]), "id '000000000000' is in the table twice"),
  'no table': (lambda t: None, 'is not a table'),
}


@pytest.mark.parametrize('case', REFUSED)
def test_what_cannot_be_compared_is_refused_in_one_line(case):
  change, text = REFUSED[case]
  with pytest.raises(UserError, match=r'^[^\n]*$') as error:
    equal_l0.compare(change(planted_families.table(names=('topk', 'relu'), sizes=(256, 1024))))
  assert text in str(error.value)
