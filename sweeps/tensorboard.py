"""Metrics of a ledger as TensorBoard event files, one run a cell. Files are written whole: run it again to refresh.

python -m sweeps.tensorboard --ledger=DIR --out=DIR && tensorboard --logdir=DIR

An optional extra (pip install 'sae_jax[tensorboard]') writes them; TensorBoard itself is not needed for that.
"""

import math
import pathlib
import re
import tempfile
from typing import Any

from sae_jax import files, metrics
from sae_jax.errors import UserError, one_line_errors
from sweeps import flags, grid, ledger


def export(store: ledger.Ledger, out: str) -> int:
  """Writes the event file of every cell that has metrics; returns their number.

  Raises:
    UserError: the package is missing, or `out` cannot be written.
  """
  count = 0
  for entry in store.entries():
    if lines := metrics.read_metrics(store.folder(entry.id), entry.id):
      path = files.join(out, run_name(entry), f'events.out.tfevents.0.{entry.id}')
      files.write_output(path, events(lines), '--out')
      count += 1
  return count


def events(lines: list[dict[str, Any]]) -> bytes:
  """An event file: every finite number of every line by its step, at the cell's training time `wall_s`.

  Raises `UserError` when the package is missing.
  """
  try:
    from tensorboardX import SummaryWriter
  except ImportError:
    raise UserError("tensorboardX is not installed; pip install 'sae_jax[tensorboard]'") from None
  # Its file has the time in its name. Written to `out`, it would be another one each time.
  with tempfile.TemporaryDirectory() as folder:
    with SummaryWriter(folder) as writer:
      for line in lines:
        wall = line.get('wall_s')
        for tag, number in sorted(line.items()):
          if tag not in ('step', 'wall_s') and _is_scalar(number):
            writer.add_scalar(tag, number, line['step'], wall if _is_scalar(wall) else 0.0)
    (file,) = pathlib.Path(folder).iterdir()
    return file.read_bytes()


def run_name(entry: ledger.Entry) -> str:
  """A folder name that says what the cell is: '0123456789ab sae.k=4'."""
  label = re.sub(r'[^A-Za-z0-9=._+-]+', ' ', grid.label(entry.overrides)).strip(' .')
  return f'{entry.id} {label}'.strip()[:120]


def _is_scalar(value: Any) -> bool:
  # TensorBoard keeps float32. What does not fit there is left out rather than shown as infinite.
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38 and math.isfinite(value)


@one_line_errors
def main(argv: list[str]) -> int:
  parser = flags.parser(
    'tensorboard', 'Write the metrics of every cell as TensorBoard event files; run it again to refresh them.'
  )
  parser.add_argument('--out', required=True, metavar='DIR', help='what to give to tensorboard --logdir')
  args = parser.parse_args(argv)
  written = export(args.ledger, args.out)
  print(f'{written} runs in {args.out}' if written else f'no cell of {args.ledger.path} has metrics yet')
  return 0


if __name__ == '__main__':
  main()
