import dataclasses
import json

import numpy as np
import pytest

from analysis import page, read_ledger, report, table
from analysis.fit import fit_law
from analysis.fitting import solve
from sae_jax import files, metrics
from sae_jax.cell import log_spaced
from sae_jax.errors import UserError
from tests import cells, full_ledger, planted_ledger

PLOTTED = dict(
  alpha=-0.42271827, beta_k=0.2397685, beta_n=-0.02708159, gamma=-0.03828648, zeta=-1.31862432, eta=-0.0964778
)
SIZES, KS = [1024, 2048, 4096, 8192, 16384, 32768], [3, 17]
PER_DECADE = 8


def law(n, k):
  p = PLOTTED
  reducible = p['alpha'] + p['beta_k'] * np.log(k) + p['beta_n'] * np.log(n) + p['gamma'] * np.log(k) * np.log(n)
  return float(np.exp(reducible) + np.exp(p['zeta'] + p['eta'] * np.log(k)))


def cell(n, k, learning_rate=1e-3):
  return cells.cell(
    **{
      'sae.n_latents': n,
      'sae.k': k,
      'sae.d_model': 13,
      'sae.k_aux': 0,
      'optim.learning_rate': learning_rate,
      'train.batch_tokens': 11,
      'train.tokens': 1100,
      'eval.per_decade': PER_DECADE,
    }
  )


def spent(n, step):
  return {'flops_useful': 2.0 * n * 13 * 11 * step, 'flops_dense': 12.0 * n * 13 * 11 * step}


