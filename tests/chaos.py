"""Kills the workers and the driver of a real sweep at random moments, again and again, and counts what was lost.

python -m tests.chaos --kills=200 --seed=0

One kill in three comes at any time, the others shortly after a checkpoint was begun, so that many land in a save. A
driver that ended is started again by the same command, as a user would. Rounds of one sweep follow until all kills
are spent; every cell must then be done once, with the bits of an undisturbed run.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from sae_jax import schema

ROOT = pathlib.Path(__file__).parents[1]
GRID = """
from experiments import tiny
from sweeps import grid
from tests import cells
EXPERIMENT = tiny
def sweep():
  steps = {'train.tokens': 40 * 150, 'eval.per_decade': 2, 'train.checkpoint_every': 3}
  return grid.product([cells.SHARED | steps], grid.param('train.seed', range(4)))
"""
WHOM = ('worker', 'worker', 'driver', 'all')


class Sweep:
  """One ledger and the driver that works on it."""

  def __init__(self, folder: pathlib.Path, workers: int = 2, grid: str = GRID):
    folder.mkdir(parents=True)
    (folder / 'cells.py').write_text(grid)
    self.folder, self.path, self.starts = folder, folder / 'ledger', 0
    self._argv = [
      sys.executable, '-m', 'sweeps.launch', f'--sweep={folder / "cells.py"}', f'--ledger={self.path}',
      '--executor=local', f'--workers={workers}', '--max_failures=1000000',
    ]  # fmt: skip

  def start(self) -> subprocess.Popen:
    self.starts += 1
    with open(self.folder / 'driver.log', 'a') as log:
      return subprocess.Popen(
        self._argv, cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, stdout=log, stderr=log, start_new_session=True
      )  # fmt: skip

  def cells(self) -> list[pathlib.Path]:
    return sorted((self.path / 'cells').glob('*'))

  def finished(self) -> bool:
    cells = self.cells()
    return len(cells) == 4 and all((cell / schema.RESULT).exists() for cell in cells)

  def saves(self) -> set[str]:
    """Checkpoints, also those being written."""
    return {str(path) for path in self.path.glob('cells/*/ckpt/*')}

  def digests(self) -> dict[str, str]:
    found = {}
    for cell in self.cells():
      try:
        found[cell.name] = json.loads((cell / schema.RESULT).read_text())['params_digest']
      except FileNotFoundError:
        continue
    return found

  def evidence(self) -> dict[str, tuple]:
    """By finished cell, what would change if it were trained or written again."""
    found = {}
    for cell in self.cells():
      if (cell / schema.RESULT).exists():
        kept = (cell / schema.RESULT, cell / schema.METRICS)
        found[cell.name] = tuple(
          (path.stat().st_ino, path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest()) for path in kept
        )  # fmt: skip
    return found

  def times_done(self) -> collections.Counter:
    """How often workers said of a cell that they had finished it."""
    lines = [
      line for log in self.path.glob('logs/*.log') for line in log.read_text(errors='replace').splitlines()
    ]
    return collections.Counter(
      line.split()[1] for line in lines if line.startswith('cell ') and line.endswith(': done')
    )


def children(pid: int) -> list[int]:
  """Living child processes, as Linux tells."""
  found = []
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      state, parent = path.read_text().rpartition(')')[2].split()[:2]
    except OSError:
      continue
    if int(parent) == pid and state != 'Z':
      found.append(int(path.parent.name))
  return sorted(found)


def kill(pids: list[int]) -> int:
  """kill -9; returns how many were there to be killed."""
  killed = 0
  for pid in pids:
    try:
      os.kill(pid, signal.SIGKILL)
      killed += 1
    except ProcessLookupError:
      pass
  return killed


def undisturbed(folder: pathlib.Path, limit_s: float | None = None) -> dict[str, str]:
  """Digests of the cells when nobody is killed."""
  sweep = Sweep(folder)
  code = sweep.start().wait(limit_s)
  assert code == 0 and sweep.finished(), f'the undisturbed sweep ended with {code}; see {folder}/driver.log'
  return sweep.digests()


def run(folder: pathlib.Path, truth: dict[str, str], kills: int, seed: int, limit_s: float) -> dict:
  """Spends `kills` on rounds of the sweep. Raises TimeoutError when it is not through after `limit_s`."""
  rng = random.Random(seed)
  until = time.monotonic() + limit_s
  report = collections.Counter(
    kills=0, rounds=0, cells=0, lost=0, done_twice=0, rewritten=0, differing=0, starts=0
  )
  whom = collections.Counter()
  while report['kills'] < kills:
    sweep = Sweep(folder / f'round{report["rounds"]}')
    seen: dict[str, tuple] = {}
    driver = sweep.start()
    try:
      while not sweep.finished():
        if report['kills'] < kills:
          _wait_for_a_moment(sweep, driver, rng, until)
          target = rng.choice(WHOM)
          workers = children(driver.pid)
          chosen = {'worker': rng.sample(workers, min(1, len(workers))), 'driver': [], 'all': workers}[target]
          killed = kill(([driver.pid] if target != 'worker' and driver.poll() is None else []) + chosen)
          whom[target] += killed
          report['kills'] += killed
        else:
          _wait(driver, 0.5)
        seen = sweep.evidence() | seen
        if driver.poll() is not None and not sweep.finished():
          driver = sweep.start()
        if time.monotonic() > until:
          raise TimeoutError(
            f'not through after {limit_s:.0f} s: {dict(report)}; see {sweep.folder}/driver.log'
          )
      _wait(driver, max(1.0, until - time.monotonic()))
      # The last command of a user: everything is there already.
      again = sweep.start()
      again.wait(limit_s)
    finally:
      kill([*children(driver.pid), driver.pid])
      driver.wait()
    found, after = sweep.digests(), sweep.evidence()
    report['rounds'] += 1
    report['cells'] += len(truth)
    report['starts'] += sweep.starts
    report['lost'] += sum(cell not in found for cell in truth) + (again.returncode != 0)
    report['done_twice'] += sum(times > 1 for times in sweep.times_done().values())
    report['rewritten'] += sum(after.get(cell) != seen[cell] for cell in seen)
    report['differing'] += sum(found[cell] != truth.get(cell) for cell in found)
  return dict(report) | {
    'seed': seed,
    'killed': dict(whom),
    'seconds': round(limit_s - until + time.monotonic()),
  }


def flawless(report: dict) -> bool:
  return report['cells'] > 0 and not any(
    report[key] for key in ('lost', 'done_twice', 'rewritten', 'differing')
  )


def _wait_for_a_moment(sweep: Sweep, driver: subprocess.Popen, rng: random.Random, until: float) -> None:
  if rng.random() < 1 / 3:
    return _wait(driver, rng.uniform(0, 5))
  before = sweep.saves()
  while driver.poll() is None and not sweep.saves() - before and not sweep.finished():
    time.sleep(0.01)
    if time.monotonic() > until:
      return None
  return _wait(driver, rng.uniform(0, 0.7))


def _wait(driver: subprocess.Popen, seconds: float) -> None:
  try:
    driver.wait(seconds)
  except subprocess.TimeoutExpired:
    pass


def main() -> int:
  parser = argparse.ArgumentParser(prog='python -m tests.chaos', description=__doc__.splitlines()[0])
  parser.add_argument('--kills', type=int, default=200, help='kill -9 to deal out (default %(default)s)')
  parser.add_argument(
    '--seed', type=int, default=0, help='of the moments and the victims (default %(default)s)'
  )
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix='chaos-') as folder:
    limit_s = 300.0 + 30 * args.kills
    truth = undisturbed(pathlib.Path(folder) / 'undisturbed', limit_s)
    report = run(pathlib.Path(folder), truth, args.kills, args.seed, limit_s)
  print(
    f'{report["kills"]} kills, {report["cells"]} cells, {report["lost"]} lost, {report["done_twice"]} done twice, '
    f'{report["rewritten"]} rewritten, {report["differing"]} with differing bits, {report["seconds"]} s'
  )
  print(json.dumps(report))
  return 0 if flawless(report) else 1


if __name__ == '__main__':
  sys.exit(main())
