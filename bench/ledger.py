"""What a large ledger costs: to register, to look at, to drive, to report on.

python -m bench.ledger [--cells=5000] [--json=OUT]
Fake finished cells with complete records; nothing is trained. Every number is the CPU time of a whole command, its
imports included, so that it can be compared with a stopwatch beside one's own sweep.
"""

import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from bench import command
from bench.alternate import ROOT, machine
from bench.worker import cpu_time, share_of_others
from sae_jax import config, flops, metrics, product, schema
from sae_jax.cell import log_spaced
from sae_jax.errors import UserError, one_line_errors
from sae_jax.flags import whole
from sweeps import grid

CELLS = 5000
_REPORTED = 3000  # cells of the ledger that analysis.report reads
_RESAMPLES = 50
_WATCHED_S = 20.0  # of a driver while nothing happens
_KS = (2, 4, 8, 16, 32)
_SIZES = tuple(64 * 2**i for i in range(10))
_GRID = """
from experiments import tiny
from sweeps import grid

EXPERIMENT = tiny


def sweep():
  sizes = grid.product(grid.param('sae.n_latents', {sizes}), grid.param('sae.k', {ks}))
  return grid.product(sizes, grid.param('train.seed', range({seeds})))[:{count}]
"""
_GOALS = {
  'register': '5 s',
  'dry run': '3 s',
  'status': '2 s',
  'driver': '5 % of a core',
  'report': '120 s',
}


def measure(count: int, reported: int, watched_s: float) -> dict[str, Any]:
  """All five, each on a ledger of `count` cells and the report on one of `reported`."""
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
    folder = pathlib.Path(name)
    rows: dict[str, dict[str, float]] = {}
    flags = _grid(folder, 'large', count)
    rows['register'] = _command('sweeps.launch', *flags, '--workers=0')
    rows['driver'] = _driver(folder, flags, watched_s)
    _finish(grid.build(str(folder / 'large.py')), folder / 'large')
    rows['dry run'] = _command('sweeps.launch', *flags, '--dry_run')
    rows['status'] = _command('sweeps.status', f'--ledger={folder / "large"}')
    flags = _grid(folder, 'reported', reported)
    _command('sweeps.launch', *flags, '--workers=0')
    _finish(grid.build(str(folder / 'reported.py')), folder / 'reported')
    out = f'--out={folder / "report"}'
    rows['report'] = _command('analysis.report', f'--ledger={folder / "reported"}', out, f'--bootstrap={_RESAMPLES}')
  return {
    'cells': count,
    'reported_cells': reported,
    'resamples': _RESAMPLES,
    'rows': rows,
    'date': time.strftime('%Y-%m-%d'),
    'versions': metrics.versions(),
    'git_commit': metrics.git_commit(),
    'machine': machine(),
  }


def lines(record: dict[str, Any]) -> str:
  """Markdown: a row a command."""
  what = {
    'register': f'`sweeps.launch --workers=0`, {record["cells"]:,} new cells',
    'dry run': f'`sweeps.launch --dry_run`, {record["cells"]:,} finished cells',
    'status': f'`sweeps.status`, {record["cells"]:,} finished cells',
    'driver': f'`sweeps.launch` while nothing happens, {record["cells"]:,} waiting cells',
    'report': f'`analysis.report`, {record["reported_cells"]:,} cells, {record["resamples"]} resamples',
  }
  out = ['| | CPU | goal | seconds |', '|---|---|---|---|']
  for name, text in what.items():
    row = record['rows'][name]
    cost = f'{100 * row["share"]:.1f} % of a core' if 'share' in row else f'{row["cpu_s"]:.2f} s'
    out.append(f'| {text} | {cost} | {_GOALS[name]} | {row["seconds"]:.1f} |')
  return '\n'.join([*out, '', f'{record["date"]}, {record["machine"]["cpu"]}, {record["machine"]["cores"]} cores'])


