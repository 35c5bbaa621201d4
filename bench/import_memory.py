"""Memory of `store import`: a file far larger than it, at D = 4,096, by the anonymous memory of the process.

python -m bench.import_memory [--gigabytes=5] [--folder=/tmp] [--json=OUT]     (Linux)
Time: 9 minutes for 5 GB of each dtype on two busy cores, and 10 GB of disk. Expected: 276 MB for float32 and 325 MB for
float16, whatever the size of the file (bench/results/2026-11-28-import.json), sampled every 20 ms. Mapped files are not
counted: the kernel drops their pages when it needs them.
"""

import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from bench import command
from bench.alternate import ROOT, machine
from sae_jax import config
from sae_jax.errors import UserError, one_line_errors
from sae_jax.flags import positive

WIDTH = 4096
DTYPES = ('float32', 'float16')  # of the file and of the store
GOAL_BYTES = 10**9
_EVERY_S = 0.02


def measure(gigabytes: float, dtype: str, folder: str) -> dict[str, Any]:
  """Writes a file of random rows, imports it in a process of its own, and watches that process."""
  rows = int(gigabytes * 1e9 / WIDTH / np.dtype(dtype).itemsize)
  with tempfile.TemporaryDirectory(dir=folder) as name:
    path, out = pathlib.Path(name) / 'acts.npy', pathlib.Path(name) / 'store'
    _fill(path, rows, dtype)
    held_out = min(16_384, rows // 4)
    flags = [
      f'--from={path}',
      f'--out={out}',
      '--normalize=scale',
      f'--dtype={dtype}',
      f'--held_out={held_out}',
    ]
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, '-m', 'sae_jax.data.store', 'import', *flags], cwd=ROOT)
    peak = {'RssAnon': 0, 'RssFile': 0}
    while process.poll() is None:
      now = _memory(process.pid)
      peak = {key: max(before, now.get(key, 0)) for key, before in peak.items()}
      time.sleep(_EVERY_S)
    if process.returncode:
      raise UserError(f'the import ended with code {process.returncode}; see above')
    meta = config.read_store_file(str(out))
    return {
      'file_bytes': path.stat().st_size,
      'rows': rows,
      'width': WIDTH,
      'dtype': dtype,
      'block_tokens': meta['block_tokens'],
      'peak_anonymous_bytes': peak['RssAnon'],
      'peak_file_bytes': peak['RssFile'],
      'goal_bytes': GOAL_BYTES,
      'wall_s': time.monotonic() - began,
    }


def line(row: dict[str, Any]) -> str:
  """One sentence for a terminal."""
  return (
    f'{row["file_bytes"] / 1e9:.2f} GB of {row["dtype"]} at D = {row["width"]}: peak '
    f'{row["peak_anonymous_bytes"] / 1e6:,.0f} MB of anonymous memory (goal {row["goal_bytes"] / 1e6:,.0f} MB), '
    f'{row["wall_s"]:.0f} s'
  )


def _fill(path: pathlib.Path, rows: int, dtype: str) -> None:
  """A .npy of random rows, a thousand at a time."""
  rng = np.random.default_rng(0)
  x_BD = np.lib.format.open_memmap(path, 'w+', dtype, (rows, WIDTH))
  for i in range(0, rows, 1000):
    x_BD[i : i + 1000] = rng.standard_normal((min(1000, rows - i), WIDTH), np.float32)
  x_BD.flush()


def _memory(pid: int) -> dict[str, int]:
  """Bytes by kind that a process holds now; empty when it has ended."""
  try:
    lines = pathlib.Path(f'/proc/{pid}/status').read_text().splitlines()
  except OSError:
    return {}
  return {
    key: 1024 * int(value.split()[0])
    for key, _, value in (text.partition(':') for text in lines)
    if key.startswith('Rss')
  }


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('import_memory', __doc__)
  parser.add_argument('--gigabytes', type=positive('--gigabytes', '5'), default=5.0)
  parser.add_argument('--folder', default=tempfile.gettempdir(), help='with room for twice the file (%(default)s)')
  args = parser.parse_args(argv)
  rows = [measure(args.gigabytes, dtype, args.folder) for dtype in DTYPES]
  command.report({'rows': rows} | machine(), '\n'.join(map(line, rows)), args.json)
  return int(any(row['peak_anonymous_bytes'] > GOAL_BYTES for row in rows))


if __name__ == '__main__':
  main()
