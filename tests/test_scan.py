"""What is wrong with imported rows as a whole is refused or said: copies, norms, a dtype too coarse, no variance."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

import sae_jax
from sae_jax import config, schema, training
from sae_jax.data import store
from tests import cells
from tests.test_store import D, activations, cell
from tests.test_store_import import run


def save(folder: pathlib.Path, name: str, x_BD: np.ndarray) -> str:
  path = folder / name
  if name.endswith('.npy'):
    np.save(path, x_BD)
  else:
    safetensors.numpy.save_file({'acts': np.ascontiguousarray(x_BD)}, path)
  return str(path)


def test_same_file_twice_is_refused_however_it_is_named(tmp_path, capsys, monkeypatch):
  x_BD = activations('train')
  save(tmp_path, 'a1.npy', x_BD[:30]), save(tmp_path, 'a2.npy', x_BD[30:])
  shutil.copy(tmp_path / 'a1.npy', tmp_path / 'copy.npy')
  os.symlink(tmp_path / 'a1.npy', tmp_path / 'link.npy')
  save(tmp_path, 'a1.safetensors', x_BD[:30])
  save(tmp_path, 'wide.npy', x_BD[:30].astype(np.float64))
  save(tmp_path, 'turned.npy', x_BD[:30][::-1])
  (tmp_path / 'list.txt').write_text('a1.npy\n\na2.npy\n')
  (tmp_path / 'self.txt').write_text('@self.txt\n')
  monkeypatch.chdir(tmp_path)
  for names, reason in (
    (['a1.npy', 'a1.npy'], 'a1.npy is named twice'),
    (['a1.npy', './a1.npy'], 'are one file'),
    (['a1.npy', 'link.npy'], 'are one file'),
    (['a*.npy', 'a1*.npy'], 'a1.npy is named twice'),
    (['@list.txt', 'a2.npy'], 'a2.npy is named twice'),
    (['a1.npy', 'copy.npy'], 'hold the same bytes'),
    (['a1.npy', 'a1.safetensors'], 'hold the same rows'),
    (['a1.npy', 'wide.npy'], 'hold the same rows'),
    (['turned.npy', 'a2.npy', 'a1.npy'], 'turned.npy and a1.npy hold the same rows'),
    (['b*.npy'], 'b*.npy matches no file'),
    (['@self.txt'], 'names the list @self.txt'),
    (['.'], "'./*.npy'"),
    (['@none.txt'], '@none.txt cannot be read'),
  ):
    code, out, error = run(capsys, 'import', '--from', *names, '--out=s', '--held_out=5')
    assert (code, out, error.count('\n')) == (2, '', 1) and reason in error, (names, error)
    assert not (tmp_path / 's').exists()


def test_patterns_and_lists_are_the_files_they_name_in_order(tmp_path, capsys, monkeypatch):
  x_BD = activations('train')
  save(tmp_path, 'a1.npy', x_BD[:30]), save(tmp_path, 'a2.npy', x_BD[30:]), save(tmp_path, 'a[1].npy', x_BD)
  (tmp_path / 'list.txt').write_text('a1.npy\n  a2.npy \n\n')
  monkeypatch.chdir(tmp_path)
  plain = ['--dtype=float32', '--held_out=11', '--seed=2', '--normalize=none']
  found = []
  for i, names in enumerate((['a1.npy', 'a2.npy'], ['a?.npy'], ['@list.txt'], ['a[1].npy'])):
    assert run(capsys, 'import', '--from', *names, f'--out=s{i}', *plain)[0] == 0
    found.append(config.read_store_file(f's{i}'))
  assert len({meta['identity'] for meta in found}) == 1
  assert found[1]['provenance']['imported_from'] == ['a1.npy', 'a2.npy']
  assert found[3]['provenance']['imported_from'] == ['a[1].npy']  # a file of this name is no pattern


def test_held_out_rows_that_occur_in_training_are_counted_and_warned_of(tmp_path, capsys):
  x_BD = activations('train')
  path = save(tmp_path, 'a.npy', np.concatenate([x_BD, x_BD[:7], x_BD[3:5]]))
  argv = ['import', f'--from={path}', f'--out={tmp_path}/s', '--held_out=20']
  for _ in range(2):  # a finished store says it again
    code, out, error = run(capsys, *argv)
    assert code == 0 and '42 training and 20 held-out' in out
    assert error.startswith('warning: 9 held-out rows occur in training') and error.count('\n') == 1
  _, _, error = run(capsys, 'verify', f'{tmp_path}/s')
  assert 'warning: 9 held-out rows' in error
  store.Store(cell(tmp_path / 's', **{'data.seed': 0}))  # as whatever trains on it does
  assert 'warning: 9 held-out rows' in capsys.readouterr().err
  assert (
    run(capsys, 'import', f'--from={save(tmp_path, "b.npy", x_BD)}', f'--out={tmp_path}/t', '--held_out=20')[2] == ''
  )


# ----- scale and dtype


@pytest.mark.parametrize('size', [1e-5, 1e-3, 1.0, 1e4, 1e-30])
def test_scale_gives_the_training_rows_mean_norm_one(tmp_path, capsys, size):
  x_BD = (size * activations('train').astype(np.float64)).astype(np.float32)
  argv = ['import', f'--from={save(tmp_path, "a.npy", x_BD)}', f'--out={tmp_path}/s', '--held_out=11']
  code, out, error = run(capsys, *argv, '--normalize=scale', '--dtype=float32', '--seed=2')
  scale = 1 / np.linalg.norm(x_BD[:42].astype(np.float64), axis=1).mean()
  assert code == 0 and error == '' and f'multiplied by {scale:.6g}' in out
  opened = store.Store(cell(tmp_path / 's'))
  assert np.linalg.norm(opened.rows(0, 42), axis=1).mean() == pytest.approx(1, rel=1e-6)
  np.testing.assert_allclose(opened.held_out(0, 11), x_BD[42:] * scale, rtol=1e-6)
  assert config.read_store_file(str(tmp_path / 's'))['scale'] == opened.provenance['scale'] == pytest.approx(scale)


@pytest.mark.parametrize('size', [1e-3, 1e-5, 50])
def test_norms_far_from_one_without_normalisation_are_warned_of(tmp_path, capsys, size):
  said = f'{size * np.linalg.norm(activations("train")[:42], axis=1).mean():.3g}'
  path = save(tmp_path, 'a.npy', np.float32(size) * activations('train'))
  argv = [
    'import',
    f'--from={path}',
    f'--out={tmp_path}/s',
    '--held_out=11',
    '--normalize=none',
    '--dtype=float32',
  ]
  for command in (argv, ['verify', f'{tmp_path}/s']):
    code, _, error = run(capsys, *command)
    assert code == 0 and error.startswith('warning: the mean norm of the rows is ') and error.count('\n') == 1
    assert f' {said}, outside [0.1, 10]' in error and '--normalize=scale' in error
  quiet = [a.replace('none', 'center_unit').replace('/s', '/t') for a in argv]
  assert run(capsys, *quiet)[2] == ''


@pytest.mark.parametrize('kind, said', [('none', True), ('scale', True), ('center_unit', False)])
def test_few_rows_that_are_all_of_the_variance_are_warned_of(tmp_path, capsys, kind, said):
  """As the first tokens of texts are, whose constant vector any autoencoder reconstructs."""
  x_BD = np.random.default_rng(0).standard_normal((1000, D)).astype(np.float32) / 3
  x_BD[::128] *= 300
  argv = ['import', f'--from={save(tmp_path, "a.npy", x_BD)}', f'--out={tmp_path}/s', '--held_out=200']
  code, _, error = run(capsys, *argv, f'--normalize={kind}', '--dtype=float32')
  assert code == 0 and error.count('\n') == said
  assert not said or (
    'the largest 1 % of the training rows hold 100% of all squares' in error and '--drop_first' in error
  )


@pytest.mark.parametrize('kind, code', [('none', 2), ('scale', 0), ('center_unit', 0)])
def test_rows_below_the_smallest_float16_are_refused_or_scaled(tmp_path, capsys, kind, code):
  path = save(tmp_path, 'a.npy', np.float32(1e-8) * activations('train'))
  argv = ['import', f'--from={path}', f'--out={tmp_path}/s', '--held_out=11', f'--normalize={kind}']
  found, _, error = run(capsys, *argv)
  assert found == code and error.count('\n') == bool(code)
  assert not code or ('float16 loses a share of' in error and 'more than 0.001' in error and 'scale' in error)


@pytest.mark.parametrize('part, name', [(slice(42, 53), 'the 11 held-out'), (slice(0, 42), 'the 42 training')])
def test_split_without_variance_is_refused_by_its_name(tmp_path, capsys, part, name):
  x_BD = activations('train')
  x_BD[part] = x_BD[0]
  argv = ['import', f'--from={save(tmp_path, "a.npy", x_BD)}', f'--out={tmp_path}/s', '--held_out=11']
  code, _, error = run(capsys, *argv)
  assert code == 2 and error.count('\n') == 1 and f'{name} rows have variance' in error
  assert not (tmp_path / 's').exists()


def test_scale_goes_from_the_store_into_the_autoencoder(tmp_path, capsys):
  """Trained on rows of norm 4,000 by the shared cell, it takes and gives rows of norm 4,000."""
  rng = np.random.default_rng(0)
  x_BD = (rng.random((900, 61)) < 0.1) @ (4000 * rng.standard_normal((61, 24))) + rng.standard_normal((900, 24))
  path = save(tmp_path, 'a.npy', x_BD.astype(np.float32))
  argv = ['import', f'--from={path}', f'--out={tmp_path}/s', '--held_out=101', '--normalize=scale']
  assert run(capsys, *argv)[0] == 0
  c = config.override(
    cells.tiny.get_config(), cells.SHARED | {'data.source': 'store', 'data.path': f'{tmp_path}/s', 'train.tokens': 780}
  )
  assert training.train(config.resolve(c), str(tmp_path / 'cell')) == 'done'
  sae = sae_jax.load(str(tmp_path / 'cell'))
  assert sae.info['normalize'] == 'scale' and sae.info['scale'] == config.read_store_file(f'{tmp_path}/s')['scale']
  held_out_BD = x_BD[-101:]
  error = np.square(held_out_BD - sae.reconstruct(held_out_BD)).sum()
  variance = np.square(held_out_BD - held_out_BD.mean(axis=0)).sum()
  result = json.loads((tmp_path / 'cell' / schema.RESULT).read_text())
  assert error / variance == pytest.approx(result['nmse'], rel=1e-3)
