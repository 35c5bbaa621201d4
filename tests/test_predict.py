import json

import numpy as np
import pytest

from analysis import predict
from analysis.fitting import solve
from sae_jax import flops, schema
from sae_jax.errors import UserError
from tests import planted_ledger


@pytest.fixture(scope='module')
def ledger(tmp_path_factory):
  return planted_ledger.write(tmp_path_factory.mktemp('predict'), noise=0.003)


def test_predict_finds_the_loss_of_a_larger_cell(ledger):
  found = predict.predict(ledger, {'n_latents': 65536, 'k': 7}, bootstrap=60)
  truth = planted_ledger.loss(65536, 7)
  assert found.nmse == pytest.approx(truth, rel=0.02)
  assert found.low < truth < found.high
  assert found.beyond == {'n_latents': pytest.approx(np.log10(2)), 'k': 0.0}
  assert found.fit.holdout['rule'] == 'n_latents>16384'


def test_predict_counts_the_cost_at_the_tokens_of_the_ledger(tmp_path):
  ledger = planted_ledger.write(tmp_path)
  for path in tmp_path.glob('cells/*/result.json'):  # as before the FLOPs of the subject were recorded
    record = schema.content(json.loads(path.read_text()))
    del record['flops_subject']
    path.write_text(json.dumps(record))
  found = predict.predict(ledger, {'n_latents': 3000, 'k': 7}, bootstrap=0)
  steps, batch, d = planted_ledger.STEPS, planted_ledger.BATCH, planted_ledger.D
  spent = flops.step_flops(3000, 7, d, batch)
  assert found.tokens == steps * batch
  assert found.flops_useful == pytest.approx(steps * spent['useful'])
  assert found.flops_dense == pytest.approx(steps * spent['dense'])
  assert np.isnan(found.flops_subject)  # the ledger does not say, and that is not 0
  assert found.to_json()['flops_subject'] is None


def test_predict_interval_widens_with_distance_and_says_how_far(ledger):
  sizes = (8192, 2**17, 2**22)
  found = [predict.predict(ledger, {'n_latents': n, 'k': 7}, bootstrap=25) for n in sizes]
  width = [np.log(p.high / p.low) for p in found]
  assert width[0] < width[1] < width[2]
  codes = [{w['code'] for w in p.warnings} for p in found]
  assert [{'far_extrapolation'} <= c for c in codes] == [False, False, True]
  assert [{'beyond_holdout'} <= c for c in codes] == [False, True, True]
  below = predict.predict(ledger, {'n_latents': 512, 'k': 2}, bootstrap=0)
  assert below.beyond == {'n_latents': pytest.approx(-np.log10(2)), 'k': pytest.approx(np.log10(2 / 3))}


def test_predict_of_cells_that_still_improve_says_so(tmp_path):
  at = {'n_latents': 65536, 'k': 7}
  still = planted_ledger.write(tmp_path, converged=False)
  assert 'still_improving' in {w['code'] for w in predict.predict(still, at, bootstrap=0).warnings}


def test_predict_from_one_k_uses_a_law_over_n(tmp_path):
  ledger = planted_ledger.write(tmp_path, ks=(7,))
  found = predict.predict(ledger, {'n_latents': 65536, 'k': 7}, bootstrap=0)
  assert found.fit.law.name == 'power' and found.low < planted_ledger.loss(65536, 7) < found.high
  with pytest.raises(UserError, match='k=3 cannot be predicted'):
    predict.predict(ledger, {'n_latents': 65536, 'k': 3}, bootstrap=0)


def test_predict_refuses_a_ledger_of_two_widths(tmp_path):
  planted_ledger.write(tmp_path)
  planted_ledger.write(tmp_path, sizes=(512,), d_model=17)
  with pytest.raises(UserError, match='d_model 13, 17'):
    predict.predict(str(tmp_path), {'n_latents': 65536, 'k': 3}, bootstrap=0)


