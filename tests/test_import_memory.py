"""The benchmark of the importer's memory runs, and on a file of many blocks holds less than the file."""

import pytest

from bench import import_memory
from sae_jax.data import normalize, store_import, store_writer


def test_small_file_is_measured(tmp_path):
  row = import_memory.measure(0.01, 'float16', str(tmp_path))
  assert row['rows'] == 1220 and row['file_bytes'] == 1220 * 4096 * 2 + 128
  assert 10**7 < row['peak_anonymous_bytes'] < import_memory.GOAL_BYTES
  assert list(tmp_path.iterdir()) == []
  assert '0.01 GB of float16 at D = 4096' in import_memory.line(row)


def test_a_block_is_normalised_in_slices(tmp_path, monkeypatch):
  """29 bytes were held for every number of a block, because a whole block was float64 several times over."""
  rows = []
  genuine = normalize.normalize
  monkeypatch.setattr(store_writer, 'normalize', lambda x_BD, *args: (rows.append(len(x_BD)), genuine(x_BD, *args))[1])
  path = tmp_path / 'a.npy'
  import_memory._fill(path, 700, 'float16')
  store_import.import_arrays(
    sources=[str(path)],
    out=str(tmp_path / 's'),
    held_out=9,
    normalize='none',
    seed=0,
    dtype='float16',
    block_tokens=691,
  )
  assert max(rows) * import_memory.WIDTH <= 2**20 and sum(rows) == 700


@pytest.mark.parametrize('argv', [['--gigabytes=0'], ['--gigabytes=x']])
def test_size_that_is_none_is_refused(argv, capsys):
  with pytest.raises(SystemExit) as ended:
    import_memory.main(argv)
  assert ended.value.code == 2 and 'is not a positive number' in capsys.readouterr().err
