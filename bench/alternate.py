"""The parent's half: starts workers, lets one compute at a time in turn, and compares them round by round.

On a shared machine a minute is faster or slower than the next one. Two libraries timed in the same few seconds share
that minute, so the ratio of a round is worth more than the ratio of two medians taken apart.
"""

import contextlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm import tqdm

from bench.worker import cpu_time
from sae_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]
_BLOCK_S = 1.5  # a worker's turn: as many repeats as fit, at least one
_MOST_TIMES = 10
_SETTLE_S = 0.1  # thread pools of the one before stop spinning
_PAUSE_S = 0.2  # the load is read over this
_QUIET = 0.05


class Worker:
  """A child process that computes only when asked. Raises `UserError` with its last words when it dies."""

  def __init__(self, module: str, args: Sequence[str] = (), python: str = sys.executable, env: dict | None = None):
    self._name = ' '.join([module, *args])
    self._errors = tempfile.TemporaryFile('w+')
    try:
      self._process = subprocess.Popen(
        [python, '-m', module, *args],
        cwd=ROOT,
        env=os.environ | (env or {}),
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=self._errors,
      )
    except OSError as error:
      self._errors.close()
      raise UserError(f'cannot start {python} ({error.strerror}); see bench/peers.md for its packages') from error
    self._facts: dict[str, Any] | None = None
    self.peak_bytes = 0

  @property
  def facts(self) -> dict[str, Any]:
    """What the worker says of itself; waits until it is ready."""
    if self._facts is None:
      self._facts = self._read()
    return self._facts

  def seconds(self, do: str, times: int) -> list[float]:
    """Seconds of each of `times` repeats of the piece of work called `do`."""
    _ = self.facts
    try:
      print(json.dumps({'do': do, 'times': times}), file=self._process.stdin, flush=True)
    except BrokenPipeError:
      pass  # the read below says what happened
    answer = self._read()
    self.peak_bytes = answer['peak_bytes']
    return answer['seconds']

  def close(self) -> None:
    with contextlib.suppress(BrokenPipeError):
      self._process.stdin.close()
    try:
      self._process.wait(timeout=30)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._process.stdout.close()
    self._errors.close()

  def _read(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      code = self._process.wait()
      self._errors.seek(0)
      said = [text for text in self._errors.read().splitlines() if text.strip()]
      # The last line may be a library's epilogue to a traceback.
      raised = [text for text in said if re.match(r'[\w.]+(Error|Exception|Interrupt)\b', text)] or said
      raise UserError(
        f'{self._name} ended with code {code}: {raised[-1] if raised else "it said nothing"}; '
        'see bench/peers.md for what it needs'
      )
    return json.loads(line)


@contextlib.contextmanager
def started(workers: dict[str, Worker]) -> Iterator[dict[str, Worker]]:
  """The workers when all of them are ready; ends them all, whatever happens."""
  try:
    for worker in workers.values():
      _ = worker.facts
    yield workers
  finally:
    for worker in workers.values():
      worker.close()


def alternate(
  workers: dict[str, Worker], rounds: int, do: str = 'step', label: str = ''
) -> tuple[dict[str, list[list[float]]], float]:
  """Seconds of every repeat (a list a worker, a list a round) and the load that others put on the machine meanwhile.

  No two workers compute at once. A first, unrecorded turn compiles; a second sets how many repeats make a turn of about
  a second and a half. Each round starts with another worker. The load is the share of all cores that was busy in
  the pauses between turns; on a loaded machine ratios are worthless, since thread pools differ in what they lose.
  """
  times = {}
  for name, worker in workers.items():
    worker.seconds(do, 1)
    times[name] = min(_MOST_TIMES, max(1, round(_BLOCK_S / worker.seconds(do, 1)[0])))
  seconds: dict[str, list[list[float]]] = {name: [] for name in workers}
  busy, total = 0.0, 0.0
  names = list(workers)
  for i in tqdm(range(rounds), desc=label or do, unit='round', disable=not sys.stderr.isatty()):
    first = i % len(names)
    for name in names[first:] + names[:first]:
      time.sleep(_SETTLE_S)
      before = cpu_time()
      time.sleep(_PAUSE_S)
      after = cpu_time()
      busy, total = busy + after[0] - before[0], total + after[1] - before[1]
      seconds[name].append(workers[name].seconds(do, times[name]))
  return seconds, busy / total


def warn(load: float) -> None:
  """Says on standard error that others used the machine, when they did."""
  if load > _QUIET:
    print(
      f'warning: other programs kept {load:.0%} of the cores busy between turns; measure again on a quiet machine '
      'before you report any of this',
      file=sys.stderr,
    )


def machine() -> dict[str, Any]:
  """What a number was measured on and when."""
  import jax  # late, so that --help of what measures does without

  from sae_jax import bench

  jax.config.update('jax_platforms', 'cpu')  # where every worker is put; this process has no use for an accelerator
  return bench.machine()


def median(rounds: list[list[float]]) -> float:
  """Median over all repeats of all rounds."""
  return statistics.median(s for block in rounds for s in block)


def ratio(over: list[list[float]], under: list[list[float]]) -> dict[str, float]:
  """Time of one over time of the other, a round at a time: median, lowest, highest."""
  each = [statistics.median(a) / statistics.median(b) for a, b in zip(over, under, strict=True)]
  return {'ratio': statistics.median(each), 'low': min(each), 'high': max(each), 'rounds': len(each)}
