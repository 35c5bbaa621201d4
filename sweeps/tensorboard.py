"""Metrics of a ledger as TensorBoard event files, one run a cell; TensorBoard itself is not needed to write them.

python -m sweeps.tensorboard --ledger=DIR --out=DIR && tensorboard --logdir=DIR

The format is two lines of framing around a small protocol buffer. Files are written whole: run it again to refresh.
"""

import argparse
import math
import re
import struct
from collections.abc import Iterator
from typing import Any

from sae_jax import files, metrics
from sae_jax.errors import UserError, one_line_errors
from sweeps import grid, ledger

_POLYNOMIAL = 0x82F63B78  # CRC-32C, bits reversed
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


def events(lines: list[dict[str, Any]]) -> bytes:
  """An event file: every finite number of every line by its step, at the cell's training time `wall_s`."""
  return b''.join(_record(event) for event in _events(lines))


def run_name(cell: ledger.Cell) -> str:
  """A folder name that says what the cell is: '0123456789ab sae.k=4'."""
  label = re.sub(r'[^A-Za-z0-9=._+-]+', ' ', grid.label(cell.overrides)).strip(' .')
  return f'{cell.id} {label}'.strip()[:120]


def _events(lines: list[dict[str, Any]]) -> Iterator[bytes]:
  yield _field(1, _FIXED64, struct.pack('<d', 0.0)) + _field(3, _BYTES, b'brain.Event:2')
  for line in lines:
    values = b''.join(
      _field(1, _BYTES, _field(1, _BYTES, tag.encode()) + _field(2, _FIXED32, struct.pack('<f', number)))
      for tag, number in sorted(line.items())
      if tag not in ('step', 'wall_s') and _is_scalar(number)
    )
    wall = line.get('wall_s', 0.0)
    yield (
      _field(1, _FIXED64, struct.pack('<d', wall if _is_scalar(wall) else 0.0))
      + _field(2, _VARINT, _varint(int(line['step'])))
      + _field(5, _BYTES, values)
    )


def _is_scalar(value: Any) -> bool:
  # TensorBoard keeps float32; what does not fit there is left out rather than shown as infinite.
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38 and math.isfinite(value)


def _field(number: int, wire_type: int, data: bytes) -> bytes:
  return _varint(number << 3 | wire_type) + (_varint(len(data)) if wire_type == _BYTES else b'') + data


def _varint(value: int) -> bytes:
  coded = bytearray()
  value &= (1 << 64) - 1
  while value >= 0x80:
    coded.append(value & 0x7F | 0x80)
    value >>= 7
  return bytes([*coded, value])


def _record(data: bytes) -> bytes:
  """TFRecord framing: length, its checksum, data, their checksum."""
  length = struct.pack('<Q', len(data))
  return length + _checksum(length) + data + _checksum(data)


def _checksum(data: bytes) -> bytes:
  crc = crc32c(data)
  return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def crc32c(data: bytes) -> int:
  """Castagnoli's checksum."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
  return crc ^ 0xFFFFFFFF


def _table_entry(value: int) -> int:
  for _ in range(8):
    value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
  return value


_TABLE = [_table_entry(byte) for byte in range(256)]


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m sweeps.tensorboard',
    description='Write the metrics of every cell as TensorBoard event files; run it again to refresh them.',
  )
  parser.add_argument('--ledger', required=True, help='folder or fsspec URL of the sweep')
  parser.add_argument('--out', required=True, metavar='DIR', help='what to give to tensorboard --logdir')
  return parser


@one_line_errors
def main(argv: list[str]) -> int:
  args = _parser().parse_args(argv)
  store = ledger.Ledger(args.ledger)
  written = 0
  for cell in store.cells():
    if lines := metrics.read_metrics(store.folder(cell.id), cell.id):
      path = files.join(args.out, run_name(cell), f'events.out.tfevents.0.{cell.id}')
      try:
        files.replace(path, events(lines))
      except OSError as error:
        raise UserError(f'cannot write {path} ({error.strerror}); choose another --out') from None
      written += 1
  print(f'{written} runs in {args.out}' if written else f'no cell of {store.path} has metrics yet')
  return 0


if __name__ == '__main__':
  main()