def test_predict_interval_is_that_of_a_new_observation(ledger):
  found = predict.predict(ledger, {'n_latents': 65536, 'k': 7}, bootstrap=20)
  low, high = found.fit.interval({'n_latents': [65536, 2**20], 'k': [7, 7]})
  assert (found.low, found.high) == pytest.approx((low[0], high[0]), rel=1e-12)
  inner, outer = found.fit.band({'n_latents': [65536], 'k': [7]})
  assert found.low < inner[0] < found.nmse < outer[0] < found.high


BAD = {
  '': 'not a size',
  'n_latents': 'not a size',
  'n_latents=8,k=2,k=3': 'not a size',
  'n_latents=8': 'n_latents and k',
  'n_latents=8,k=2,d=3': 'n_latents and k',
  'n_latents=many,k=2': 'not a number',
  'n_latents=8.5,k=2': 'whole number',
  'n_latents=nan,k=2': 'whole number',
  'n_latents=1e400,k=2': 'whole number',
  'n_latents=-8,k=2': 'whole number',
  'n_latents=8,k=0': 'whole number',
  'n_latents=8,k=9': 'exceeds',
}


@pytest.mark.parametrize('text', BAD)
def test_predict_command_ends_with_one_line(text, ledger, capsys):
  with pytest.raises(SystemExit) as code:
    predict.main([f'--ledger={ledger}', f'--at={text}'])
  assert code.value.code == 2
  error = capsys.readouterr().err
  assert error.count('\n') == 1 and BAD[text] in error


@pytest.mark.parametrize('sizes', [(), (1024, 2048)])
def test_predict_from_too_few_cells_ends_with_one_line(sizes, tmp_path, capsys):
  (tmp_path / 'cells').mkdir()
  planted_ledger.write(tmp_path, sizes=sizes, ks=(3, 7))
  with pytest.raises(SystemExit) as code:
    predict.main([f'--ledger={tmp_path}', '--at=n_latents=4096,k=7'])
  assert code.value.code == 2
  assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.parametrize('case', ['no folder', 'a file', 'broken results'])
def test_predict_from_an_unreadable_ledger_ends_with_one_line(case, tmp_path, capsys):
  path = tmp_path / 'ledger'
  if case == 'a file':
    path.write_text('{}')
  if case == 'broken results':
    planted_ledger.write(path)
    for result in path.glob('cells/*/result.json'):
      result.write_bytes(b'\x00{')
  with pytest.raises(SystemExit) as code:
    predict.main([f'--ledger={path}', '--at=n_latents=4096,k=7'])
  assert code.value.code == 2
  assert capsys.readouterr().err.count('\n') == 1


def test_predict_names_the_cells_it_lacks(tmp_path):
  planted_ledger.write(tmp_path)
  lacking = sorted(path.name for path in (tmp_path / 'cells').iterdir())[:2]
  for name in lacking:
    (tmp_path / 'cells' / name / 'result.json').unlink()
  found = predict.predict(str(tmp_path), {'n_latents': 65536, 'k': 7}, bootstrap=0)
  (warning,) = (w for w in found.warnings if w['code'] == 'cells_missing')
  assert warning['message'] == f'2 waiting cells are left out: {lacking[0]}, {lacking[1]}'


def test_predict_command_prints_the_held_out_error_and_writes_strict_json(ledger, tmp_path, capsys):
  out = tmp_path / 'p.json'
  with pytest.raises(SystemExit) as code:
    predict.main([f'--ledger={ledger}', '--at=n_latents=1e7, k=7', f'--json={out}', '--bootstrap=30'])
  assert code.value.code == 0
  record = json.loads(out.read_text(), parse_constant=pytest.fail)
  assert record['at'] == {'n_latents': 10_000_000, 'k': 7}
  assert record['low'] < record['nmse'] < record['high'] and record['holdout']['mean_rel_err'] < 0.05
  shown = capsys.readouterr().out
  assert 'held out: 3 with n_latents>16384' in shown and '2.48 decades above n = 32768' in shown
  assert 'far_extrapolation' in shown


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  ledger = planted_ledger.write(tmp_path_factory.mktemp('families'), ks=(3, 7))
  return planted_ledger.write_penalised(ledger)


