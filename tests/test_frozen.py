"""A ledger and a store written by version 0.1.0 of 2026-11-28 stay readable, and ids keep their meaning for ever.

tests/frozen was written once: a sweep of three cells (done, half-trained, failed), a store of imported activations, the
ids of every grid, and what the half-trained cell became when that version trained it to the end.
"""

import dataclasses
import importlib
import json
import pathlib
import shutil

import numpy as np
import pytest

import analysis
import sae_jax
from analysis import report
from experiments import tiny
from sae_jax import cell as cells_schema
from sae_jax import config, distributed, recipe, records, schema, train, training
from sae_jax.data import store as stores
from sae_jax.errors import UserError
from sae_jax.families import family
from sweeps import grid, launch, ledger, status
from tests import cells

FROZEN = pathlib.Path(__file__).parent / 'frozen'
IDS = json.loads((FROZEN / 'ids.json').read_text())
DONE, HALF, FAILED = '4159ee15d92c', 'd79b3e466ad5', 'aba2f469fdb0'


@pytest.fixture
def old(tmp_path):
  """A copy of the old ledger."""
  shutil.copytree(FROZEN / 'ledger', tmp_path / 'ledger')
  return tmp_path / 'ledger'


def test_old_ledger_is_read_by_status_and_report(old, capsys):
  store = ledger.Ledger(str(old))
  found = {s.entry.id: s for s in store.states()}
  assert {cell_id: s.state for cell_id, s in found.items()} == {
    DONE: 'done',
    HALF: 'waiting',
    FAILED: 'failed',
  }
  assert 'Diverged: not finite at step 1' in found[FAILED].reason
  rows = {row['id']: row for row in status.report(store, 3)['cells']}
  assert rows[DONE]['step'] == 20 and rows[HALF]['step'] == 10  # its last evaluation
  table = analysis.load_ledger(str(old))
  assert table['id'].tolist() == [DONE] and table['nmse'][0] == pytest.approx(0.2476, abs=0.02)
  assert [w['code'] for w in table.attrs['warnings']] == ['unverified', 'cells_missing']
  assert not table['verified'].any()
  report.write(report.analyse(str(old), bootstrap=0), str(old.parent / 'report'), 'old')


def test_old_autoencoder_is_loaded(old):
  sae = sae_jax.load(str(old / 'cells' / DONE))
  assert sae.info['verified'] is False and sae.encode(np.ones((2, 24), np.float32))[0].shape == (2, 13)


def test_old_half_trained_cell_goes_on_to_the_end_it_had(old, trained):
  entry = next(entry for entry in ledger.Ledger(str(old)).entries() if entry.id == HALF)
  folder = old / 'cells' / HALF
  assert training.train(entry.cell, str(folder)) == 'done'
  result = json.loads((folder / schema.RESULT).read_text())
  expected = json.loads((FROZEN / 'expected.json').read_text())
  assert result['nmse'] == pytest.approx(expected['nmse'], rel=1e-5)
  # Bits are those of a kind of processor. Where the finished cell comes out as it did then, so must this one.
  then = json.loads((FROZEN / 'ledger' / 'cells' / DONE / schema.RESULT).read_text())
  now = json.loads((trained / 'cells' / DONE / schema.RESULT).read_text())
  if now['params_digest'] == then['params_digest']:
    assert result['params_digest'] == expected['params_digest']
  sealed = analysis.load_ledger(str(old)).set_index('id')['verified']
  assert sealed.to_dict() == {DONE: False, HALF: True}


def test_old_ledger_launched_again_has_nothing_to_do(old, capsys, tmp_path):
  (tmp_path / 'frozen.py').write_text(
    'from experiments import tiny\nfrom tests import cells\nEXPERIMENT = tiny\n'
    'def sweep(): return [cells.SHARED | {"train.seed": 0}]\n'
  )
  with pytest.raises(SystemExit) as ended:
    launch.main([f'--sweep={tmp_path / "frozen.py"}', f'--ledger={old}', '--max_failures=1', '--workers=0'])
  said = capsys.readouterr().out
  assert not ended.value.code and '1 cells, todo 1' in said and '1 of them come from an earlier version' in said
  shutil.rmtree(old / 'cells' / HALF)
  sweep = json.loads((old / 'sweep.json').read_text())
  del sweep['cells'][HALF]
  cells.edit(str(old / 'sweep.json'), cells=sweep['cells'])
  with pytest.raises(SystemExit) as ended:
    launch.main([f'--sweep={tmp_path / "frozen.py"}', f'--ledger={old}'])
  assert not ended.value.code and 'todo 0' in capsys.readouterr().out


def test_old_store_is_read_with_its_identity():
  path = str(FROZEN / 'store')
  stores.verify(path)
  c = config.resolve(
    config.override(
      tiny.get_config(),
      {
        'data.source': 'store',
        'data.path': path,
        'sae.d_model': 5,
        'train.tokens': 70,
        'train.batch_tokens': 7,
      }
      | {'eval.tokens': 20, 'eval.batch_tokens': 20, 'data.planted.seed': 0},
    )
  )
  assert c.data.identity.startswith('139ca41585c1')
  x_BD = np.load(FROZEN / 'activations.npy')
  held_out_BD, expected_BD = stores.Store(c).held_out(0, 20), normalised(x_BD[70:])
  in_order = [rows[np.argsort(rows[:, 0])] for rows in (held_out_BD, expected_BD)]
  np.testing.assert_allclose(*in_order, atol=1e-3)  # stored as float16


def normalised(x_BD):
  centred_BD = x_BD - x_BD.mean(1, keepdims=True)
  return centred_BD / np.linalg.norm(centred_BD, axis=1, keepdims=True)


