import json
import pathlib
import struct

import pytest

from experiments import tiny
from sae_jax import config, schema
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
]


def records(data: bytes):
  """The frames of an event file, by the published format."""
  while data:
    (length,) = struct.unpack('<Q', data[:8])
    for start, stop in ((0, 8), (12, 12 + length)):
      crc = tensorboard.crc32c(data[start:stop])
      assert struct.unpack('<I', data[stop : stop + 4])[0] == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32
    yield data[12 : 12 + length]
    data = data[16 + length :]


def fields(data: bytes):
  """(number, value) of a protocol buffer message."""

  def varint():
    nonlocal data
    value = shift = 0
    while True:
      byte, data = data[0], data[1:]
      value, shift = value | (byte & 0x7F) << shift, shift + 7
      if byte < 0x80:
        return value

  found = []
  while data:
    key = varint()
    size = {0: 0, 1: 8, 5: 4}.get(key & 7) if key & 7 != 2 else varint()
    if key & 7 == 0:
      found.append((key >> 3, varint()))
    else:
      value, data = data[:size], data[size:]
      found.append((key >> 3, struct.unpack({8: '<d', 4: '<f'}[size], value)[0] if key & 7 != 2 else value))
  return found


def test_checksum_is_the_published_one():
  assert tensorboard.crc32c(b'123456789') == 0xE3069283


def test_events_hold_every_number_by_its_step():
  version, *events = [dict(fields(event)) for event in records(tensorboard.events(LINES))]
  assert version[3] == b'brain.Event:2'
  read = []
  for event in events:
    values = [dict(fields(value)) for _, value in fields(event[5])]
    read.append((event[2], event[1], {value[1].decode(): value[2] for value in values}))
  assert read == [(1, 0.5, {'eval/nmse': 0.75}), (70_000, 1.5, {'eval/nmse': 0.5, 'tokens': 2.0**31})]


def test_one_run_a_cell_and_names_stay_inside(tmp_path, capsys):
  resolved = config.resolve(tiny.get_config())
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(grid.Sweep('one', 'experiments/tiny.py', (({'a.../../b': '../x'}, resolved),), dropped=0))
  argv = [f'--ledger={store.path}', f'--out={tmp_path / "out"}']
  with pytest.raises(SystemExit) as ended:
    tensorboard.main(argv)
  assert ended.value.code == 0 and 'no cell' in capsys.readouterr().out and not (tmp_path / 'out').exists()
  # As another version may have left them: without digests.
  (pathlib.Path(store.folder(resolved.id)) / schema.METRICS).write_text('\n'.join(map(json.dumps, LINES)))
  for _ in range(2):
    with pytest.raises(SystemExit):
      tensorboard.main(argv)
    (found,) = [p for p in (tmp_path / 'out').rglob('*') if p.is_file()]
    assert found.parent.parent == tmp_path / 'out' and found.parent.name.startswith(resolved.id)
    assert found.read_bytes() == tensorboard.events(LINES)
