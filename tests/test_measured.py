"""What was measured joins the table of a ledger: nothing stale, nothing mixed, nothing damaged, and what is left out is named."""

import json
import pathlib

import numpy as np
import pandas as pd
import pytest

from analysis import read_ledger, table
from sae_jax import files, schema
from tests import cells, planted_measures


def ledger(path, count=3):
  """Some finished cells, and their folders."""
  return [cells.write(str(path), cells.cell(**{'train.seed': seed}), nmse=0.2 + 0.1 * seed) for seed in range(count)]


def name(folder):
  return folder.rsplit('/', 1)[-1]


def loaded(path):
  found = read_ledger.load_ledger(str(path))
  return found.set_index('id'), {w['code']: w['message'] for w in found.attrs['warnings']}


def test_values_and_errors_follow_the_columns_that_were_there(tmp_path):
  folders = ledger(tmp_path)
  before = read_ledger.load_ledger(str(tmp_path))
  assert 'units' not in before.attrs and not [c for c in before.columns if '/' in c]
  some = planted_measures.records(0.4)
  planted_measures.measure(folders[1], some)
  after = read_ledger.load_ledger(str(tmp_path))
  pd.testing.assert_frame_equal(after[before.columns.tolist()], before)
  more = after.columns[len(before.columns) :].tolist()
  expected = planted_measures.values(some)
  assert more == [f'downstream/{value}{end}' for value in expected for end in ('', '_se')]
  row = after.set_index('id').loc[name(folders[1])]
  assert {value: (row[f'downstream/{value}'], row[f'downstream/{value}_se']) for value in expected} == {
    value: (entry['value'], entry['se']) for value, entry in expected.items()
  }
  assert after['downstream/kl'].isna().sum() == 2  # missing, not 0
  assert after.attrs['units']['downstream/kl'] == 'nats a token'
  assert after.attrs['warnings'] == before.attrs['warnings']


def test_columns_go_through_a_csv_file(tmp_path):
  ledger(tmp_path / 'runs')
  planted_measures.everywhere(tmp_path / 'runs')
  found = read_ledger.load_ledger(str(tmp_path / 'runs'))
  found.to_csv(tmp_path / 't.csv', index=False)
  again = table.read_csv(str(tmp_path / 't.csv'))
  np.testing.assert_array_equal(again['downstream/kl_se'], found['downstream/kl_se'])


def replaced(cell):
  cells.edit(files.join(cell, 'sae', 'sae.json'), sha256={'ema': 'f' * 64, 'raw': 'f' * 64})


STALE = {
  'of an autoencoder that was replaced since': replaced,
  'of version 0 of the measure': lambda cell: planted_measures.measure(cell, planted_measures.records(1.0), version=0),
  'of the raw weights, and its NMSE is of the ema ones': lambda cell: planted_measures.measure(
    cell, planted_measures.records(1.0), weights='raw'
  ),
}


@pytest.mark.parametrize('why', STALE)
def test_what_is_of_another_autoencoder_is_left_out_and_named(tmp_path, why):
  folders = ledger(tmp_path)
  planted_measures.everywhere(tmp_path)
  STALE[why](folders[0])
  rows, said = loaded(tmp_path)
  assert rows['downstream/kl'].isna().to_dict() == {name(folder): folder == folders[0] for folder in folders}
  assert f'{name(folders[0])} downstream: {why}' in said['measures_stale']


def test_a_copy_without_autoencoders_keeps_its_measures(tmp_path):
  folders = ledger(tmp_path)
  planted_measures.everywhere(tmp_path)
  pathlib.Path(folders[0], 'sae', 'sae.json').unlink()
  rows, said = loaded(tmp_path)
  assert rows['downstream/kl'].notna().all() and not said


@pytest.mark.parametrize('how', [{'inputs': 'b' * 64}, {'settings': {'windows': 'long' * 90 + 'x'}}])
def test_what_most_cells_have_is_not_mixed_with_anything_else(tmp_path, how):
  folders = ledger(tmp_path)
  usual = {'settings': {'windows': 'long' * 90 + 'y'}} if 'settings' in how else {}
  for folder in folders:
    planted_measures.measure(folder, planted_measures.records(0.4), **(how if folder == folders[2] else usual))
  rows, said = loaded(tmp_path)
  assert rows['downstream/kl'].isna().to_dict() == {name(folder): folder == folders[2] for folder in folders}
  assert name(folders[2]) in said['measures_mixed'] and name(folders[0]) not in said['measures_mixed']


def test_cells_of_another_site_have_inputs_of_their_own(tmp_path):
  sites = [{}, {}, {'data.site': 'resid_post.3'}]
  folders = [
    cells.write(str(tmp_path), cells.cell(**{'train.seed': i}, **site), nmse=0.3) for i, site in enumerate(sites)
  ]
  for folder, inputs in zip(folders, 'aab', strict=True):
    planted_measures.measure(folder, planted_measures.records(0.4), inputs=inputs * 64)
  rows, said = loaded(tmp_path)
  assert rows['downstream/kl'].notna().all() and not said


@pytest.mark.parametrize(
  'damage',
  [
    lambda data: data.replace(b'0.', b'1.', 1),
    lambda data: data[:-9],
    lambda data: b'',
    lambda data: schema.dump(schema.content(json.loads(data)), 'another'),
  ],
)
def test_damaged_measures_cost_a_cell_nothing_else(tmp_path, damage):
  folders = ledger(tmp_path)
  planted_measures.everywhere(tmp_path)
  path = pathlib.Path(folders[1], 'measures', 'measures.json')
  path.write_bytes(damage(path.read_bytes()))
  rows, said = loaded(tmp_path)
  assert rows['nmse'].tolist() == rows['nmse'].dropna().tolist() and len(rows) == 3
  assert rows['downstream/kl'].isna().to_dict() == {name(folder): folder == folders[1] for folder in folders}
  assert (
    f'1 cells have measures that cannot be believed, and are shown without them: {name(folders[1])}: '
    in said['measures_broken']
  )
