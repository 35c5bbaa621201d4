"""Arrow files and folders of `datasets` are read as they are, without `datasets`, or refused.

A folder that datasets 5.2.0 saved, with an Array2D in three shards, was read bit for bit on 2026-11-28.
"""

import json
import pathlib
import sys

import numpy as np
import pytest

from sae_jax.data import inputs
from sae_jax.errors import UserError
from tests.test_inputs import D, T, imported, in_order, sequences
from tests.test_store_import import run


@pytest.fixture
def pa():
  return pytest.importorskip('pyarrow', reason="needs pyarrow: pip install 'sae_jax[arrow]'")


def save_to_disk(pa, folder: pathlib.Path, tables: list, **state) -> None:
  """A folder as `datasets` writes it: Arrow streams and the state that names them."""
  folder.mkdir(parents=True)
  names = [f'data-{i:05}-of-{len(tables):05}.arrow' for i in range(len(tables))]
  for name, table in zip(names, tables, strict=True):
    with pa.OSFile(str(folder / name), 'wb') as sink, pa.ipc.new_stream(sink, table.schema) as writer:
      writer.write_table(table, max_chunksize=4)
  state = {'_data_files': [{'filename': name} for name in names], '_indices_data_files': None} | state
  (folder / 'state.json').write_text(json.dumps(state))
  (folder / 'dataset_info.json').write_text('{}')


def as_lists(pa, x: np.ndarray, fixed: bool):
  """Nested lists of a numpy array; with `fixed`, lists of a fixed size inside."""
  out = pa.array(x.reshape(-1))
  for size in x.shape[:0:-1]:
    if fixed:
      out = pa.FixedSizeListArray.from_arrays(out, size)
    else:
      out = pa.ListArray.from_arrays(pa.array(np.arange(0, len(out) + 1, size, dtype=np.int32)), out)
  return out


@pytest.mark.parametrize('fixed', [True, False])
@pytest.mark.parametrize('dtype', ['f2', 'f4', 'f8'])
def test_column_of_a_saved_dataset(tmp_path, capsys, pa, fixed, dtype):
  x_BTD = sequences(dtype)
  # SAELens: an Array2D a sequence, which is an extension type, beside the ids of the tokens.
  kind = {
    b'ARROW:extension:name': b'datasets.features.features.Array2DExtensionType',
    b'ARROW:extension:metadata': b'',
  }
  tables = []
  for part in (x_BTD[:9], x_BTD[9:]):
    column, ids = as_lists(pa, part, fixed), as_lists(pa, np.zeros((len(part), T), 'i4'), fixed)
    fields = [pa.field('token_ids', ids.type), pa.field('blocks.1.hook_mlp_out', column.type, metadata=kind)]
    tables.append(pa.table([ids, column], schema=pa.schema(fields)))
  save_to_disk(pa, tmp_path / 'cache', tables)
  for i, name in enumerate(('cache', 'cache:blocks.1.hook_mlp_out')):
    (tmp_path / str(i)).mkdir()
    train_BD, held_out_BD = imported(tmp_path / str(i), capsys, f'--from={tmp_path}/{name}', '--held_out=11')
    np.testing.assert_array_equal(held_out_BD, x_BTD[-3:].reshape(-1, D).astype('f4'))
    np.testing.assert_array_equal(train_BD, in_order(x_BTD[:-3].reshape(-1, D).astype('f4')))


def test_parts_of_a_cache_are_found_by_a_pattern(tmp_path, capsys, pa):
  x_BTD = sequences()
  for i, part in enumerate((x_BTD[:5], x_BTD[5:])):
    columns = {'acts': as_lists(pa, part, False), 'more': as_lists(pa, part + 1, False)}
    save_to_disk(pa, tmp_path / 'cache' / f'shard_{i}', [pa.table(columns)])
  train_BD, held_out_BD = imported(tmp_path, capsys, f'--from={tmp_path}/cache/shard_*:acts', '--held_out=11')
  np.testing.assert_array_equal(held_out_BD, x_BTD[-3:].reshape(-1, D))
  np.testing.assert_array_equal(train_BD, in_order(x_BTD[:-3].reshape(-1, D)))


