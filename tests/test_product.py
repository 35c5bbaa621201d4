"""A damaged autoencoder of a finished cell is named: what is cheap to see by everyone, the rest by who reads it whole."""

import json
import pathlib
import shutil

import pytest

import sae_jax
from analysis import read_ledger
from sae_jax import files, schema
from sae_jax.errors import UserError
from sweeps import launch, ledger, retry, status
from tests import cells


@pytest.fixture
def place(trained, tmp_path):
  """A ledger of two finished cells."""
  ignored = shutil.ignore_patterns(schema.CHECKPOINTS)
  return shutil.copytree(trained, tmp_path / 'ledger', ignore=ignored)


@pytest.fixture
def store(place):
  return ledger.Ledger(str(place))


def product_of(store) -> pathlib.Path:
  return pathlib.Path(store.folder(store.entries()[0].id)) / schema.ARTIFACT


def run(main, *argv):
  with pytest.raises(SystemExit) as ended:
    main(list(argv))
  return ended.value.code


def flipped(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[-1] ^= 1
  path.write_bytes(data)


def swapped(folder: pathlib.Path) -> None:
  raw, ema = (folder / f'{name}.safetensors' for name in ('raw', 'ema'))
  data = raw.read_bytes()
  raw.write_bytes(ema.read_bytes())
  ema.write_bytes(data)


CHEAP = {
  'no folder': (shutil.rmtree, 'it is missing'),
  'no tensors': (lambda folder: (folder / 'raw.safetensors').unlink(), 'sae/raw.safetensors: it is missing'),
  'no sae.json': (lambda folder: (folder / 'sae.json').unlink(), 'sae/sae.json: it is missing'),
  'cut': (lambda folder: (folder / 'ema.safetensors').write_bytes(b'x'), 'sae/ema.safetensors: it has 1 bytes'),
  'a digit': (lambda folder: cells.edit(str(folder / 'sae.json'), k=12), 'sae/sae.json: it is not the one'),
}
DEAR = {
  'a bit': (lambda folder: flipped(folder / 'ema.safetensors'), 'sae/ema.safetensors: it does not fit'),
  'swapped': (swapped, 'safetensors: it does not fit its digest'),
}


@pytest.mark.parametrize('harm', CHEAP)
def test_what_sizes_tell_makes_the_cell_invalid_for_everyone(store, harm, capsys, tmp_path):
  damage, why = CHEAP[harm]
  damage(product_of(store))
  first, second = store.states()
  assert (first.state, second.state) == (schema.INVALID, schema.DONE) and why in first.reason
  row = read_ledger.load_cells(store.path).set_index('id').loc[first.entry.id]
  if harm != 'no folder':  # an analysis may be of a copy without them
    assert (row['state'], row['reason']) == (schema.INVALID, first.reason)
  (tmp_path / 'trained.py').write_text(
    'from experiments import tiny\nfrom tests import cells\nEXPERIMENT = tiny\n'
    'def sweep(): return [cells.SHARED | {"train.seed": seed} for seed in (0, 1)]\n'
  )
  run(launch.main, f'--ledger={store.path}', f'--sweep={tmp_path / "trained.py"}', '--dry_run')
  assert 'invalid: sae/' in capsys.readouterr().out
  with pytest.raises(UserError, match=r'sweeps\.retry'):
    sae_jax.load(store.folder(first.entry.id))
  assert run(retry.main, f'--ledger={store.path}') == 0
  assert 'moved result.json to corrupt/result.json-0' in capsys.readouterr().out
  assert [s.state for s in ledger.Ledger(store.path).states()] == [schema.WAITING, schema.DONE]


@pytest.mark.parametrize('harm', DEAR)
def test_what_only_bytes_tell_is_found_by_a_full_check(store, harm, capsys):
  damage, why = DEAR[harm]
  damage(product_of(store))
  assert [s.state for s in store.states()] == [schema.DONE] * 2
  assert run(status.main, f'--ledger={store.path}', '--verify', '--json') == 1
  shown, said = capsys.readouterr()
  first, second = json.loads(shown)['cells']
  assert (first['state'], second['state']) == (schema.INVALID, schema.DONE) and why in first['reason']
  assert f'--ledger={store.path} {first["id"]} has them trained again' in said
  with pytest.raises(UserError, match='does not fit its digest'):
    sae_jax.load(store.folder(first['id']), 'ema')
  assert retry.retry(store, [first['id']])[0].reason == first['reason']
  assert ledger.Ledger(store.path).states()[0].state == schema.WAITING


def test_copy_without_autoencoders_can_be_analysed(store, place):
  shutil.rmtree(product_of(store))
  assert [s.state for s in store.states()].count(schema.INVALID) == 1
  assert list(read_ledger.load_cells(str(place))['state']) == [schema.DONE] * 2


def test_sound_ledger_is_verified(store, capsys):
  assert run(status.main, f'--ledger={store.path}', '--verify') == 0
  assert 'verified the autoencoders of 2 cells' in capsys.readouterr().err
  assert run(status.main, f'--ledger={store.path}', '--verify', '--watch') == 2


def test_ledger_of_an_early_version_is_read_as_unverified(tmp_path, capsys):
  frozen = pathlib.Path(__file__).parent / 'frozen' / 'ledger'
  path = shutil.copytree(frozen, tmp_path / 'ledger')
  assert run(status.main, f'--ledger={path}', '--verify') == 0
  shown, said = capsys.readouterr()
  assert ': 1 done, ' in shown and '1 have no digests' in said
  store = ledger.Ledger(str(path))
  done = next(s.entry.id for s in store.states() if s.state == schema.DONE)
  shutil.rmtree(pathlib.Path(store.folder(done)) / schema.ARTIFACT)  # its result never said that there was one
  assert run(status.main, f'--ledger={path}', '--verify') == 0


def test_sizes_are_seen_in_a_bucket(tmp_path):
  for folder in (str(tmp_path / 'x'), 'memory://sizes/x'):
    assert files.sizes(folder, ['a']) == {}
    files.create(files.join(folder, 'a'), b'12')
    files.create(files.join(folder, 'b', 'c'), b'3')
    assert files.sizes(folder, ['a', 'b', 'd']) == {'a': 2}
    assert b''.join(files.pieces(files.join(folder, 'a'))) == b'12'