def write_ledger(path, sizes=SIZES, ks=KS, noise=0.001, rates=(1e-3,)):
  rng = np.random.default_rng(0)
  for n in sizes:
    for k in ks:
      for i, rate in enumerate(rates):
        nmse = law(n, k) * float(np.exp(noise * rng.normal())) * (1 + 0.1 * abs(i - len(rates) // 2))
        c = cell(n, k, rate)
        lines = [
          cells.line(c, step, nmse * (1 + (n / 1024) ** 0.6 / step), **spent(n, step))
          for step in sorted(log_spaced(100, PER_DECADE))
        ]
        cells.write(path, c, lines, nmse=nmse, **spent(n, 100))


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A report from a ledger of known laws, with one failed cell whose error is markup."""
  folder = tmp_path_factory.mktemp('report')
  ledger = str(folder / 'ledger')
  write_ledger(ledger, rates=(5e-4, 1e-3, 2e-3))
  failed = cells.write(ledger, cell(1024, 3, 8e-3), finished=False)
  metrics.record_failure(failed, ValueError('<script>alert("x")</script>'), permanent=True)
  cells.write(ledger, cell(1024, 3, 9e-3), nmse=0.99, weights='"><img src=x onerror=alert(1)>')
  with pytest.raises(SystemExit) as code:
    report.main(['--ledger', ledger, '--out', str(folder / 'out'), '--bootstrap=20'])
  assert code.value.code == 0
  return folder / 'out'


def test_report_writes_everything(written):
  names = {p.name for p in written.iterdir()}
  of_k = [f'{name}_k{k}' for name in ('isoflop', 'learning_rates') for k in KS]
  drawn = ['joint', 'residuals', 'power', 'frontier', *of_k]
  pictures = {f'{name}.{kind}' for name in drawn for kind in ('png', 'pdf')}
  assert names >= {'table.csv', 'laws.json', 'index.html'} | pictures
  assert {name.rpartition('.')[2] for name in names} == {'csv', 'json', 'html', 'png', 'pdf'}
  rows = table.read_csv(str(written / 'table.csv'))
  assert len(rows) == len(SIZES) * len(KS) * 3 + 1
  assert rows['best_learning_rate'].sum() == len(SIZES) * len(KS)


def test_report_recovers_the_planted_law_from_the_best_learning_rates(written):
  entries = json.loads((written / 'laws.json').read_text(), parse_constant=pytest.fail)  # strict JSON only
  joint = next(e for e in entries if e['law'] == 'joint_nk')
  assert joint['n_points'] == len(SIZES) * len(KS)
  assert joint['holdout']['rule'] == 'n_latents>16384' and joint['holdout']['max_rel_err'] < 0.01
  for n, k in ((1024, 3), (32768, 17), (7000, 17)):
    p = {name: value['estimate'] for name, value in joint['params'].items()}
    reducible = p['alpha'] + p['beta_k'] * np.log(k) + p['beta_n'] * np.log(n) + p['gamma'] * np.log(k) * np.log(n)
    assert np.exp(reducible) + np.exp(p['zeta'] + p['eta'] * np.log(k)) == pytest.approx(law(n, k), rel=5e-3)
  assert [(e['x'], e['where']) for e in entries if e['law'] == 'power' and e['y'] == 'nmse'] == [
    ([x], {'k': k}) for x in ('n_latents',) for k in KS
  ] + [([x], {'k': k}) for x in ('flops_useful', 'flops_dense') for k in KS]
  for e in entries:
    assert set(e) >= {
      'law',
      'formula',
      'x',
      'y',
      'params',
      'objective',
      'n_points',
      'start_agreement',
      'holdout',
      'warnings',
    }
    assert all(set(p) >= {'estimate', 'low', 'high'} for p in e['params'].values())


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """What a ledger of one learning rate, one subject and one token budget says."""
  folder = str(tmp_path_factory.mktemp('plain'))
  write_ledger(folder)
  return report.analyse(folder, bootstrap=0)


def test_planted_curves_have_the_evaluations_that_were_planned(plain, tmp_path):
  for path in (
    planted_ledger.write(tmp_path / 'planted', ks=(3,)),
    full_ledger.write(tmp_path / 'full', ks=(3,)),
  ):
    assert read_ledger.load_curves(path).attrs['warnings'] == []
  assert not [w for w in plain.warnings if w['code'] == 'holes']


def test_report_of_a_ledger_without_metrics_fits_what_needs_no_curves(tmp_path):
  write_ledger(str(tmp_path))
  for path in tmp_path.glob('cells/*/metrics.jsonl'):
    path.unlink()
  found = report.analyse(str(tmp_path), bootstrap=0)
  assert len(found.families[0].joint.table) == len(SIZES) * len(KS) and all(
    one.power for one in found.families[0].targets
  )
  (holes,) = (w for w in found.warnings if w['code'] == 'holes')
  assert f'of {len(SIZES) * len(KS)} finished cells' in holes['message']
  refused = [w['message'] for w in found.warnings if w['code'] == 'not_fitted']
  assert any(text.startswith('L(C) at k=3, 17: there are no curves') for text in refused)
  report.write(found, str(tmp_path / 'out'), 'bare')


def test_report_leaves_out_cells_that_are_no_better_than_the_mean(tmp_path, plain):
  write_ledger(str(tmp_path))
  exploded = cell(65536, 17, 1e6)
  cells.write(str(tmp_path), exploded, {1: 3.0, 100: 2.9e25}, nmse=2.9e25, **spent(65536, 100))
  found = report.analyse(str(tmp_path), bootstrap=0)

  def constants(fits):
    return [p['estimate'] for fit in fits for p in fit.params.values()]

  # It would move the joint law's alpha from below 0 to hundreds.
  assert constants(found.fits) == pytest.approx(constants(plain.fits), rel=1e-9)
  (said,) = (w for w in found.warnings if w['code'] == 'no_better_than_mean')
  assert (
    f'1 finished cells reconstruct no better than the mean does and are in no law: {exploded.id} (NMSE 2.9e+25'
    in said['message']
  )
  assert not any(w['code'] == 'not_at_convergence' for w in found.warnings)
  report.write(found, str(tmp_path / 'out'), 'exploded')
  rows = table.read_csv(str(tmp_path / 'out' / 'table.csv')).set_index('id')
  assert rows['no_better_than_mean'].sum() == 1 and rows.loc[exploded.id, 'no_better_than_mean']
  assert not rows.loc[exploded.id, 'best_learning_rate']
  # A table that somebody fits by hand, from the ledger or from the file, leaves it out too.
  for points in (read_ledger.load_ledger(str(tmp_path)), rows.reset_index()):
    fit = fit_law(points, 'joint_nk', bootstrap=0)
    assert constants([fit]) == pytest.approx(constants([plain.families[0].joint]), rel=1e-6)
    assert 'no_better_than_mean' in {w['code'] for w in fit.warnings}


def test_report_names_cells_that_are_not_at_convergence(tmp_path):
  write_ledger(str(tmp_path), ks=[3])
  stale = cell(65536, 3)
  cells.write(str(tmp_path), stale, nmse=law(32768, 3) * 1.01, **spent(65536, 100))
  found = report.analyse(str(tmp_path), bootstrap=0)
  (warning,) = (w for w in found.warnings if w['code'] == 'not_at_convergence')
  assert f'{stale.id} (k=3' in warning['message'] and 'n=32768' in warning['message']


def test_report_of_a_converged_ledger_names_none(plain):
  assert 'not_at_convergence' not in {w['code'] for w in plain.warnings}


def test_report_of_few_cells_says_which_law_is_missing_and_why(tmp_path, capsys):
  write_ledger(str(tmp_path / 'ledger'), sizes=[1024, 2048], ks=[3, 7])
  with pytest.raises(SystemExit) as code:
    report.main(['--ledger', str(tmp_path / 'ledger'), '--out', str(tmp_path / 'out'), '--bootstrap=5'])
  assert code.value.code == 0
  page, shown = (tmp_path / 'out' / 'index.html').read_text(), capsys.readouterr().out
  for text in (page, shown):
    assert 'L(n,k): 4 different points' in text and 'L(n) at k=3, 7: 2 sizes' in text
    assert text.lower().count('not attempted') == 1
  assert shown.splitlines()[-1] == f'report: {tmp_path / "out" / "index.html"}'


def test_report_of_an_empty_ledger_is_written(tmp_path):
  cells.write(str(tmp_path / 'ledger'), cell(1024, 3), finished=False)
  found = report.analyse(str(tmp_path / 'ledger'))
  path = report.write(found, str(tmp_path / 'out'), 'empty')
  assert files.exists(path) and json.loads((tmp_path / 'out' / 'laws.json').read_text()) == []


def test_report_written_again_removes_its_own_old_figures_and_nothing_else(tmp_path, plain):
  alone = dataclasses.replace(plain.families[0], targets=[], comparisons=[])
  report.write(dataclasses.replace(plain, families=[alone]), str(tmp_path), 'first')
  before = {p.name for p in tmp_path.iterdir()}
  (tmp_path / 'notes.png').write_bytes(b'mine')
  (tmp_path / 'residuals.png').write_bytes(b'mine too')  # in the place of what the report wrote
  none = dataclasses.replace(plain, families=[dataclasses.replace(alone, joint=None)])
  report.write(none, str(tmp_path), 'second')
  after = {p.name for p in tmp_path.iterdir()}
  assert before - after == {'joint.png', 'joint.pdf', 'residuals.pdf'}
  assert (tmp_path / 'notes.png').read_bytes() + (tmp_path / 'residuals.png').read_bytes() == b'minemine too'


def test_report_without_a_ledger_ends_with_one_line(tmp_path, capsys):
  with pytest.raises(SystemExit) as code:
    report.main(['--ledger', str(tmp_path / 'no'), '--out', str(tmp_path)])
  assert code.value.code == 2
  assert capsys.readouterr().err.count('\n') == 1


def test_report_answers_every_question_of_a_full_ledger():
  found = full_ledger.findings()
  entries = {(e['y'], e['law'], tuple(e['x']), e['where'].get('k')): e for e in found.to_json()}
  for k in full_ledger.KS:
    rate = entries['learning_rate', 'power_no_floor', ('n_latents',), k]['params']['b']['estimate']
    assert rate == pytest.approx(full_ledger.RATE_EXPONENT, abs=0.02)
    both = entries['nmse', 'additive2', ('n_latents', 'tokens'), k]
    assert both['params']['alpha']['estimate'] == pytest.approx(full_ledger.ALPHA, abs=0.02)
    share = full_ledger.BETA / (full_ledger.ALPHA + full_ledger.BETA)
    assert both['allocation']['exponent_n']['estimate'] == pytest.approx(share, abs=0.02)
    assert entries['converged_tokens', 'growth', ('n_latents',), k]['params']['p']['estimate'] > 0.2
    family = entries['nmse', 'family_separate', ('n_latents', 'is_1'), k]['family']
    exponents = [row['exponent'] for row in family['exponents']]
    np.testing.assert_allclose(exponents, [full_ledger.ALPHA, full_ledger.ALPHA - 0.15], atol=0.02)
    assert family['subjects'] == list(full_ledger.SUBJECTS) and family['verdict'] == 'separate'
  assert entries['n_latents', 'growth', ('budget',), 7]['n_points'] >= 3
  assert found.not_attempted == []


def test_report_draws_every_law_of_a_full_ledger():
  drawn = report.figures(full_ledger.findings())
  of_k = {f'{name}_k{k}' for name in ('isoflop', 'learning_rates', 'allocation', 'family') for k in full_ledger.KS}
  assert set(drawn) == {'joint', 'residuals', 'power', 'frontier', 'converged', 'best_size'} | of_k
  for name, figure in drawn.items():  # what holds for the ledger is said on each of them
    assert '! several subjects' in figure._supxlabel.get_text(), name


def test_report_of_several_subjects_fits_one_and_says_which():
  found = full_ledger.findings()
  (warning,) = (w for w in found.warnings if w['code'] == 'several_subjects')
  assert full_ledger.SUBJECTS[0] in warning['message'] and '--subject' in warning['message']
  assert set(found.families[0].joint.table['subject']) == {full_ledger.SUBJECTS[0]}
  assert set(found.families[0].joint.table['tokens']) == {full_ledger.TOKENS[-1]}  # and its longest runs


def test_report_of_the_subject_one_asks_for(tmp_path):
  full_ledger.write(tmp_path, ks=(3,))
  found = report.analyse(str(tmp_path), bootstrap=0, subject=full_ledger.SUBJECTS[1])
  assert set(found.families[0].targets[0].power.table['subject']) == {full_ledger.SUBJECTS[1]}
  assert found.families[0].targets[0].power.params['b']['estimate'] == pytest.approx(full_ledger.ALPHA - 0.15, abs=0.02)
  with pytest.raises(UserError, match='planted-c'):
    report.analyse(str(tmp_path), bootstrap=0, subject='planted-c')


def test_report_does_not_warn_of_questions_the_sweep_did_not_ask(plain):
  assert [text.partition(',')[0] for text in plain.not_attempted] == ['lr(n)', 'L(n', 'L_s(n)']
  assert not any(text in w['message'] for w in plain.warnings for text in ('lr(n)', 'L(n,T)', 'L_s(n)'))


def test_report_says_a_refusal_once_for_all_k(tmp_path):
  planted_ledger.write(tmp_path, sizes=planted_ledger.SIZES[:3], ks=planted_ledger.KS[:2], converged=False)
  found = report.analyse(str(tmp_path), bootstrap=0)
  (refused,) = (w for w in found.warnings if w['code'] == 'not_fitted' and w['message'].startswith('T(n)'))
  assert refused['message'].startswith(f'T(n) at k={", ".join(map(str, planted_ledger.KS[:2]))}: 0 of 3 runs converged')


@pytest.fixture(scope='module')
def families(tmp_path_factory):
  """What a ledger of two families says, of which one was asked for k and the other for coefficients; one has curves."""
  ledger = planted_ledger.write(tmp_path_factory.mktemp('families'), sizes=planted_ledger.SIZES[:5], ks=(3, 17))
  few = {'sizes': planted_ledger.SIZES[:5], 'coefficients': (0.01, 0.1)}
  planted_ledger.write_penalised(ledger, **few)
  planted_ledger.write_penalised(ledger, **few, rates=(3.0,), seed=5)
  done = read_ledger.load_ledger(ledger)
  for cell_id in done.loc[done['target'] != 'sparsity=0.1', 'id']:
    files.remove(files.join(ledger, 'cells', cell_id, 'metrics.jsonl'))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(solve, '_STARTS', 16)  # these tables are easy, and starts are most of the time
    return report.analyse(ledger, bootstrap=0)


def test_report_of_two_families_has_the_laws_of_each(families):
  by_l0, by_k = families.families
  assert (by_l0.name, by_k.name) == ('relu', 'topk') and len(by_k.fits) == 3 < len(by_l0.fits)
  for one in families.families:
    assert {fit.where['activation'] for fit in one.fits} == {one.name}
    assert all(set(fit.table.get('activation', [one.name])) == {one.name} for fit in one.fits)
  assert by_k.joint.x == ('n_latents', 'k') and by_l0.joint.x == ('n_latents', 'l0')
  # Families are compared at equal L0, where one is planted worse than the other.
  ratio = by_l0.joint.predict({'n_latents': 4096, 'l0': 9}) / by_k.joint.predict({'n_latents': 4096, 'k': 9})
  assert ratio[0] == pytest.approx(planted_ledger.WORSE, rel=0.01)
  wheres = [entry['where'] for entry in families.to_json() if entry['law'] == 'power' and entry['x'] == ['n_latents']]
  assert wheres == [
    {'activation': 'relu', 'sparsity': 0.01},
    {'activation': 'relu', 'sparsity': 0.1},
    {'activation': 'topk', 'k': 3},
    {'activation': 'topk', 'k': 17},
  ]
  assert by_l0.joint.label == 'L(n, L0), relu' and by_l0.targets[0].power.label == 'L(n), relu, sparsity = 0.01'
  assert 'lr(n)' not in ' '.join(by_l0.not_attempted) and 'lr(n)' in ' '.join(by_k.not_attempted)


def test_report_of_two_families_says_whose_a_warning_is(families):
  refused = [w['message'] for w in families.warnings if w['code'] == 'not_fitted']
  curves = [text for text in refused if text.startswith('L(C) at ')]  # said once for both, which lack them elsewhere
  assert len(curves) == 1 and curves[0].startswith('L(C) at sparsity=0.01: there are no curves')
  assert curves[0].endswith(' [relu]; the like for topk')
  assert any(text.startswith('lr(n) at sparsity=0.01: 0 sizes') and text.endswith(' [relu]') for text in refused)
  unequal = {one.name: [w['code'] for one in one.targets for w in one.power.warnings] for one in families.families}
  assert 'unequal_sparsity' in unequal['relu'] and 'unequal_sparsity' not in unequal['topk']
  missing = {text.partition(',')[0]: text for text in families.not_attempted}
  assert missing['lr(n)'].endswith('one rate a size [topk]') and missing['L_s(n)'].endswith('one subject')


def test_report_of_two_families_compares_them_at_equal_l0(families, tmp_path):
  found = families.compared.ratio('relu', 'topk')
  assert found.value == pytest.approx(planted_ledger.WORSE, rel=0.01)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, 'figures', lambda found: {})
    text = files.read(report.write(families, str(tmp_path), 'two')).decode()
  assert 'Families at equal L0' in text and 'NMSE over topk' in text and '<td>relu</td>' in text


def test_report_of_two_families_has_a_folder_of_figures_each(families, tmp_path):
  drawn = report.figures(families)
  same = {'joint', 'residuals', 'power'}
  assert drawn.keys() >= {f'{name}/{kind}' for name in ('relu', 'topk') for kind in same}
  assert drawn.keys() >= {'relu/frontier', 'relu/isoflop_sparsity0.1', 'relu/learning_rates_sparsity0.01'}
  together = [name for name in drawn if '/' not in name]
  assert together == ['frontiers', 'scaling']
  for key, figure in ((name, drawn[name]) for name in drawn if name not in together):
    said = [ax.get_title() for ax in figure.axes] + [
      text.get_text() for box in figure.legends for text in box.get_texts()
    ]
    assert any(key.partition('/')[0] in text for text in said), key
  (ax,) = drawn['relu/joint'].axes  # against L0: a line for every n
  assert 'L0' in ax.get_xlabel() and 'L_0' in ax.get_title()
  kept = {name: drawn[name] for name in ('relu/isoflop_sparsity0.1', 'topk/joint')}
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(report, 'figures', lambda found: kept)
    path = report.write(families, str(tmp_path), 'two')
    assert page.figure_digests(files.read(path).decode()).keys() == {
      f'{name}.{kind}' for name in kept for kind in ('png', 'pdf')
    }
    kept = {}
    report.write(families, str(tmp_path), 'none')
  assert [p.name for p in tmp_path.rglob('*.p*')] == []
  rows = table.read_csv(str(tmp_path / 'table.csv'))
  assert rows.groupby('activation')['target'].unique().map(sorted).to_dict() == {
    'relu': ['sparsity=0.01', 'sparsity=0.1'],
    'topk': ['k=17', 'k=3'],
  }
  mine = rows[rows['activation'] == 'relu']
  fit = fit_law(mine[mine['best_learning_rate']], 'joint_nk', ['n_latents', 'l0'], bootstrap=0)
  assert constants_of(fit) == pytest.approx(constants_of(families.families[0].joint), rel=1e-4)


def constants_of(fit):
  return [p['estimate'] for p in fit.params.values()]


def test_report_says_where_cells_of_one_k_miss_it(tmp_path):
  write_ledger(str(tmp_path), sizes=SIZES[:4], ks=[17])
  for i, path in enumerate(sorted(tmp_path.glob('cells/*/result.json'))):
    cells.edit(str(path), l0=17.0 - i)
    (path.parent / 'metrics.jsonl').unlink()  # it says otherwise
  (one,) = report.analyse(str(tmp_path), bootstrap=0).families[0].targets
  (said,) = (w['message'] for w in one.power.warnings if w['code'] == 'unequal_sparsity')
  assert said.startswith('at k=17 L0 runs from 14 to 17: ')


def test_report_has_a_law_over_l0_where_more_latents_are_active_than_were_asked_for(tmp_path):
  write_ledger(str(tmp_path), sizes=SIZES[:4])
  for path in tmp_path.glob('cells/*/result.json'):
    record = json.loads(path.read_text())
    cells.edit(str(path), l0=2.0 * record['k'])
    (path.parent / 'metrics.jsonl').unlink()
  (family,) = report.analyse(str(tmp_path), bootstrap=0).families
  assert family.joint.x == ('n_latents', 'l0') and [one.where for one in family.targets] == [{'k': k} for k in KS]


def test_report_of_one_coefficient_has_no_law_over_l0(tmp_path):
  planted_ledger.write_penalised(tmp_path, sizes=planted_ledger.SIZES[:4], coefficients=(0.03,))
  found = report.analyse(str(tmp_path), bootstrap=0)
  (one,) = found.families
  assert one.joint is None and one.targets[0].power and one.targets[0].where == {'sparsity': 0.03}
  refused = [w['message'] for w in found.warnings if w['code'] == 'not_fitted']
  assert 'L(n,L0): sparsity=0.03 alone; a law over n and L0 needs another one' in refused
  names = set(report.figures(found))
  assert {'power', 'isoflop_sparsity0.03'} <= names and 'joint' not in names
