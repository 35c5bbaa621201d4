"""What a user names for store import is the rows it stands for: lists, patterns, sequences, masks."""

import pathlib

import numpy as np
import pytest
import safetensors.numpy

from sae_jax import config
from sae_jax.data import inputs, matrix, store
from tests.test_store import cell
from tests.test_store_import import run

B, T, D = 13, 5, 7


def sequences(dtype='f4') -> np.ndarray:
  return (3 + np.random.default_rng(5).standard_normal((B, T, D))).astype(dtype)


def imported(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture, *argv: str) -> tuple[np.ndarray, np.ndarray]:
  """Training rows, sorted, and held-out rows of a store of raw numbers."""
  out = tmp_path / 'out'
  found = run(capsys, 'import', *argv, f'--out={out}', '--normalize=none', '--dtype=float32', '--seed=2')
  assert found[0] == 0, found
  meta = store.read_meta(str(out))
  opened = store.Store(cell(out, **{'train.tokens': 4, 'eval.tokens': 2}))
  return in_order(opened.rows(0, meta['tokens'])), opened.held_out(0, meta['held_out_tokens'])


def in_order(x_BD: np.ndarray) -> np.ndarray:
  return x_BD[np.lexsort(x_BD.T)]


def test_sequences_are_held_out_whole(tmp_path, capsys):
  x_BTD = sequences()
  np.save(tmp_path / 'a.npy', x_BTD[:9])
  safetensors.numpy.save_file({'x': x_BTD[9:]}, tmp_path / 'b.safetensors')
  train_BD, held_out_BD = imported(
    tmp_path, capsys, '--from', f'{tmp_path}/a.npy', f'{tmp_path}/b.safetensors', '--held_out=11'
  )
  np.testing.assert_array_equal(held_out_BD, x_BTD[-3:].reshape(-1, D))  # 15 rows: three whole sequences
  np.testing.assert_array_equal(train_BD, in_order(x_BTD[:-3].reshape(-1, D)))


@pytest.mark.parametrize('drop_first', [0, 2])
@pytest.mark.parametrize('dtype', [bool, np.int64])
def test_mask_leaves_out_padding_and_the_first_tokens_after_it(tmp_path, capsys, drop_first, dtype):
  x_BTD = sequences()
  mask_BT = np.random.default_rng(1).random((B, T)) < 0.7
  mask_BT[3], mask_BT[-2] = False, False  # sequences of padding alone
  for i, part in enumerate((slice(0, 6), slice(6, None))):
    np.save(tmp_path / f'a{i}.npy', x_BTD[part])
    np.save(tmp_path / f'm{i}.npy', mask_BT[part].astype(dtype))
  x_BTD[~mask_BT] = np.nan  # what is masked is never looked at
  np.save(tmp_path / 'a1.npy', x_BTD[6:])
  names = ['--from', f'{tmp_path}/a?.npy', '--mask', f'{tmp_path}/m?.npy', f'--drop_first={drop_first}']
  train_BD, held_out_BD = imported(tmp_path, capsys, *names, '--held_out=7')
  rows = [x_TD[mask_T][drop_first:] for x_TD, mask_T in zip(x_BTD, mask_BT, strict=True)]
  cut = max(i for i in range(B) if sum(map(len, rows[i:])) >= 7)
  np.testing.assert_array_equal(held_out_BD, np.concatenate(rows[cut:]))
  np.testing.assert_array_equal(train_BD, in_order(np.concatenate(rows[:cut])))
  provenance = config.read_store_file(str(tmp_path / 'out'))['provenance']
  assert len(provenance['mask_sha256']) == 2 and provenance.get('drop_first', 0) == drop_first


def test_another_mask_is_another_store(tmp_path, capsys):
  np.save(tmp_path / 'a.npy', sequences())
  argv = [
    'import',
    f'--from={tmp_path}/a.npy',
    f'--mask={tmp_path}/m.npy',
    f'--out={tmp_path}/s',
    '--held_out=5',
  ]
  for last, code in ((0, 0), (0, 0), (1, 2)):
    mask_BT = np.ones((B, T), np.uint8)
    mask_BT[0, last] = 0  # as many tokens either way
    np.save(tmp_path / 'm.npy', mask_BT)
    found = run(capsys, *argv)
    assert found[0] == code
  assert 'mask_sha256' in found[2]
  assert 'mask_sha256' in run(capsys, *argv[:2], *argv[3:])[2] or run(capsys, *argv[:2], *argv[3:])[0] == 2


