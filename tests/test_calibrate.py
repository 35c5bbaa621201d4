"""Predictions are written before the cells exist, and a cell inside its band is told from one outside."""

import json
import pathlib

import pytest

from analysis import calibrate, plots
from analysis.fitting import solve
from sae_jax.errors import UserError
from tests import cells, planted_ledger

SMALL, LARGE = planted_ledger.SIZES[:4], planted_ledger.SIZES[4:]
PAIRS = [{'n_latents': n, 'k': k} for n in LARGE for k in planted_ledger.KS]


@pytest.fixture(scope='module')
def planted(tmp_path_factory):
  folder = tmp_path_factory.mktemp('calibrate')
  small = planted_ledger.write(folder / 'small', sizes=SMALL, noise=0.003, seed=1)
  out = str(folder / 'predictions.json')
  record = calibrate.write_predictions(small, PAIRS, out, bootstrap=50)
  return folder, small, out, record


def test_calibrate_cells_of_the_law_fall_inside(planted):
  folder, _, out, record = planted
  large = planted_ledger.write(folder / 'large', sizes=LARGE, noise=0.003, seed=2)
  found = calibrate.check(out, large)
  assert len(found.cells) == len(PAIRS) == len(record['predictions']) and not found.missing
  assert found.inside >= len(PAIRS) - 1
  assert found.cells['rel_err'].abs().max() < 0.05
  assert f'{found.inside} of {len(PAIRS)} inside' in found.summary()
  assert json.loads(json.dumps(found.to_json(), allow_nan=False))['n_cells'] == len(PAIRS)


def test_calibrate_cells_of_another_law_fall_outside(planted):
  folder, _, out, _ = planted
  large = pathlib.Path(planted_ledger.write(folder / 'worse', sizes=LARGE, noise=0.003, seed=2))
  for path in large.glob('cells/*/result.json'):
    record = json.loads(path.read_text())
    cells.edit(str(path), nmse=record['nmse'] * 1.5)
    (path.parent / 'metrics.jsonl').unlink()  # it says otherwise
  found = calibrate.check(out, str(large))
  assert found.inside == 0 and found.p_so_few < 1e-4
  assert (found.cells['rel_err'] < -0.2).all()


def test_calibrate_predicts_nothing_without_a_band(tmp_path):
  few = planted_ledger.write(tmp_path / 'few', sizes=SMALL[:3], ks=planted_ledger.KS[:2])
  with pytest.raises(UserError, match=r'band of n=.* is unknown: 6 cells for the 6 constants'):
    calibrate.write_predictions(few, PAIRS[:1], str(tmp_path / 'x'), bootstrap=20)
  with pytest.raises(UserError, match='L0=7 is asked of no cell'):
    calibrate.write_predictions(few, [{'n_latents': LARGE[0], 'l0': 7}], str(tmp_path / 'x'), bootstrap=0)
  assert not (tmp_path / 'x').exists()


def test_calibrate_figure_that_cannot_be_written_is_one_line(planted, tmp_path, capsys):
  folder, _, out, _ = planted
  large = planted_ledger.write(folder / 'drawn', sizes=LARGE[:1], noise=0.003)
  with pytest.raises(SystemExit) as code:
    calibrate.main(['--check', out, '--ledger', large, '--figure', str(tmp_path / 'calibration.txt')])
  error = capsys.readouterr().err
  assert code.value.code == 2 and error.count('\n') == 1 and '--figure' in error


def test_calibrate_names_what_is_not_finished(planted):
  folder, _, out, _ = planted
  part = planted_ledger.write(folder / 'part', sizes=LARGE[:1], noise=0.003)
  found = calibrate.check(out, part)
  assert len(found.missing) == len(planted_ledger.KS) and f'n={LARGE[1]} k=3' in found.summary()


def test_calibrate_refuses_what_would_not_be_a_check(planted, tmp_path):
  folder, small, out, record = planted
  with pytest.raises(UserError, match='never replaced'):
    calibrate.write_predictions(small, PAIRS, out, bootstrap=0)
  with pytest.raises(UserError, match='does not hold'):
    calibrate.write_predictions(small, [{'n_latents': SMALL[0], 'k': 3}], str(tmp_path / 'p.json'), bootstrap=0)
  with pytest.raises(UserError, match='no finished cell'):
    calibrate.check(out, small)
  fitted = tmp_path / 'fitted.json'
  own = record['predictions'][0] | {'n_latents': SMALL[0]}
  fitted.write_text(json.dumps(record | {'predictions': [own]}))
  with pytest.raises(UserError, match='was fitted'):
    calibrate.check(str(fitted), small)
  other = tmp_path / 'other.json'
  tokens = [p | {'tokens': p['tokens'] + 11} for p in record['predictions']]
  other.write_text(json.dumps(record | {'predictions': tokens}))
  with pytest.raises(UserError, match='train it as predicted'):
    calibrate.check(str(other), planted_ledger.write(folder / 'again', sizes=LARGE))


@pytest.mark.parametrize('text', ['', '[]', '{"predictions": [{}]}', '{"predictions": 3}', 'null'])
def test_calibrate_bad_file_is_one_line(planted, tmp_path, text, capsys):
  path = tmp_path / 'bad.json'
  path.write_text(text)
  with pytest.raises(UserError, match='no file of predictions'):
    calibrate.check(str(path), planted[1])


def test_calibrate_command_line(planted, tmp_path, capsys):
  _, small, _, _ = planted
  with pytest.raises(SystemExit):
    calibrate.main(['--ledger', small, '--n_latents', '2e3', '--k', '3', '--out', str(tmp_path / 'x')])
  assert 'whole numbers' in capsys.readouterr().err


def test_calibrate_cells_that_are_asked_for_by_a_coefficient(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(solve, '_STARTS', 16)  # these tables are easy, and starts are most of the time
  small = planted_ledger.write_penalised(tmp_path / 'ledger', sizes=SMALL, noise=0.003)
  planted_ledger.write(small, sizes=SMALL[:2], ks=(3,))
  large = planted_ledger.write_penalised(tmp_path / 'large', sizes=LARGE, noise=0.003, seed=3)
  planted_ledger.write(large, sizes=LARGE[:1], ks=(3,))
  out, how = str(tmp_path / 'p.json'), f'--n_latents={LARGE[0]} --sparsity=0.1,0.3 --activation=relu'
  with pytest.raises(SystemExit) as code:
    calibrate.main([f'--ledger={small}', f'--out={out}', *how.split()])
  assert code.value.code == 0 and f'n={LARGE[0]} activation=relu sparsity=0.1: NMSE' in capsys.readouterr().out
  found = calibrate.check(out, large)
  assert found.cells['sparsity'].tolist() == [0.1] and found.cells['rel_err'].abs().max() < 0.03
  assert found.missing == [{'n_latents': LARGE[0], 'activation': 'relu', 'sparsity': 0.3}]
  assert 'sparsity   predicted' in found.summary() and 'sparsity=0.3' in found.summary()
  (left, _) = plots.calibration(found.cells).axes
  assert 'predicted' in left.get_ylabel()


def test_calibrate_compares_with_cells_of_its_family_alone(planted, tmp_path):
  record = planted[3]
  assert record['activation'] == 'topk'
  other = tmp_path / 'other.json'
  other.write_text(json.dumps(record | {'activation': 'another'}))
  with pytest.raises(UserError, match='no finished cell'):
    calibrate.check(str(other), planted_ledger.write(tmp_path / 'ledger', sizes=LARGE[:1]))
