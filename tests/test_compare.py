import json

import numpy as np
import pandas as pd
import pytest

from analysis import compare, fit, report
from analysis.fitting import uncertainty
from tests import planted_ledger


def pair(e, noise=0.003, sizes=14, bootstrap=0, holdout='n_latents>32768'):
  rng = np.random.default_rng(0)
  n = 2.0 ** np.arange(4, 4 + sizes)
  points = pd.DataFrame({'n_latents': n, 'nmse': (e + 3 * n**-0.4) * np.exp(noise * rng.normal(size=sizes))})
  return compare.Comparison(
    *(fit.fit_law(points, law, bootstrap=bootstrap, holdout=holdout) for law in ('power', compare.WITHOUT['power']))
  )


def test_comparison_supports_an_irreducible_loss_that_is_there():
  found = pair(0.1)
  assert found.verdict == 'supported' and found.aicc_gain > 20
  assert found.holdout_errors[0] < found.holdout_errors[1]


def test_comparison_does_not_support_one_that_is_not():
  found = pair(0.0, noise=0.02)
  assert found.verdict != 'supported' and found.aicc_gain < 2


def test_comparison_without_enough_points_is_undecided():
  few = pair(0.1, sizes=5, holdout=None)
  assert few.verdict.startswith('undecided: too few points') and np.isnan(few.aicc_gain)
  assert few.to_json()['aicc_gain'] is None and few.to_json()['holdout'] is None
  json.dumps(few.to_json(), allow_nan=False)


def test_comparison_of_a_loss_that_is_not_identified_is_undecided():
  found = pair(0.1)
  doubt = found.floored.warned({'code': 'asymptote_not_identified', 'message': ''})
  assert compare.Comparison(doubt, found.plain).verdict.startswith('undecided')


def test_comparison_of_huber_fits_says_why_aicc_is_missing():
  points = pair(0.1).floored.table
  found = compare.Comparison(
    *(
      fit.fit_law(points, law, bootstrap=0, objective='huber', holdout='n_latents>32768')
      for law in ('power', 'power_no_floor')
    )
  )
  assert found.to_json()['aicc'] is None
  assert found.verdict == f'undecided: {uncertainty.NO_AICC}' and 'likelihood' in found.verdict


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp('compare')
  found = report.analyse(planted_ledger.write(folder / 'ledger', noise=0.0005), bootstrap=5)
  report.write(found, str(folder / 'out'), 'title')
  return found, folder / 'out'


def test_report_compares_every_law_with_and_without(written):
  found, out = written
  labels = [c.floored.label for c in found.comparisons]
  ks = planted_ledger.KS
  assert labels[0] == 'L(n, k)' and set(labels[1:]) == {f'L({x}), k = {k}' for x in 'nC' for k in ks}
  assert found.comparisons[0].verdict == 'supported'
  entries = json.loads((out / 'laws.json').read_text(), parse_constant=pytest.fail)
  joint = next(e for e in entries if e['law'] == 'joint_nk')
  assert joint['comparison']['law'] == 'joint_nk_no_floor' and joint['comparison']['irreducible_loss'] == 'supported'
  assert joint['comparison']['holdout_mean_rel_err'] > joint['holdout']['mean_rel_err']
  assert 'comparison' not in next(e for e in entries if e['x'] == ['flops_dense'])
  assert 'Is there an irreducible loss?' in (out / 'index.html').read_text()
