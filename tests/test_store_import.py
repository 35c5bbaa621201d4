"""Stores made from arrays on disk: every row arrives, and a file that is not a matrix of numbers ends with one line."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sae_jax import config
from sae_jax.data import normalize, scan, store, store_import, store_writer
from tests.test_store import TRAIN, D, activations, cell

FROZEN = pathlib.Path(__file__).parent / 'frozen'


def run(capsys, *argv: str) -> tuple[int, str, str]:
  with pytest.raises(SystemExit) as stop:
    store.main(list(argv))
  return stop.value.code, *capsys.readouterr()


def test_import_of_npy_files_keeps_every_row(tmp_path, capsys):
  x_BD = activations('train')
  np.save(tmp_path / 'a.npy', x_BD[:20].astype(np.float64))
  np.save(tmp_path / 'b.npy', x_BD[20:])
  argv = [
    'import',
    '--from',
    f'{tmp_path}/a.npy',
    f'{tmp_path}/b.npy',
    f'--out={tmp_path}/s',
    '--held_out=11',
    '--dtype=float32',
    '--block_tokens=8',
    '--normalize=none',
    '--seed=2',
  ]
  code, out, _ = run(capsys, *argv)
  assert code == 0
  assert '42 training and 11 held-out tokens of width 7' in out
  opened = store.Store(cell(tmp_path / 's'))
  np.testing.assert_array_equal(opened.held_out(0, 11), x_BD[42:])
  rows = opened.rows(0, 42)
  assert rows.tolist() != x_BD[:42].tolist()
  assert sorted(rows.tolist()) == sorted(x_BD[:42].tolist())
  assert run(capsys, *argv)[0] == 0  # finished: nothing to do
  assert run(capsys, 'verify', f'{tmp_path}/s')[0] == 0
  np.save(tmp_path / 'b.npy', x_BD[20:] + 1)
  code, _, error = run(capsys, *argv)
  assert code == 2
  assert 'imported_sha256' in error


@pytest.mark.parametrize('order', 'CF')
@pytest.mark.parametrize('dtype', ['>f2', '>f4', '>f8'])
def test_import_of_the_other_byte_order_and_of_columns_first(tmp_path, capsys, dtype, order):
  np.save(tmp_path / 'a.npy', activations('train').astype(dtype, order=order))
  argv = [
    'import',
    f'--from={tmp_path}/a.npy',
    '--held_out=5',
    '--dtype=float32',
    '--normalize=none',
    '--seed=2',
  ]
  assert run(capsys, *argv, f'--out={tmp_path}/s')[0] == 0
  want_BD = activations('train')[-5:].astype(dtype).astype(np.float32)
  np.testing.assert_array_equal(store.Store(cell(tmp_path / 's')).held_out(0, 5), want_BD)


@pytest.mark.parametrize('dtype', [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_import_of_one_tensor_of_several(tmp_path, capsys, dtype):
  x_BD = activations('train').astype(dtype)
  tensors = {'other': np.zeros((3, 2), np.float32), 'acts': x_BD, 'last': np.zeros(5, np.int32)}
  safetensors.numpy.save_file(tensors, tmp_path / 'a.safetensors')
  argv = ['import', '--held_out=5', '--dtype=float32', '--block_tokens=16', '--seed=2', f'--out={tmp_path}/s']
  assert run(capsys, *argv, f'--from={tmp_path}/a.safetensors:acts')[0] == 0
  want = normalize.normalize(x_BD.astype(np.float32), 'center_unit')[0]
  np.testing.assert_array_equal(store.Store(cell(tmp_path / 's')).held_out(0, 5), want[-5:])
  code, _, error = run(capsys, *argv, f'--from={tmp_path}/a.safetensors')
  assert code == 2
  assert 'acts, last, other' in error


def hostile_files(folder) -> dict[str, str]:
  """Files that must be refused, with a word of the reason."""
  good = activations('train')
  bad_row, constant, infinite = good.copy(), good.copy(), good.astype(np.float64)
  bad_row[31, 2], constant[44], infinite[7, 0] = np.nan, 1.5, 1e300
  arrays = {
    'nan': bad_row,
    'constant': constant,
    'infinite': infinite,
    'flat': good.ravel(),
    'cube': good.reshape(1, TRAIN, D),
    'cubes': good.reshape(1, 1, TRAIN, D),
    'gap': good[:, None, :0],
    'bfloat16': good.astype(ml_dtypes.bfloat16),
    'float8': good.astype(ml_dtypes.float8_e4m3fn),
    'underflow': 1e-50 * good.astype(np.float64),
    'empty': good[:0],
    'narrow': good[:, :0],
    'integers': good.astype(np.int32),
    'complex': good.astype(complex),
    'records': np.zeros(3, [('a', 'f4')]),
  }
  for name, array in arrays.items():
    np.save(folder / f'{name}.npy', array, allow_pickle=True)
  data = (folder / 'constant.npy').read_bytes()
  (folder / 'cut.npy').write_bytes(data[: len(data) // 2])
  (folder / 'nothing.npy').write_bytes(b'')
  for name, shape in (('vast', f'({2**40}, {2**40})'), ('beyond', f'({10**30}, 7)'), ('true', '(True, 7)')):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    (folder / f'{name}.npy').write_bytes(b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header + b'\0' * 28)
  for name, shape in (
    ('brackets', '(' * 400 + '3,' + ')' * 400),
    ('parentheses', '(' * 5000 + '3,' + ')' * 5000),
  ):
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    (folder / f'{name}.npy').write_bytes(b'\x93NUMPY\x01\x00' + len(header).to_bytes(2, 'little') + header)
  (folder / 'gigabytes.npy').write_bytes(b'\x93NUMPY\x02\x00' + (2**32 - 1).to_bytes(4, 'little') + b'{' * 9)
  (folder / 'gigabytes.safetensors').write_bytes((2**33).to_bytes(8, 'little') + b'{' * 9)
  (folder / 'brackets.safetensors').write_bytes((100_000).to_bytes(8, 'little') + b'[' * 100_000)
  (folder / 'badzip.npy').write_bytes(b'PK\x03\x04' + b'\0' * 40)
  (folder / 'text.csv').write_text('1,2,3')
  (folder / 'noise.safetensors').write_bytes(b'\xff' * 99)
  outside = json.dumps({'a': {'dtype': 'F32', 'shape': [9, 9], 'data_offsets': [0, 324]}}).encode()
  (folder / 'outside.safetensors').write_bytes(len(outside).to_bytes(8, 'little') + outside + b'\0' * 100)
  safetensors.numpy.save_file({'a': good.astype(np.int32)}, folder / 'integers.safetensors')
  safetensors.numpy.save_file({'a': good[:0]}, folder / 'empty.safetensors')
  return {
    'nan.npy': 'row 31 holds NaN',
    'constant.npy': 'row 44 is constant',
    'infinite.npy': 'row 7 holds NaN or inf',
    'flat.npy': 'shape (371,)',
    'cube.npy': 'takes every sequence',
    'cubes.npy': 'shape (1, 1, 53, 7)',
    'gap.npy': 'shape (53, 1, 0)',
    'bfloat16.npy': 'holds |V2: two-byte values',
    'float8.npy': 'holds |V1: bytes without a type',
    'underflow.npy': 'float32 loses a share of 1 of',
    'empty.npy': 'shape (0, 7)',
    'narrow.npy': 'shape (53, 0)',
    'integers.npy': 'int32',
    'complex.npy': 'complex128',
    'records.npy': 'float32',
    'cut.npy': 'not a plain',
    'nothing.npy': 'not a plain',
    'vast.npy': 'not a plain',
    'beyond.npy': 'not a plain',
    'true.npy': 'not a plain',
    'badzip.npy': 'not a plain',
    'brackets.npy': 'not a plain',
    'parentheses.npy': 'its header has',
    'gigabytes.npy': 'its header has 4294967295',
    'gigabytes.safetensors': 'its header has 8589934592',
    'brackets.safetensors': 'nested too deeply',
    'text.csv': 'is none of',
    'noise.safetensors': 'not a safetensors',
    'outside.safetensors': 'not a safetensors',
    'integers.safetensors': 'I32',
    'empty.safetensors': 'shape (0, 7)',
    'missing.npy': 'does not exist',
    'missing.safetensors': 'does not exist',
  }


def test_import_of_hostile_files_is_one_line(tmp_path, capsys):
  for name, reason in hostile_files(tmp_path).items():
    code, out, error = run(
      capsys, 'import', f'--from={tmp_path}/{name}', f'--out={tmp_path}/{name}-out', '--held_out=5'
    )
    assert (code, out, error.count('\n')) == (2, '', 1), (name, error)
    assert reason in error, (name, error)
    assert len(error.replace(str(tmp_path), '')) <= 200, error
    assert not (tmp_path / f'{name}-out' / 'store.json').exists()


def test_import_of_numbers_out_of_range_is_one_line(tmp_path, capsys):
  np.save(tmp_path / 'a.npy', activations('train'))
  np.save(tmp_path / 'b.npy', activations('train')[:, :3])
  base = ['import', f'--out={tmp_path}/s', f'--from={tmp_path}/a.npy']
  for more, reason in (
    (['--held_out=53'], 'held_out=53'),
    (['--held_out=1'], 'held_out=1'),
    (['--held_out=5', '--block_tokens=0'], 'block_tokens=0'),
    (['--held_out=5', '--seed=-1'], 'seed=-1'),
    (['--held_out=5', '--from', f'{tmp_path}/a.npy', f'{tmp_path}/b.npy'], 'widths [3, 7]'),
  ):
    code, _, error = run(capsys, *base, *more)
    assert (code, error.count('\n')) == (2, 1)
    assert reason in error


# ----- what earlier versions wrote


def test_import_makes_the_store_that_an_early_version_made(tmp_path, capsys):
  """Row for row and bit for bit: `data.identity` of old cells must stay true."""
  argv = ['import', f'--from={FROZEN}/activations.npy', '--held_out=20', f'--out={tmp_path}/s']
  assert run(capsys, *argv)[0] == 0
  made, old = (config.read_store_file(str(path)) for path in (tmp_path / 's', FROZEN / 'store'))
  assert made['identity'] == old['identity']
  for key in ('variance', 'mean_square', 'mean_norm'):
    assert made['statistics']['train'][key] == pytest.approx(old['statistics']['train'][key], rel=1e-14)


@pytest.mark.parametrize('finished', [True, False])
def test_store_begun_with_another_default_of_the_block_goes_on(tmp_path, capsys, monkeypatch, finished):
  x_BD = activations('train')
  np.save(tmp_path / 'a.npy', x_BD)
  argv = ['import', f'--from={tmp_path}/a.npy', '--held_out=11', f'--out={tmp_path}/s']
  monkeypatch.setattr(store_import, '_BLOCK_BYTES', 16 * D * 2)
  if not finished:
    monkeypatch.setattr(store_writer.StoreWriter, 'finish', lambda self: pytest.fail('stopped'))
    with pytest.raises(pytest.fail.Exception):
      store.main(argv)
  else:
    run(capsys, *argv)
  monkeypatch.undo()
  assert run(capsys, *argv)[0] == 0
  assert config.read_store_file(str(tmp_path / 's'))['block_tokens'] == 16


def test_default_block_is_64_mib_at_most(tmp_path, monkeypatch):
  asked = {}
  monkeypatch.setattr(store_writer, 'finished', lambda out, settings, came_from: asked.update(settings) or True)
  for width, dtype, want in (
    (8, 'float16', 32_768),
    (1024, 'float16', 32_768),
    (4096, 'float16', 8192),
    (4096, 'float32', 4096),
    (40_000_000, 'float32', 1),
  ):
    path = tmp_path / 'a.npy'
    np.lib.format.open_memmap(path, 'w+', np.float16, (3, width))
    monkeypatch.setattr(store_import.inputs, 'digests', lambda sources: [])
    store_import.import_arrays(
      sources=[str(path)], out=str(tmp_path / 's'), held_out=2, normalize='none', seed=0, dtype=dtype
    )
    assert asked['block_windows'] == want
    path.unlink()


def test_slices_and_blocks_change_no_bit(tmp_path, capsys, monkeypatch):
  np.save(tmp_path / 'a.npy', activations('train'))
  argv = ['import', f'--from={tmp_path}/a.npy', '--held_out=11', '--block_tokens=16']
  run(capsys, *argv, f'--out={tmp_path}/whole')
  for module in (store_import, store_writer, scan):
    monkeypatch.setattr(module, '_SLICE', 3 * D)
  run(capsys, *argv, f'--out={tmp_path}/sliced')
  whole, sliced = (config.read_store_file(f'{tmp_path}/{name}') for name in ('whole', 'sliced'))
  assert whole['identity'] == sliced['identity']
