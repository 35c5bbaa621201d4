"""The comparison that starts the paper: verdicts follow from intervals, and the page shows what the table gives."""

import pathlib

import numpy as np
import pandas as pd
import pytest

from analysis import activations, equal_l0, table
from analysis.fitting import solve
from tests import planted_families

ROOT = pathlib.Path(__file__).parents[1]


def verdicts(monkeypatch, seed=0, **changes):
  """By claim, of a planted table; `changes` are (level, exponent) by family."""
  monkeypatch.setattr(planted_families, 'FAMILIES', planted_families.FAMILIES | changes)
  cells = planted_families.table(seed, sizes=(256, 1024, 4096), ks=(16, 32))
  return {one.claim: one for one in activations.verdicts(equal_l0.compare(cells))}


def test_claims_that_hold_are_reproduced(monkeypatch):
  found = verdicts(monkeypatch)
  assert {one.verdict for one in found.values()} == {'reproduced'} and len(found) == len(activations.CLAIMS)
  for one in found.values():
    assert one.number.low < one.number.value < one.number.high and str(one.number) in one.why
  assert 'n = 4,096, mean over L0 16, 32' in found['topk beats relu'].why


def test_claims_that_do_not_hold_are_not_reproduced(monkeypatch):
  found = verdicts(monkeypatch, relu=(0.9, 0.3), gated=(1.1, 0.25), prolu_relu=(0.9, 0.25))
  assert {one.verdict for one in found.values()} == {'not reproduced'}


def test_what_an_interval_does_not_decide_is_undecided(monkeypatch):
  found = verdicts(monkeypatch, 1, relu=(1.0, 0.25), gated=(activations.TIE, 0.25), prolu_relu=(1.0, 0.25))
  assert {one.verdict for one in found.values()} == {'undecided'}


def test_a_claim_without_its_cells_is_undecided_and_says_why():
  few = planted_families.table(names=('topk', 'relu'), sizes=(256,), ks=(16, 32), repeated=())
  found = {one.claim: one for one in activations.verdicts(equal_l0.compare(few))}
  assert {one.verdict for one in found.values()} == {'undecided'}
  assert found['topk matches gated'].why == 'the table has no cells of gated'
  assert 'share 1 sizes, and 2 are needed' in found['topk is steeper in n than relu'].why
  assert 'train some settings with a second seed' in found['topk beats relu'].why


def test_a_verdict_names_the_l0s_that_it_is_of():
  both = ('topk', 'relu')
  parts = [planted_families.table(0, names=both, sizes=(n,), ks=ks) for n, ks in ((256, (8, 16)), (1024, (64, 128)))]
  found = {one.claim: one for one in activations.verdicts(equal_l0.compare(pd.concat(parts).drop(columns='id')))}
  assert 'n = 1,024, mean over L0 64, 128:' in found['topk beats relu'].why
  assert found['topk is steeper in n than relu'].why == 'at equal L0 they share 1 sizes, and 2 are needed'


def test_command_draws_and_writes_everything(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(solve, '_STARTS', 16)  # these laws are easy, and starts are most of the time
  cells = tmp_path / 'cells.csv'
  planted_families.table(names=('topk', 'relu'), sizes=(256, 1024, 4096), ks=(16, 32)).to_csv(cells, index=False)
  with pytest.raises(SystemExit) as code:
    activations.main([str(cells), f'--out={tmp_path / "one"}'])
  assert code.value.code == 0
  names = {'frontiers.png', 'frontiers.pdf', 'scaling.png', 'scaling.pdf', 'tables.md', 'points.csv', 'laws.json'}
  made = {p.name: p.read_bytes() for p in (tmp_path / 'one').iterdir()}
  assert made.keys() == names and all(made.values())
  shown = capsys.readouterr().out
  assert 'topk beats relu (Figure 2a): reproduced' in shown and 'Seeds scatter by' in shown
  points = table.read_csv(str(tmp_path / 'one' / 'points.csv'))
  assert len(points) == 2 * 3 * 2 and np.all(points['low'] < points['nmse']) and np.all(points['nmse'] < points['high'])
  text = made['tables.md'].decode()
  for title in ('Claims of the paper', 'NMSE at L0 = ', 'Against topk', 'What more latents bring', 'L(n, L0)'):
    assert f'### {title}' in text
  lines = [line for line in text.splitlines() if line.startswith('|')]
  assert all(line.endswith('|') for line in lines) and 'nan' not in text


@pytest.mark.parametrize('ks_of_the_second', [(), (4,)])  # a size that reaches no common L0 is drawn as none
def test_one_size_is_drawn_without_a_figure_against_n(tmp_path, ks_of_the_second):
  few = planted_families.table(names=('topk', 'relu'), sizes=(256,), ks=(16, 32), repeated=())
  if ks_of_the_second:
    one = planted_families.table(names=('topk',), sizes=(1024,), ks=ks_of_the_second, repeated=())
    few = pd.concat([few, one.assign(id='f' * 12)], ignore_index=True)
  names = {pathlib.Path(path).name for path in activations.write(equal_l0.compare(few), str(tmp_path))}
  assert 'frontiers.png' in names and 'scaling.png' not in names


@pytest.mark.parametrize(
  'text, said',
  [
    ('', 'is empty'),
    ('activation,n_latents,l0\ntopk,64,3\n', "no column 'nmse'"),
    ('activation,n_latents,l0,nmse\ntopk,64,3,.2\ntopk,64,6,.1\n', 'cells of topk alone'),
    ('activation,n_latents,l0,nmse\ntopk,64,3,.2\nrelu,64,6,x\n', "nmse='x'"),
  ],
)
def test_command_refuses_in_one_line(text, said, tmp_path, capsys):
  (tmp_path / 'cells.csv').write_text(text)
  with pytest.raises(SystemExit) as code:
    activations.main([str(tmp_path / 'cells.csv'), f'--out={tmp_path / "out"}'])
  error = capsys.readouterr().err
  assert code.value.code == 2 and error.count('\n') == 1 and said in error


def test_the_page_shows_what_the_committed_table_gives():
  page, cells = ROOT / 'docs' / 'activations.md', ROOT / 'analysis' / 'data' / 'smollm2_activations.csv'
  text = activations.markdown(activations.tables(equal_l0.compare(table.read_csv(str(cells)))))
  assert text in page.read_text(), f'paste the tables.md of `make activations` into {page.name}'
