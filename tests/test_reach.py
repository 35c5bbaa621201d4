"""The n and the compute that a loss takes, from a ledger of a planted law."""

import json

import pytest

from analysis import predict, reach
from analysis.fitting import solve
from sae_jax import flops
from sae_jax.errors import UserError
from tests import planted_ledger


@pytest.fixture(autouse=True)
def few_starts(monkeypatch):
  monkeypatch.setattr(solve, '_STARTS', 16)  # these tables are easy, and starts are most of the time


@pytest.fixture(scope='module')
def ledger(tmp_path_factory):
  return planted_ledger.write(tmp_path_factory.mktemp('reach'), ks=(3, 17))


def test_the_size_and_compute_of_a_loss_are_found(ledger):
  found = reach.reach(ledger, float(planted_ledger.loss(12_000, 17)), {'k': 17}, bootstrap=20)
  (row,) = found.rows
  n, spent = row['n_latents'], row['flops_useful']
  assert n.value == pytest.approx(12_000, rel=0.05) and n.low < 12_000 < n.high and row['beyond'] == 0
  steps, batch, d = planted_ledger.STEPS, planted_ledger.BATCH, planted_ledger.D
  assert found.tokens == steps * batch
  assert spent.value == pytest.approx(steps * flops.step_flops(int(n.value), 17, d, batch)['useful'], rel=1e-3)
  assert spent.low < spent.value < spent.high
  assert 'k = 17: n = ' in found.summary() and 'inside the sizes of the ledger' in found.summary()


def test_without_a_sparsity_every_target_is_answered(ledger, tmp_path, capsys):
  loss, out = float(planted_ledger.loss(2**18, 17)), tmp_path / 'r.json'
  with pytest.raises(SystemExit) as code:
    predict.main([f'--ledger={ledger}', f'--reach=nmse={loss}', '--bootstrap=0', '--activation=topk', f'--json={out}'])
  assert code.value.code == 0
  record = json.loads(out.read_text(), parse_constant=pytest.fail)
  assert [row['at'] for row in record['reached']] == [{'k': k, 'activation': 'topk'} for k in (3, 17)]
  assert record['reached'][1]['n_latents']['estimate'] == pytest.approx(2**18, rel=0.3)
  assert record['reached'][1]['beyond'] == pytest.approx(0.9, abs=0.1)
  assert 'far_extrapolation' in capsys.readouterr().out


REFUSED = {
  ('--reach=nmse=1e-3',): 'nmse=0.001 cannot be reached at k = 17: the irreducible loss of the law is 0.19',
  ('--reach=nmse=2',): 'nmse=2 is not in (0, 1)',
  ('--reach=loss=.3',): "--reach 'loss=.3' is not a loss",
  ('--reach=.3',): 'is not a size',
  ('--reach=nmse=.3', '--at=n_latents=64'): 'n_latents is what is looked for',
  ('--reach=nmse=.3', '--at=d=64'): 'not at d',
  ('--reach=nmse=.3', '--activation=relu'): 'no finished cell of activation=relu',
  ('--at=n_latents=64,k=3,activation=topk', '--activation=relu'): 'name one family',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_what_has_no_answer_ends_with_one_line(flags, ledger, capsys):
  with pytest.raises(SystemExit) as code:
    predict.main([f'--ledger={ledger}', '--bootstrap=0', *flags])
  error = capsys.readouterr().err
  assert code.value.code == 2 and error.count('\n') == 1 and REFUSED[flags] in error


def test_a_family_is_asked_for_by_its_flag(tmp_path, capsys):
  ledger = planted_ledger.write(tmp_path, sizes=planted_ledger.SIZES[:4], ks=(3, 17))
  planted_ledger.write_penalised(ledger, sizes=planted_ledger.SIZES[:4])
  with pytest.raises(UserError, match='name one of them'):
    reach.reach(ledger, 0.5)
  with pytest.raises(SystemExit) as code:
    predict.main([f'--ledger={ledger}', '--bootstrap=0', '--activation=relu', '--at=n_latents=4096,l0=9'])
  assert code.value.code == 0
  shown = capsys.readouterr().out
  assert (
    'L0 = 9, relu' in shown and 'exponent of n there' in shown and 'a doubling of L0 changes the loss by -' in shown
  )
