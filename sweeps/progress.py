"""How far a sweep is: one bar over its cells when a person watches, a plain line a change otherwise."""

import sys
import time

from tqdm import tqdm

from sae_jax import flops, schema
from sae_jax.progress import Display
from sweeps import grid, ledger, status


class Board(Display):
  """Shows the states of cells, with the time left at the speed of this launch so far."""

  def __init__(self, store: ledger.Ledger, states: list[ledger.EntryState], visible: bool = True):
    tqdm.monitor_interval = 0  # no thread of its own: workers are forked from this process
    plain = sys.stdout if visible else None
    super().__init__(plain, total=len(states), bar_format='{n_fmt}/{total_fmt} cells |{bar}|{postfix} [{elapsed}]')
    self._store, self._begin = store, time.monotonic()
    self._cost: dict[str, float] = {}
    self._at_start: float | None = None
    self._line = ''
    self._told: dict[str, int] = {s.entry.id: s.attempts for s in states}

  def show(self, states: list[ledger.EntryState], jobs: str = '') -> None:
    """Brings the display up to date; `jobs` is said after the cells."""
    for s in states:
      if s.attempts > self._told.get(s.entry.id, 0):
        self.say(f'cell {s.entry.id} {grid.label(s.entry.overrides)}: {s.reason}')
      self._told[s.entry.id] = s.attempts
    counts = status.count(states)
    line = status.summary(counts) + jobs
    if self._bar is not None:
      self._bar.total, self._bar.n = len(states), counts['done']
      self._bar.set_postfix_str(f'{line}{self._left(states)}')
    elif line != self._line:
      self.say(f'{line}{self._left(states)}')
    self._line = line

  def _left(self, states: list[ledger.EntryState]) -> str:
    """Part of the work done, and time left at the speed of this launch so far; cells weigh by their FLOPs."""
    spent = left = 0.0
    for s in states:
      if s.entry.id not in self._cost:
        self._cost[s.entry.id] = flops.cell_flops(s.entry.cell)['dense']
      cost = self._cost[s.entry.id]
      last = status.last_line(self._store, s.entry.id) if s.state == 'running' else None
      ready = min(1.0, last['step'] / s.entry.cell.train.steps) if last else float(s.state == 'done')
      spent += ready * cost
      left += (1 - ready) * cost if s.state in schema.UNFINISHED else 0.0
    self._at_start = spent if self._at_start is None else self._at_start
    gained = spent - self._at_start
    part = f', {100 * spent / max(1.0, spent + left):.0f} % of the work'
    if not left or gained <= 0:
      return part
    return f'{part}, {status.duration((time.monotonic() - self._begin) * left / gained)} left'
