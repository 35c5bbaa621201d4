"""Event files, read back by the published format, with checksums of another package than the one that writes."""

import json
import pathlib
import struct
import sys
from collections.abc import Iterator

import google_crc32c
import pytest
from tensorboardX.proto import event_pb2

from experiments import tiny
from sae_jax import config, files, schema
from sae_jax.errors import UserError
from sweeps import grid, ledger, tensorboard

LINES = [
  {
    'step': 1,
    'wall_s': 0.5,
    'eval/nmse': 0.75,
    'eval/weights': 'ema',
    'bit': True,
    'huge': 1e300,
    'missing': None,
  },
  {'step': 70_000, 'wall_s': 1.5, 'eval/nmse': 0.5, 'tokens': 2**31},
  {'step': 70_001, 'eval/nmse': 0.25},
]
READ = [
  (1, 0.5, 'eval/nmse', 0.75),
  (70_000, 1.5, 'eval/nmse', 0.5),
  (70_000, 1.5, 'tokens', 2.0**31),
  (70_001, 0.0, 'eval/nmse', 0.25),
]


def records(data: bytes) -> Iterator[bytes]:
  """The records of an event file: a length, its masked CRC-32C, so many bytes, theirs."""
  while data:
    (length,) = struct.unpack('<Q', data[:8])
    for start, stop in ((0, 8), (12, 12 + length)):
      crc = google_crc32c.value(data[start:stop])
      assert struct.unpack('<I', data[stop : stop + 4])[0] == ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32
    yield data[12 : 12 + length]
    data = data[16 + length :]


def read(data: bytes) -> list[tuple[int, float, str, float]]:
  """Step, time, name and value of every number in an event file."""
  version, *found = map(event_pb2.Event.FromString, records(data))
  assert version.file_version == 'brain.Event:2'
  return [(e.step, e.wall_time, v.tag, v.simple_value) for e in found for v in e.summary.value]


def test_events_hold_every_number_by_its_step():
  assert read(tensorboard.events(LINES)) == READ


@pytest.fixture
def store(tmp_path):
  made = ledger.Ledger(str(tmp_path / 'ledger'))
  overrides = {'a.../../b': '../x'}
  made.register(grid.Sweep('one', 'experiments/tiny.py', ((overrides, config.resolve(tiny.get_config())),), dropped=0))
  return made


def write_metrics(store: ledger.Ledger, lines: list[dict]) -> None:
  # As another version may have left them: without digests.
  (entry,) = store.entries()
  (pathlib.Path(store.folder(entry.id)) / schema.METRICS).write_text('\n'.join(map(json.dumps, lines)))


def test_one_run_a_cell_and_names_stay_inside(store, tmp_path, capsys):
  argv = [f'--ledger={store.path}', f'--out={tmp_path / "out"}']
  with pytest.raises(SystemExit) as ended:
    tensorboard.main(argv)
  assert ended.value.code == 0 and 'no cell' in capsys.readouterr().out and not (tmp_path / 'out').exists()
  for count in (1, 3, 3):
    write_metrics(store, LINES[:count])
    with pytest.raises(SystemExit):
      tensorboard.main(argv)
    (found,) = [p for p in (tmp_path / 'out').rglob('*') if p.is_file()]
    assert found.parent.parent == tmp_path / 'out' and found.parent.name.startswith(store.entries()[0].id)
    assert read(found.read_bytes()) == [
      number for number in READ if number[0] in [line['step'] for line in LINES[:count]]
    ]


def test_events_go_to_a_bucket_too(store):
  write_metrics(store, LINES)
  assert tensorboard.export(store, 'memory://board') == 1
  (run,) = files.listdir('memory://board')
  (name,) = files.listdir(files.join('memory://board', run))
  assert read(files.read(files.join('memory://board', run, name))) == READ


def test_out_that_cannot_be_written_is_named(store, tmp_path):
  write_metrics(store, LINES)
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write .* choose another --out'):
    tensorboard.export(store, str(tmp_path / 'file'))


def test_export_without_the_package_names_the_extra(store, tmp_path, monkeypatch):
  write_metrics(store, LINES)
  monkeypatch.setitem(sys.modules, 'tensorboardX', None)
  with pytest.raises(UserError, match=r'sae_jax\[tensorboard\]'):
    tensorboard.export(store, str(tmp_path / 'out'))