# ----- ids


@pytest.mark.parametrize('name', [name for name in IDS if ' ' not in name and name != 'selection'])
def test_ids_of_grids_are_pinned(name, tmp_path):
  module = importlib.import_module(f'sweeps.grids.{name}')
  base = module.EXPERIMENT.get_config()
  if facts := IDS.get(f'{name} store'):
    (tmp_path / schema.STORE).write_text(json.dumps(facts))
    base = config.override(base, {'data.path': str(tmp_path)})
  assert [config.resolve(config.override(base, o)).id for o in module.sweep()] == IDS[name], REMEDY


REMEDY = (
  'finished ledgers would be trained again: a new field needs its neutral value (cell.added), and a recipe or a template '
  'that changes needs a new name'
)
SELECTIONS = {
  'exact': {},
  'exact, another recall': {'sae.recall_target': 0.9},
  'approximate': {'sae.selection': 'approximate'},
}


@pytest.mark.parametrize('name', SELECTIONS)
def test_ids_of_selections_are_pinned(name):
  assert config.resolve(config.override(tiny.get_config(), SELECTIONS[name])).id == IDS['selection'][name], REMEDY


@dataclasses.dataclass(frozen=True)
class _GrownSAE(cells_schema.SAEConfig):
  """As a later version might have it."""

  softness: float = cells_schema.added(0.001, 'activation', 'jumprelu', 'prolu')  # a knob of two families
  slope: float = cells_schema.added(0.5)
  tiers: int | None = cells_schema.added(None)


@dataclasses.dataclass(frozen=True)
class _GrownRecipe(recipe.ScalingRecipe):
  horizon: str = cells_schema.added('budget')


@dataclasses.dataclass(frozen=True)
class _Grown(cells_schema.Cell):
  recipe: _GrownRecipe
  sae: _GrownSAE


def grown(record=None, **sae):
  """A cell as the later version reads the record of today's."""
  record = record or schema.content(json.loads(cells.cell().to_json())) | {}
  record = {key: value for key, value in record.items() if key != 'id'}
  return records.build(_Grown, record | {'sae': record['sae'] | sae})


def test_new_field_at_its_neutral_value_changes_no_id():
  assert grown().id == cells.cell().id
  assert grown(slope=0.5, tiers=None).id == cells.cell().id
  assert len({grown().id, grown(slope=0.6).id, grown(tiers=3).id, grown(tiers=4).id}) == 4
  assert 'slope' not in json.loads(grown().to_json())['sae'] and grown().sae.slope == 0.5


def test_new_default_of_a_recipe_changes_no_old_record():
  """A later recipe may set the new field otherwise: its cells are others, and old records mean what they meant."""
  old = schema.content(json.loads(cells.cell().to_json()))
  tuned = {key: value for key, value in old.items() if key != 'id'}
  tuned['recipe'] = tuned['recipe'] | {'horizon': 'so far'}
  assert grown(old).recipe.horizon == 'budget' and grown(old).id == cells.cell().id
  assert grown(tuned).recipe.horizon == 'so far' and grown(tuned).id != cells.cell().id


def test_knob_of_a_family_is_in_the_record_of_its_cells_alone(monkeypatch):
  monkeypatch.setattr(cells_schema, 'family', lambda name: family.Family(lambda: None))
  assert 'softness' not in json.loads(grown().to_json())['sae']
  with pytest.raises(UserError, match=r'sae.softness=0.7 is of jumprelu and prolu, .*; drop it'):
    grown(softness=0.7)
  of_family = grown(activation='jumprelu')
  assert json.loads(of_family.to_json())['sae']['softness'] == 0.001  # though it is neutral
  assert of_family.id != grown(activation='jumprelu', softness=0.002).id


def test_optional_field_takes_its_type_or_nothing():
  assert grown(tiers=None).sae.tiers is None and grown(tiers=3).sae.tiers == 3
  for wrong in ('3', 3.0, True):
    with pytest.raises(UserError, match='tiers'):
      grown(tiers=wrong)


def test_retired_key_is_accepted_at_its_neutral_value_alone(old):
  record = json.loads((old / 'cells' / DONE / 'config.json').read_text())
  assert record['mesh']['member'] == 1 and config.from_json(json.dumps(record).encode()).id == DONE
  record['mesh']['member'] = 2
  for read in (
    lambda: config.from_json(json.dumps(record).encode()),
    lambda: config.override(tiny.get_config(), {'mesh.member': 2}),
  ):
    with pytest.raises(UserError, match=r'mesh\.member=2: this key is gone and only 1 is accepted; start one worker'):
      read()
  config.override(tiny.get_config(), {'mesh.member': 1})


@pytest.mark.parametrize(('value', 'code'), [('1', 0), ('2', 2)])
def test_retired_flag_on_a_command_line(value, code, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(training, 'train', lambda *_, **__: 'preempted')
  monkeypatch.setattr(distributed, 'initialize', lambda: None)
  with pytest.raises(SystemExit) as ended:
    train.main(['--config=experiments/tiny.py', f'--workdir={tmp_path}', f'--config.mesh.member={value}'])
  assert ended.value.code == (code or 42)
  assert ('this key is gone' in capsys.readouterr().err) == bool(code)


def test_grid_of_an_old_user_that_names_a_retired_key_builds(tmp_path):
  (tmp_path / 'old.py').write_text(
    'from experiments import tiny\nEXPERIMENT = tiny\ndef sweep(): return [{"mesh.member": 1}]\n'
  )
  assert [c.id for _, c in grid.build(str(tmp_path / 'old.py')).cells] == [IDS['selection']['exact']]
