"""Disturbs a real sweep at random moments, again and again, and counts what was lost.

python -m tests.chaos --kills=200 --seed=0

A round is one sweep of four cells, begun by two launches at once. Its disturbances, at random:
  kill -9 of a worker, of the driver, or of all of them: one in three at any time, the others shortly after a checkpoint
    was begun, so that many land in a save;
  a pause (SIGSTOP, SIGCONT) of a worker for longer than its lease lasts, so that another takes its cell over;
  the lease file of a cell in training deleted, as a restored backup would.
Every third round has 128 file descriptors a process. A driver that ended is started again by the same command. Every
cell must then be done once, with the bits of an undisturbed run. At the end single bits are flipped in the files of the
finished cells, and who notices is counted.
"""

import argparse
import collections
import hashlib
import json
import os
import pathlib
import random
import resource
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
# Leases last 3 s and not 90, in every process: so long a pause is taken over by somebody else.
STALE_S = 3.0
SHORT_LEASES = f"""
from sweeps import ledger
ledger.Ledger.__init__.__kwdefaults__.update(refresh_s=0.2, stale_s={STALE_S})
"""
FEW_FILES = 128
FAULTS = ('lost', 'done_twice', 'rewritten', 'differing')
NOTICED = ('flips', 'load', 'status', 'report', 'harmless', 'believed')


class Sweep:
  """One ledger and the driver that works on it."""

  def __init__(self, folder: pathlib.Path, workers: int = 2, grid: str = GRID):
    folder.mkdir(parents=True)
    (folder / 'cells.py').write_text(grid)
    self.folder, self.path, self.starts = folder, folder / 'ledger', 0
    self.short_leases, self.descriptors = False, 0
    self._argv = [
      sys.executable,
      '-m',
      'sweeps.launch',
      f'--sweep={folder / "cells.py"}',
      f'--ledger={self.path}',
      '--executor=local',
      f'--workers={workers}',
      '--max_failures=1000000',
    ]

  def start(self) -> subprocess.Popen:
    self.starts += 1
    env = os.environ | {'JAX_PLATFORMS': 'cpu'}
    if self.short_leases:
      (self.folder / 'sitecustomize.py').write_text(SHORT_LEASES)  # which every Python runs first
      env |= {'PYTHONPATH': f'{self.folder}:{ROOT}'}
    limit = (self.descriptors, self.descriptors)
    with open(self.folder / 'driver.log', 'a') as log:
      return subprocess.Popen(
        self._argv,
        cwd=ROOT,
        env=env,
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)) if self.descriptors else None,
      )

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
        )
    return found

  def times_done(self) -> collections.Counter:
    """How often workers said of a cell that they had finished it."""
    lines = [line for log in self.path.glob('logs/*.log') for line in log.read_text(errors='replace').splitlines()]
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
    dict.fromkeys(('kills', 'pauses', 'leases_deleted', 'rounds', 'cells', *FAULTS, 'starts'), 0)
  )
  whom = collections.Counter()
  while report['kills'] < kills:
    sweep = Sweep(folder / f'round{report["rounds"]}')
    sweep.short_leases = True
    sweep.descriptors = FEW_FILES if report['rounds'] % 3 == 2 else 0
    seen: dict[str, tuple] = {}
    driver, rival = sweep.start(), sweep.start()
    try:
      while not sweep.finished():
        if report['kills'] < kills:
          _wait_for_a_moment(sweep, driver, rng, until)
          event = rng.choice(('kill', 'kill', 'kill', 'pause', 'lease'))
          if event == 'pause':
            report['pauses'] += _pause(children(driver.pid), rng)
          elif event == 'lease':
            report['leases_deleted'] += _delete_a_lease(sweep, rng)
          else:
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
          raise TimeoutError(f'not through after {limit_s:.0f} s: {dict(report)}; see {sweep.folder}/driver.log')
      for launch in (driver, rival):
        _wait(launch, max(1.0, until - time.monotonic()))
      # The last command of a user: everything is there already.
      again = sweep.start()
      again.wait(limit_s)
    finally:
      kill([p for launch in (driver, rival) for p in (*children(launch.pid), launch.pid)])
      driver.wait(), rival.wait()
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