def test_masks_that_do_not_fit_are_refused(tmp_path, capsys):
  x_BTD = sequences()
  np.save(tmp_path / 'a.npy', x_BTD)
  np.save(tmp_path / 'rows.npy', x_BTD.reshape(-1, D))
  ones_BT = np.ones((B, T), np.int32)
  for name, mask in (
    ('turned', ones_BT.T),
    ('short', ones_BT[1:]),
    ('ids', ones_BT * 464),
    ('float', ones_BT.astype('f4')),
    ('none', 0 * ones_BT),
    ('one', np.eye(B, T, dtype='i4')),
    ('flat', ones_BT.ravel()),
  ):
    np.save(tmp_path / f'{name}.npy', mask)
  base = ['import', f'--out={tmp_path}/s', '--held_out=5']
  for source, more, reason in (
    ('a', ['--mask=turned.npy'], 'shape (5, 13) and a.npy has (13, 5)'),
    ('a', ['--mask=short.npy'], 'shape (12, 5)'),
    ('a', ['--mask=flat.npy'], 'shape (65,)'),
    ('a', ['--mask=ids.npy'], 'holds 464; a mask has 1'),
    ('a', ['--mask=float.npy'], 'float32'),
    ('a', ['--mask', 'one.npy', 'none.npy'], '2 masks for 1 sources'),
    ('a', ['--mask=none.npy'], '--held_out=5 of 0'),
    ('a', ['--mask=one.npy'], '--held_out=5 of 5'),
    ('a', ['--drop_first=5'], 'of 0 tokens'),
    ('rows', ['--drop_first=1'], 'needs sequences'),
    ('a', ['--drop_first=-1'], '--drop_first=-1'),
    ('a', ['--held_out=61'], 'takes every sequence'),
  ):
    with pytest.MonkeyPatch.context() as patched:
      patched.chdir(tmp_path)
      code, _, error = run(capsys, *base, f'--from={source}.npy', *more)
    assert code == 2 and error.count('\n') == 1 and reason in error, (more, error)


@pytest.mark.parametrize('drop_first', [0, 1])
def test_documents_are_held_out_whole(tmp_path, capsys, drop_first):
  """Rows in no sequences, of documents of 1 to 9 rows; the last document of the first file goes on in the second."""
  document_B = np.repeat([7, 3, 12, 4, 9, 1], [9, 1, 6, 5, 8, 3])
  x_BD = np.random.default_rng(6).standard_normal((32, D)).astype('f4')
  for i, part in enumerate((slice(0, 18), slice(18, 32))):
    np.save(tmp_path / f'a{i}.npy', x_BD[part])
    np.save(tmp_path / f'd{i}.npy', document_B[part])
  names = ['--from', f'{tmp_path}/a?.npy', '--documents', f'{tmp_path}/d?.npy', f'--drop_first={drop_first}']
  train_BD, held_out_BD = imported(tmp_path, capsys, *names, '--held_out=11')
  rows = [x_BD[document_B == one][drop_first:] for one in (7, 3, 12, 4, 9, 1)]
  cut = 4 if drop_first == 0 else 3  # 11 rows, or 2 + 7 + 4
  np.testing.assert_array_equal(held_out_BD, np.concatenate(rows[cut:]))
  np.testing.assert_array_equal(train_BD, in_order(np.concatenate(rows[:cut])))


def test_documents_of_sequences_are_held_out_whole_too(tmp_path, capsys):
  x_BTD = sequences()
  np.save(tmp_path / 'a.npy', x_BTD)
  np.save(tmp_path / 'd.npy', np.repeat([5, 2, 8], [6, 3, 4]))
  names = [f'--from={tmp_path}/a.npy', f'--documents={tmp_path}/d.npy', '--drop_first=1']
  train_BD, held_out_BD = imported(tmp_path, capsys, *names, '--held_out=5')
  np.testing.assert_array_equal(held_out_BD, x_BTD[-4:, 1:].reshape(-1, D))
  np.testing.assert_array_equal(train_BD, in_order(x_BTD[:-4, 1:].reshape(-1, D)))
  np.save(tmp_path / 'd.npy', np.repeat([5, 2, 5], [6, 3, 4]))
  out = ['--out', str(tmp_path / 's'), '--held_out=5']
  assert 'document 5 is in two places' in run(capsys, 'import', *names, *out)[2]
  np.save(tmp_path / 'd.npy', np.repeat([5], [13]))
  assert 'takes every sequence or document' in run(capsys, 'import', *names, *out)[2]


def test_a_row_is_named_by_its_sequence(tmp_path, capsys):
  x_BTD = sequences()
  x_BTD[4, 3, 2] = np.inf
  np.save(tmp_path / 'a.npy', x_BTD)
  _, _, error = run(capsys, 'import', f'--from={tmp_path}/a.npy', f'--out={tmp_path}/s', '--held_out=5')
  assert 'a.npy: token 3 of sequence 4 holds NaN or infinity' in error


def test_thousands_of_files_need_no_thousands_of_descriptors(tmp_path):
  for i in range(20):
    np.save(tmp_path / f'{i}.npy', sequences())
  before = len(list(pathlib.Path('/proc/self/fd').iterdir()))
  pieces = [matrix.open_npy(str(tmp_path / f'{i}.npy'), matrix.FLOATS) for i in range(20)]
  assert [piece.take(np.array([1, 64])).shape for piece in pieces] == [(2, D)] * 20
  # The rest of the process opens and closes some of its own.
  assert len(list(pathlib.Path('/proc/self/fd').iterdir())) < before + 20


def test_names_are_split_where_files_are(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'odd:name').mkdir()
  (tmp_path / 'cache').mkdir()
  assert inputs.split('odd:name') == ('odd:name', '') and inputs.split('cache:blocks.0') == (
    'cache',
    'blocks.0',
  )
  assert inputs.split('a.safetensors:x:y') == ('a.safetensors', 'x:y') and inputs.split('no:such') == (
    'no:such',
    '',
  )
