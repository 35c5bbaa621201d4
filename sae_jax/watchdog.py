"""Ends a process that no longer makes progress. The coordination service of jax notices a dead rank, never a stuck one.

A restore that hung in one of 704 ranks has cost others hours in a collective; here the gang restarts instead.
"""

import faulthandler
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable

from sae_jax import flags
from sae_jax.errors import end_at_once

# 128 + the signal of a timer: engines restart it, as they would a dead node, but count it against the budget of
# failures. 42 would be free, and a hang that comes back every time would then restart 100 times.
STALLED_EXIT = 128 + signal.SIGALRM
_FLOOR = 'SAE_JAX_STALL_S'
_STEPS = 20  # median step times without a step
_START = 3  # times the limit, before the first step: restore and compilation


class Watchdog:
  """A thread that ends the process with `STALLED_EXIT` when `beat` is not called for long; a context manager.

  Long is the larger of SAE_JAX_STALL_S (600 s) and 20 median intervals. Time in which this process did not run
  (SIGSTOP, a sleeping laptop) does not count. `give_up` is called in that thread, with the reason, instead of `end`.
  """

  def __init__(self, give_up: Callable[[str], None] | None = None):
    self._floor_s = flags.positive(_FLOOR, '600')(os.environ.get(_FLOOR, '600'))
    self._give_up = give_up or end
    self._intervals: list[float] = []
    self._beats = 0
    self._last = time.monotonic()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True, name='watchdog')

  def beat(self) -> None:
    """Progress: call it every step."""
    now = time.monotonic()
    self._intervals = [*self._intervals[-50:], now - self._last] if self._beats else []
    self._beats, self._last = self._beats + 1, now

  def beating(self, asked: Callable[[], bool]) -> Callable[[], bool]:
    """What is polled every step, made a sign of life."""

    def poll() -> bool:
      self.beat()
      return asked()

    return poll

  def __enter__(self) -> 'Watchdog':
    self._last = time.monotonic()
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self._stop.set()
    self._thread.join()

  def limit_s(self) -> float:
    """Seconds without a beat that are too many now."""
    if not self._beats:
      return _START * self._floor_s
    intervals = self._intervals
    return max(self._floor_s, _STEPS * statistics.median(intervals) if intervals else 0.0)

  def _watch(self) -> None:
    tick_s = min(5.0, self._floor_s / 10)
    seen, idle = 0, 0
    while not self._stop.wait(tick_s):
      # Ticks are counted rather than time, so that a process that was stopped as a whole is not blamed.
      seen, idle = (self._beats, 0) if self._beats != seen else (seen, idle + 1)
      if idle * tick_s >= self.limit_s():
        after = f'after {self._beats} steps' if self._beats else 'since it started (restore, compilation)'
        self._give_up(
          f'stalled: no step for {self.limit_s():.0f} s {after}; ending with exit code {STALLED_EXIT} for a restart. '
          f'If a step or an evaluation may take that long, set {_FLOOR}'
        )
        return


def end(why: str, exit_with: Callable[[int], None] | None = None) -> None:
  """Says why, prints the stacks of all threads and ends the process, by `exit_with` if given."""
  print(why, file=sys.stderr, flush=True)
  faulthandler.dump_traceback(all_threads=True)
  (exit_with or end_at_once)(STALLED_EXIT)
