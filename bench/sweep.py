"""Twenty autoencoders on one language model: one by one with a pass of the model each, and together on one pass.

python -m bench.sweep [--tokens=30720] [--json=OUT]
Two real launches of the demo's cells with a live subject, each into an empty ledger: `--group=1`, then all in one group.
Every cell must end with the same parameters, bit for bit, in both.
"""

import contextlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

from bench import command
from bench.alternate import ROOT, machine
from bench.worker import cpu_time, memory, share_of_others
from sae_jax import schema
from sae_jax.errors import UserError, one_line_errors
from sae_jax.flags import whole
from sweeps import grid, ledger

TOKENS = 30_720  # of each cell: 60 batches of 512
_HELD_OUT = 2048
_LOOK_S = 0.2  # how often memory is looked at
_WIDTH = 576  # of SmolLM2-135M
APART, TOGETHER = 'one by one', 'one group'
_GRID = """
from experiments import demo
from sweeps import grid
from sweeps.grids import demo as cells

EXPERIMENT = demo


def sweep():
  return grid.product(cells.sweep()[::{every}], [{overrides}])
"""


def measure(tokens: int = TOKENS, every: int = 1) -> dict[str, Any]:
  """The demo's cells, or every so many of them, on `tokens` of the live subject each; and one pass of it alone.

  That pass is a harvest of the same tokens, its process included.
  """
  data = {'data.store_tokens': tokens, 'data.held_out_tokens': _HELD_OUT}
  overrides = data | {
    'data.source': 'live',
    'sae.d_model': _WIDTH,
    'train.tokens': tokens,
    'eval.tokens': _HELD_OUT,
    'eval.batch_tokens': _HELD_OUT,
  }
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
    folder = pathlib.Path(name)
    row = compare(grid_file(folder, every, overrides), folder)
    flags = [f'--config.{key}={value}' for key, value in data.items()]
    alone = run('sae_jax.data.harvest', '--config=experiments/demo.py', f'--out={folder / "store"}', *flags)
  return {'tokens': tokens, 'held_out_tokens': _HELD_OUT, 'subject_alone': alone} | row


def grid_file(folder: pathlib.Path, every: int, overrides: dict[str, Any]) -> pathlib.Path:
  """Writes a grid of every so many of the demo's cells with some keys replaced, and returns where it is."""
  path = folder / 'cells.py'
  path.write_text(_GRID.format(every=every, overrides=overrides))
  return path


