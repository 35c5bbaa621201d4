"""The table of activation functions holds the cells of its grid, and one of them trains to the same again."""

import csv
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from analysis import activations_table
from sae_jax import schema, training
from sweeps import grid
from tests import cells, planted_measures

ROOT = pathlib.Path(__file__).parents[1]
TABLE = ROOT / 'analysis' / 'data' / 'smollm2_activations.csv'
GRID = str(ROOT / 'sweeps' / 'grids' / 'activations.py')
FAMILIES = ('topk', 'batchtopk', 'gated', 'jumprelu_step', 'prolu_relu', 'relu')
# Of the store that the rows were trained on. Another machine may harvest other last bits, and its cells have other ids.
IDENTITY = '61e4ccfa79c546a3d1fa67f6f9e1fbf5cb09b80e98bfba4923496a672c56768e'


def table():
  with open(TABLE) as f:
    return list(csv.DictReader(f))


def cells_of_the_grid():
  return {one.id: one for _, one in grid.build(GRID).cells}


def asked(row):
  return row['activation'], *(int(row[key]) for key in ('n_latents', 'k', 'seed', 'tokens'))


def test_every_row_is_a_cell_of_the_grid(tmp_path, monkeypatch):
  from experiments import activations

  data = activations.get_config().data
  settings = {field.name: getattr(data, field.name) for field in schema.STORE_CONFIG if not field.may}
  facts = {'d_model': 576, 'config': settings, 'identity': IDENTITY}
  facts |= {'tokens': data.store_tokens, 'held_out_tokens': data.held_out_tokens}
  (tmp_path / 'store').mkdir()
  (tmp_path / 'store' / schema.STORE).write_text(json.dumps(facts))
  monkeypatch.setenv('RUNS', str(tmp_path))
  planned, rows = cells_of_the_grid(), table()
  everywhere = {(one.sae.activation, one.sae.n_latents, one.sae.k) for one in planned.values()}
  assert everywhere >= set(itertools.product(FAMILIES, (256, 1024, 4096), (8, 16, 32, 64)))
  assert rows and list(rows[0]) == activations_table.COLUMNS
  for row in rows:
    one = planned[row['id']]
    steps = one.train.steps * one.train.batch_tokens
    assert asked(row) == (one.sae.activation, one.sae.n_latents, one.sae.k, one.train.seed, steps)
    assert one.train.steps >= 1000 and one.recipe.name == one.sae.activation


def test_table_has_the_finished_cells_in_one_order(tmp_path):
  ledger, out = str(tmp_path / 'ledger'), tmp_path / 'table.csv'
  small, large = cells.cell(), cells.cell(**{'sae.n_latents': 96})
  for one, finished in ((large, True), (small, True), (cells.cell(**{'train.seed': 7}), False)):
    cells.write(ledger, one, finished=finished)
  with pytest.raises(SystemExit, match='0'):
    activations_table.main([f'--ledger={ledger}', f'--out={out}'])
  header, *lines = out.read_text().splitlines()
  assert header.split(',') == activations_table.COLUMNS
  assert [line.split(',')[0] for line in lines] == [small.id, large.id]
  planted_measures.everywhere(ledger)
  with pytest.raises(SystemExit, match='0'):
    activations_table.main([f'--ledger={ledger}', f'--out={out}'])
  after = out.read_text().splitlines()[0].split(',')
  assert after[: len(activations_table.COLUMNS)] == activations_table.COLUMNS
  assert {'downstream/kl', 'downstream/kl_se'} < {*after}


def test_cell_with_a_coefficient_has_no_k(tmp_path):
  ledger, out = str(tmp_path / 'ledger'), tmp_path / 'table.csv'
  cells.write(ledger, cells.cell(**{'sae.activation': 'relu', 'sae.k': None, 'loss.sparsity': 0.1}), finished=True)
  cells.write(ledger, cells.cell(), finished=True)
  with pytest.raises(SystemExit, match='0'):
    activations_table.main([f'--ledger={ledger}', f'--out={out}'])
  with open(out) as f:
    assert [row['k'] for row in csv.DictReader(f)] == ['', '13']


@pytest.mark.storm
def test_a_row_trains_to_the_same_again(tmp_path, monkeypatch):
  """Harvests the whole store, unless RUNS names a folder with one. Other machines give other last bits, hence the bounds."""
  runs = os.environ.get('RUNS', str(tmp_path))
  monkeypatch.setenv('RUNS', runs)
  command = [sys.executable, '-m', 'sae_jax.data.harvest', f'--config={ROOT}/experiments/activations.py']
  subprocess.run([*command, f'--out={runs}/store'], cwd=ROOT, check=True)
  row = min(
    table(), key=lambda row: (int(row['n_latents']), int(row['tokens']), row['activation'] != 'topk', row['id'])
  )
  planned = cells_of_the_grid()
  (one,) = [
    c
    for c in planned.values()
    if (c.sae.activation, c.sae.n_latents, c.sae.k, c.train.seed, c.train.steps * c.train.batch_tokens) == asked(row)
  ]
  assert training.train(one, str(tmp_path / 'again')) == 'done'
  again = json.loads((tmp_path / 'again' / schema.RESULT).read_text())
  assert again['nmse'] == pytest.approx(float(row['nmse']), rel=5e-3)
  assert again['l0'] == pytest.approx(float(row['l0']), rel=2e-2)