@pytest.mark.parametrize('chunk', [2, 3, 20])
def test_sequences_of_an_arrow_file_may_differ_in_length_and_its_mask_too(tmp_path, capsys, pa, chunk):
  lengths = np.random.default_rng(3).integers(0, 7, 20)
  offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype('i4'))
  x_BD = np.random.default_rng(4).standard_normal((lengths.sum(), D)).astype('f4')
  mask_B = np.random.default_rng(5).random(len(x_BD)) < 0.8
  table = pa.table(
    {
      'acts': pa.ListArray.from_arrays(offsets, as_lists(pa, x_BD, False)),
      'mask': pa.ListArray.from_arrays(offsets, pa.array(mask_B)),
    }
  )
  with pa.OSFile(f'{tmp_path}/a.arrow', 'wb') as sink, pa.ipc.new_file(sink, table.schema) as writer:
    writer.write_table(table, max_chunksize=chunk)
  names = [
    f'--from={tmp_path}/a.arrow:acts',
    f'--mask={tmp_path}/a.arrow:mask',
    '--drop_first=1',
    '--held_out=9',
  ]
  train_BD, held_out_BD = imported(tmp_path, capsys, *names)
  parts = np.split(np.arange(len(x_BD)), np.cumsum(lengths)[:-1])
  rows = [x_BD[part[mask_B[part]]][1:] for part in parts]
  cut = max(i for i in range(20) if sum(map(len, rows[i:])) >= 9)
  np.testing.assert_array_equal(held_out_BD, np.concatenate(rows[cut:]))
  np.testing.assert_array_equal(train_BD, in_order(np.concatenate(rows[:cut])))


def test_arrow_folders_that_cannot_be_read_right_are_refused(tmp_path, capsys, pa):
  good = as_lists(pa, sequences().reshape(-1, D), False)
  uneven = pa.array([[1.0, 2.0], [3.0]])
  for name, columns, state, reason in (
    ('two', {'a': good, 'b': good}, {}, 'one of: a, b'),
    ('ids', {'a': pa.array([1, 2])}, {}, 'one of: none'),
    ('uneven', {'a': uneven}, {}, 'widths [1, 2]'),
    ('null', {'a': pa.array([[1.0], None])}, {}, 'lists are null'),
    ('hole', {'a': pa.array([[1.0, None]])}, {}, 'numbers are null'),
    ('picked', {'a': good}, {'_indices_data_files': [{'filename': 'i'}]}, 'flatten_indices'),
    ('outside', {'a': good}, {'_data_files': [{'filename': '../x.arrow'}]}, 'does not name'),
    ('gone', {'a': good}, {'_data_files': [{'filename': 'x.arrow'}]}, 'does not exist'),
    ('nothing', {'a': good}, {'_data_files': []}, 'does not name'),
  ):
    save_to_disk(pa, tmp_path / name, [pa.table(columns)], **state)
    code, _, error = run(capsys, 'import', f'--from={tmp_path}/{name}', f'--out={tmp_path}/s', '--held_out=5')
    assert code == 2 and error.count('\n') == 1 and reason in error, (name, error)
  whole = next((tmp_path / 'two').glob('*.arrow')).read_bytes()
  offsets = np.arange(0, 5 * D, D, dtype='<i4').tobytes()  # of the first four rows
  beyond = whole.replace(offsets, offsets[:-4] + (10**6).to_bytes(4, 'little'))
  assert beyond != whole
  for name, data in (('cut', whole[:-300]), ('beyond', beyond), ('noise', b'\xff' * 999), ('empty', b'')):
    (tmp_path / f'{name}.arrow').write_bytes(data)
    code, _, error = run(capsys, 'import', f'--from={tmp_path}/{name}.arrow:a', f'--out={tmp_path}/s', '--held_out=5')
    assert code == 2 and error.count('\n') == 1 and 'not a sound Arrow file' in error, (name, error)
  (tmp_path / 'splits').mkdir()
  (tmp_path / 'splits' / 'dataset_dict.json').write_text('{"splits": ["train"]}')
  assert 'name one of them' in run(capsys, 'import', f'--from={tmp_path}/splits', f'--out={tmp_path}/s')[2]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
  (tmp_path / 'a.arrow').write_bytes(b'')
  monkeypatch.setitem(sys.modules, 'pyarrow', None)
  with pytest.raises(UserError, match=r"pip install 'sae_jax\[arrow\]'"):
    inputs.open_source(str(tmp_path / 'a.arrow'))