def _pause(workers: list[int], rng: random.Random) -> int:
  """Stops one worker for longer than a lease lasts, or for a moment; returns how many were there to be stopped."""
  for pid in rng.sample(workers, min(1, len(workers))):
    try:
      os.kill(pid, signal.SIGSTOP)
      time.sleep(rng.choice((0.5, STALE_S + 1.5)))
      os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
      return 0
    return 1
  return 0


def _delete_a_lease(sweep: Sweep, rng: random.Random) -> int:
  """Deletes the newest claim of a cell that somebody trains; returns how many there were to choose from, at most 1."""
  claims = [
    max((cell / 'claims').glob('[0-9]*.json'), key=lambda path: int(path.stem), default=None)
    for cell in sweep.cells()
    if not (cell / schema.RESULT).exists()
  ]
  held = [path for path in claims if path is not None and b'"released": false' in path.read_bytes()]
  for path in rng.sample(held, min(1, len(held))):
    path.unlink(missing_ok=True)
    return 1
  return 0


def corrupt(ledger_path: pathlib.Path, flips: int, seed: int) -> dict[str, int]:
  """Flips single bits in the files of finished cells, one at a time, and counts who notices.

  Returns:
    'flips', and of these by whom they were noticed: 'load' (the autoencoder), 'status' (records), 'report' (curves).
    'harmless' are those that change nothing that is believed, such as white space; 'believed' should be 0.
  """
  import sae_jax
  from sae_jax import cell_state, errors, metrics

  rng, report = random.Random(seed), collections.Counter(dict.fromkeys(NOTICED, 0))
  cells = sorted((ledger_path / 'cells').glob('*'))
  names = (
    schema.CONFIG,
    schema.RESULT,
    schema.METRICS,
    'sae/sae.json',
    'sae/raw.safetensors',
    'sae/ema.safetensors',
  )

  def read(cell: pathlib.Path, name: str) -> tuple[str, object]:
    """Who reads this file, and what they make of it; None where they refuse."""
    if name.startswith('sae/'):
      weights = 'ema' if 'ema' in name else 'raw'
      try:
        sae = sae_jax.load(str(cell), weights)
      except errors.UserError:
        return 'load', None
      return 'load', (sae.info, [tensor.tobytes() for tensor in sae.sae.params().values()])
    if name == schema.METRICS:
      lines = metrics.read_metrics(str(cell), cell.name)
      return 'report', lines
    found = cell_state.read(str(cell), cell.name)
    return 'status', None if found.state == schema.INVALID else (found.result, found.config)

  for _ in range(flips):
    cell, name = rng.choice(cells), rng.choice(names)
    path = cell / name
    whole = path.read_bytes()
    who, before = read(cell, name)
    data = bytearray(whole)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    _, after = read(cell, name)
    path.write_bytes(whole)
    report['flips'] += 1
    if after == before:
      report['harmless'] += 1
    elif after is None or (name == schema.METRICS and len(after) < len(before)):  # holes are counted by the report
      report[who] += 1
    else:
      report['believed'] += 1
  return dict(report)


def flawless(report: dict) -> bool:
  return report['cells'] > 0 and not any(report[key] for key in FAULTS) and not report.get('believed')


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
  parser.add_argument('--seed', type=int, default=0, help='of the moments and the victims (default %(default)s)')
  parser.add_argument('--flips', type=int, default=300, help='bits to flip afterwards (default %(default)s)')
  args = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix='chaos-') as folder:
    limit_s = 300.0 + 30 * args.kills
    truth = undisturbed(pathlib.Path(folder) / 'undisturbed', limit_s)
    report = run(pathlib.Path(folder), truth, args.kills, args.seed, limit_s)
    report |= corrupt(pathlib.Path(folder) / 'undisturbed' / 'ledger', args.flips, args.seed)
  print(
    f'{report["kills"]} kills, {report["pauses"]} pauses, {report["leases_deleted"]} leases deleted, '
    f'{report["cells"]} cells: {report["lost"]} lost, {report["done_twice"]} done twice, '
    f'{report["rewritten"]} rewritten, {report["differing"]} with differing bits, {report["seconds"]} s'
  )
  print(
    f'{report["flips"]} flipped bits: {report["load"]} noticed by load, {report["status"]} by status, '
    f'{report["report"]} by the report, {report["harmless"]} harmless, {report["believed"]} believed'
  )
  print(json.dumps(report))
  return 0 if flawless(report) else 1


if __name__ == '__main__':
  sys.exit(main())