@pytest.fixture
def families(written, monkeypatch):
  """Cells of two families: one asked for k, the other for coefficients."""
  monkeypatch.setattr(solve, '_STARTS', 16)  # these tables are easy, and starts are most of the time
  return written


def test_predict_at_a_measured_l0(families):
  found = predict.predict(families, {'n_latents': 65536, 'l0': 6.5, 'activation': 'relu'}, bootstrap=0)
  truth = planted_ledger.WORSE * planted_ledger.loss(65536, 6.5)
  assert found.nmse == pytest.approx(truth, rel=0.01) and found.low < truth < found.high
  assert found.fit.x == ('n_latents', 'l0') and found.beyond['l0'] == 0
  assert set(found.fit.table['activation']) == {'relu'}
  assert 'NMSE 0.' in found.summary() and 'at n = 65536, L0 = 6.5, relu' in found.summary()
  assert found.to_json()['at'] == {'n_latents': 65536, 'l0': 6.5, 'activation': 'relu'}
  # Useful FLOPs follow the active latents.
  steps, batch, d = planted_ledger.STEPS, planted_ledger.BATCH, planted_ledger.D
  assert found.flops_useful == pytest.approx(steps * flops.step_flops(65536, 6.5, d, batch)['useful'])
  far = predict.predict(families, {'n_latents': 2048, 'l0': 200, 'activation': 'relu'}, bootstrap=0)
  assert any(w['message'].startswith('L0 is 1.1 decades outside') for w in far.warnings)


def test_predict_at_a_coefficient(families):
  coefficient = planted_ledger.COEFFICIENTS[1]
  found = predict.predict(families, {'n_latents': 65536, 'sparsity': coefficient, 'activation': 'relu'}, bootstrap=0)
  truth = planted_ledger.WORSE * planted_ledger.loss(65536, planted_ledger.l0(65536, coefficient))
  assert found.fit.x == ('n_latents', 'sparsity') and found.nmse == pytest.approx(truth, rel=0.02)


def test_predict_at_the_l0_of_a_family_with_a_k(families):
  found = predict.predict(families, {'n_latents': 65536, 'l0': 7, 'activation': 'topk'}, bootstrap=0)
  assert found.nmse == pytest.approx(planted_ledger.loss(65536, 7), rel=0.01)


def test_predict_names_the_families_and_what_they_were_asked_for(families, capsys):
  at = {'n_latents': 65536, 'k': 7}
  with pytest.raises(SystemExit):
    predict.main([f'--ledger={families}', '--at=n_latents=65536,k=7'])
  assert 'the ledger has cells of relu, topk; name one of them: activation=relu' in capsys.readouterr().err
  assert predict.parse_at('n_latents=65536,k=7,activation=topk') == at | {'activation': 'topk'}
  with pytest.raises(UserError, match='no finished cell of activation=gated; the ledger has relu, topk'):
    predict.predict(families, at | {'activation': 'gated'}, bootstrap=0)
  with pytest.raises(UserError, match='has no k; predict at sparsity or l0'):
    predict.predict(families, at | {'activation': 'relu'}, bootstrap=0)


def test_predict_from_one_coefficient_stays_near_its_l0(tmp_path):
  ledger = planted_ledger.write_penalised(tmp_path, coefficients=(0.03,))
  found = predict.predict(ledger, {'n_latents': 65536, 'l0': 7.9}, bootstrap=0)
  assert found.fit.law.name == 'power'
  with pytest.raises(UserError, match=r'l0=20 cannot be predicted from cells of l0=6\.\d+ to 7\.\d+ alone'):
    predict.predict(ledger, {'n_latents': 65536, 'l0': 20}, bootstrap=0)