def compare(path: pathlib.Path, folder: pathlib.Path) -> dict[str, Any]:
  """Runs the grid file at `path` one cell at a time and as one group, in ledgers below `folder`.

  Raises `UserError` when a launch fails, and when a cell does not end with the same parameters in both.
  """
  cells = grid.build(str(path)).cells
  runs: dict[str, dict[str, Any]] = {}
  digests: dict[str, dict[str, str]] = {}
  for name, size in ((APART, 1), (TOGETHER, len(cells))):
    took, results = launch(path, folder / f'group{size}', size)
    passes = -(-len(cells) // size)
    runs[name] = took | {
      'training_s': sum(r['wall_s'] for r in results.values()),
      'subject_passes': passes,
      'flops_subject': passes * max(r['flops_subject'] for r in results.values()),
      'flops_useful': sum(r['flops_useful'] for r in results.values()),
    }
    digests[name] = {cell_id: r['params_digest'] for cell_id, r in results.items()}
  apart, together = digests[APART], digests[TOGETHER]
  if differing := [config.id for _, config in cells if apart.get(config.id) != together.get(config.id)]:
    raise UserError(
      f'{len(differing)} of {len(cells)} cells do not end with the same parameters in a group as alone '
      f'({", ".join(differing)}); the two do not compute the same, so do not compare their time'
    )
  return {
    'cells': [overrides for overrides, _ in cells],
    'runs': runs,
    'params_digests': apart,
    'share': runs[TOGETHER]['seconds'] / runs[APART]['seconds'],
    'machine': machine(),
  }


def launch(path: pathlib.Path, where: pathlib.Path, size: int) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
  """Launches the grid file at `path` in groups of `size` into an empty ledger: what it took, and the result of each cell."""
  flags = (f'--sweep={path}', f'--ledger={where}', '--executor=local', '--workers=1', f'--group={size}')
  return run('sweeps.launch', *flags), _results(where)


def run(module: str, *flags: str, python: str = sys.executable) -> dict[str, float]:
  """Seconds of a command, its CPU time, its peak memory, and the share of the cores that others kept busy.

  The peak is the sum of the peaks of its processes. Raises `UserError` when the command fails.
  """
  began, before, own = time.monotonic(), cpu_time(), _children_s()
  try:
    process = subprocess.Popen(
      [python, '-m', module, *flags],
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu'},
      stdout=sys.stderr,
    )
  except OSError as error:
    raise UserError(f'cannot start {python} ({error.strerror}); see bench/peers.md for its packages') from error
  peaks: dict[int, int] = {}
  with process:
    while process.returncode is None:
      peaks |= _peaks(process.pid)  # the newest one of a process is its largest
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LOOK_S)
  if process.returncode:
    raise UserError(f'python -m {module} ended with code {process.returncode}; its output is above')
  seconds, cpu_s = time.monotonic() - began, _children_s() - own
  return {
    'seconds': seconds,
    'cpu_s': cpu_s,
    'peak_bytes': sum(peaks.values()),
    'load_of_others': share_of_others(before, cpu_s),
  }


def _peaks(pid: int) -> dict[int, int]:
  """The peak memory so far of a process and of all below it, by id."""
  try:
    peaks = {pid: memory(pid)['VmHWM']}
    children = [path.read_text() for path in pathlib.Path(f'/proc/{pid}/task').glob('*/children')]
  except (OSError, KeyError):  # it has ended
    return {}
  for child in ' '.join(children).split():
    peaks |= _peaks(int(child))
  return peaks


def lines(row: dict[str, Any]) -> str:
  """Markdown: a row a launch."""
  count = len(row['cells'])
  out = [
    f'{count} cells of {row["tokens"]:,} tokens:',
    '',
    '| | whole launch | training and evaluation in it | passes of the subject | FLOPs of the subject | of the cells |',
    '|---|---|---|---|---|---|',
  ]
  for name, r in row['runs'].items():
    out.append(
      f'| {name} | {r["seconds"]:,.0f} s | {r["training_s"]:,.0f} s | {r["subject_passes"]} | '
      f'{r["flops_subject"]:.2e} | {r["flops_useful"]:.2e} |'
    )
  return '\n'.join(
    [
      *out,
      '',
      f'Together they take {row["share"]:.2f} of the time, and each ends with the same parameters bit for bit. One pass of '
      f'the subject alone, harvested by a process of its own: {row["subject_alone"]["seconds"]:,.0f} s.',
    ]
  )


def _results(where: pathlib.Path) -> dict[str, dict[str, Any]]:
  store = ledger.Ledger(str(where))
  return {
    entry.id: json.loads(pathlib.Path(store.folder(entry.id), schema.RESULT).read_text()) for entry in store.entries()
  }


def _children_s() -> float:
  """CPU time of all processes below this one that have ended."""
  used = resource.getrusage(resource.RUSAGE_CHILDREN)
  return used.ru_utime + used.ru_stime


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('sweep', __doc__)
  parser.add_argument(
    '--tokens',
    type=whole('--tokens', 512),
    default=TOKENS,
    help='of each cell (default %(default)s)',
  )
  parser.add_argument('--every', type=whole('--every'), default=1, help='only every so many cells, for a quick try')
  args = parser.parse_args(argv)
  row = measure(args.tokens, args.every)
  return command.report(row, lines(row), args.json)


if __name__ == '__main__':
  main()