def _grid(folder: pathlib.Path, name: str, count: int) -> tuple[str, ...]:
  """Writes a grid of `count` cells; returns the flags of a launch of it."""
  seeds = -(-count // (len(_SIZES) * len(_KS)))
  text = _GRID.format(sizes=_SIZES, ks=_KS, seeds=seeds, count=count)
  (folder / f'{name}.py').write_text(text)
  return f'--sweep={folder / name}.py', f'--ledger={folder / name}', '--executor=local'


def _finish(sweep: grid.Sweep, where: pathlib.Path) -> None:
  """Gives every cell the result and the curve of a law, and a small autoencoder, without waiting for the disk."""
  rng = np.random.default_rng(0)
  for _, c in sweep.cells:
    folder = where / schema.CELLS / c.id
    final = float((0.05 + 3 * c.sae.n_latents**-0.5) * c.sae.k**-0.2 * np.exp(0.003 * rng.normal()))
    steps = sorted(log_spaced(c.train.steps, c.eval.per_decade))
    curve = [_line(c, step, final * (1 + 2 * step**-0.5 - 2 * c.train.steps**-0.5)) for step in steps]
    (folder / schema.METRICS).write_bytes(b''.join(schema.dump_line(line, c.id) for line in curve))
    result = _result(c, curve[-1])
    product_folder = folder / schema.ARTIFACT
    product_folder.mkdir()
    tensors = {name: b'none' for name in ('raw', 'ema')}
    for name, data in tensors.items():
      (product_folder / f'{name}.safetensors').write_bytes(data)
    info = schema.dump(_info(result, tensors))
    (product_folder / schema.ARTIFACT_INFO).write_bytes(info)
    facts = product.facts(info, {name: len(data) for name, data in tensors.items()})
    (folder / schema.RESULT).write_bytes(schema.dump(result | facts))


def _info(result: dict[str, Any], tensors: dict[str, bytes]) -> dict[str, Any]:
  sizes = {name: result[name] for name in ('id', 'n_latents', 'k', 'd_model', 'activation', 'weights')}
  digests = {name: hashlib.sha256(data).hexdigest() for name, data in tensors.items()}
  return sizes | {'subject': '', 'site': '', 'normalize': 'none', 'identity': '', 'sha256': digests}


def _line(c: config.Cell, step: int, nmse: float) -> dict[str, Any]:
  spent = flops.spent(c, step, 0)
  return {
    'step': step,
    'tokens': step * c.train.batch_tokens,
    'flops_useful': spent['useful'],
    'flops_dense': spent['dense'],
    'flops_subject': 0.0,
    'wall_s': 0.01 * step,
    'eval/nmse': nmse,
    'eval/nmse_raw': 1.01 * nmse,
    'eval/nmse_ema': nmse,
    'eval/weights': 'ema',
    'eval/mse': nmse / c.sae.d_model,
    'eval/l0': float(c.sae.k),
    'sae/dead_fraction': 0.0,
    'train/loss': nmse,
    'train/nmse': nmse,
    'train/aux_loss': 0.0,
    'train/l0': float(c.sae.k),
  }


def _result(c: config.Cell, last: dict[str, Any]) -> dict[str, Any]:
  measured = {name: last[key] for key, name in schema.line_names(schema.MEASURED).items() if key in last}
  return measured | {
    'id': c.id,
    'n_latents': c.sae.n_latents,
    'k': c.sae.k,
    'd_model': c.sae.d_model,
    'activation': c.sae.activation,
    'seed': c.train.seed,
    'learning_rate': c.optim.learning_rate,
    'batch_tokens': c.train.batch_tokens,
    'steps': c.train.steps,
    'tokens_asked': c.train.tokens,
    'aux_steps': 0,
    'params_digest': 'none',
    'bit_exact': True,
    'device_kind': 'none',
    'n_devices': 1,
    'mesh': [1, 1],
    'versions': {},
    'git_commit': '',
  }


def _command(module: str, *flags: str) -> dict[str, float]:
  """CPU time of a command with its children, and its seconds. Raises `UserError` when it fails."""
  began, before = time.monotonic(), cpu_time()
  process = subprocess.Popen([sys.executable, '-m', module, *flags], cwd=ROOT, stdout=subprocess.DEVNULL)
  _, status, used = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise UserError(f'python -m {module} ended with code {process.returncode}; its output is above')
  seconds, cpu_s = time.monotonic() - began, used.ru_utime + used.ru_stime
  return {'cpu_s': cpu_s, 'seconds': seconds, 'load_of_others': share_of_others(before, cpu_s)}


def _driver(folder: pathlib.Path, flags: tuple[str, ...], watched_s: float) -> dict[str, float]:
  """The share of a core that a launch takes beside a worker that does nothing.

  The worker is stopped as soon as it has started, so the cells wait for ever.
  """
  argv = [sys.executable, '-m', 'sweeps.launch', *flags]
  log = folder / 'large' / 'logs' / 'worker-0.log'
  process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
  try:
    while not (log.exists() and (workers := _children(process.pid))):
      if process.poll() is not None:
        raise UserError(f'the launch ended with code {process.returncode}; its output is above')
      time.sleep(0.1)
    for worker in workers:
      os.kill(worker, signal.SIGSTOP)
    time.sleep(10.0)  # its first look reads everything
    began, used, before = time.monotonic(), _cpu_s(process.pid), cpu_time()
    time.sleep(watched_s)
    seconds, cpu_s = time.monotonic() - began, _cpu_s(process.pid) - used
  finally:
    for worker in _children(process.pid):
      os.kill(worker, signal.SIGKILL)
    process.kill()
    process.wait()
  return {
    'share': cpu_s / seconds,
    'cpu_s': cpu_s,
    'seconds': seconds,
    'load_of_others': share_of_others(before, cpu_s),
  }


def _children(pid: int) -> list[int]:
  return [int(name) for name in pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


def _cpu_s(pid: int) -> float:
  fields = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
  return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('ledger', __doc__)
  parser.add_argument('--cells', type=whole('--cells', 100), default=CELLS, help='of the ledger (default %(default)s)')
  args = parser.parse_args(argv)
  record = measure(args.cells, min(_REPORTED, args.cells), _WATCHED_S)
  return command.report(record, lines(record), args.json)


if __name__ == '__main__':
  main()
