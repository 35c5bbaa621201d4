"""Pickles are never read, whatever their name, and the error has the lines that convert them."""

import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from sae_jax.data import inputs
from tests.test_inputs import D, sequences
from tests.test_store_import import run


class Bomb:
  """Says so when it is unpickled."""

  def __reduce__(self):
    return pytest.fail, ('a pickle was loaded',)


def write_pickles(folder: pathlib.Path) -> dict[str, str]:
  """Pickles under every name, with a word of how they are converted."""
  x_BD = sequences().reshape(-1, D)
  (folder / 'a.pkl').write_bytes(pickle.dumps(Bomb()))
  for name in ('a.npy', 'a.safetensors', 'a.dat', 'a.pt', 'a.bin'):
    (folder / name).write_bytes(pickle.dumps(Bomb()))
  np.save(folder / 'objects.npy', np.array([Bomb(), 1], object), allow_pickle=True)
  np.savez(folder / 'a.npz', acts=x_BD)
  np.savez(folder / 'inside.npz', allow_pickle=True, acts=np.array([Bomb(), 1], object))
  (folder / 'zip.npy').write_bytes((folder / 'a.npz').read_bytes())
  for name in ('b.pt', 'pytorch_model.bin', 'b.npy'):
    with zipfile.ZipFile(folder / name, 'w') as archive:
      archive.writestr('archive/data.pkl', pickle.dumps(Bomb()))
      archive.writestr('archive/data/0', x_BD.tobytes())
  (folder / 'old.pt').write_bytes(b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02')
  (folder / 'old.npy').write_bytes(b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02')
  (folder / 'broken.npz').write_bytes(b'PK\x03\x04' + b'\0' * 40)
  torch, numpy = 'torch.load', "numpy.asarray(x, 'f4')"
  return {
    'a.pkl': numpy,
    'a.npy': numpy,
    'a.safetensors': numpy,
    'a.dat': numpy,
    'a.pt': torch,
    'a.bin': numpy,
    'objects.npy': 'allow_pickle=True',
    'a.npz': "numpy.load('a.npz')['acts']",
    'inside.npz': 'allow_pickle=True',
    'zip.npy': "['acts']",
    'b.pt': torch,
    'pytorch_model.bin': torch,
    'b.npy': torch,
    'old.pt': torch,
    'old.npy': torch,
    'missing.pt': 'does not exist',
    'broken.npz': 'is none of',
  }


def test_pickles_are_refused_with_the_lines_that_convert_them(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name, word in write_pickles(tmp_path).items():
    code, out, error = run(capsys, 'import', f'--from={name}', '--out=s', '--held_out=5')
    assert (code, out, error.count('\n')) == (2, '', 1) and name in error and word in error, (name, error)
    if 'these three lines' in error:
      lines = error.split('convert it: ')[1].strip()
      assert len(lines.split('; ')) == 3
      compile(lines, name, 'exec')
    code, _, error = run(capsys, 'import', '--from=a.npz', f'--mask={name}', '--out=s', '--held_out=5')
    assert code == 2


def test_the_lines_convert(tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  x_BD = sequences().reshape(-1, D)
  np.savez(tmp_path / 'a.npz', acts=x_BD)
  np.save(tmp_path / 'o.npy', np.array([*x_BD, None], object)[:-1], allow_pickle=True)
  (tmp_path / 'l.pkl').write_bytes(pickle.dumps(list(x_BD)))
  objects = np.empty(len(x_BD), object)
  objects[:] = list(x_BD)
  np.savez(tmp_path / 'p.npz', allow_pickle=True, acts=objects)
  np.save(tmp_path / 'o.npy', objects, allow_pickle=True)
  for name, made in (('a.npz', 'a.npy'), ('l.pkl', 'l.npy'), ('p.npz', 'p.npy'), ('o.npy', 'o-plain.npy')):
    error = run(capsys, 'import', f'--from={name}', '--out=s', '--held_out=5')[2]
    exec(error.split('convert it: ')[1].strip(), {})
    np.testing.assert_array_equal(np.asarray(inputs.open_source(made).pieces[0].view()), x_BD)
