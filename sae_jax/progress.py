"""How far long work is: a bar when a person watches, plain lines otherwise."""

import math
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

LINE_EVERY_S = 10


class Display:
  """A bar on a terminal, with lines that do not break it; where there is no terminal, the lines alone.

  Args:
    plain: where the lines go then. None shows nothing at all, on a terminal neither.
    bar: as for `tqdm`.
  """

  def __init__(self, plain: TextIO | None, **bar: Any):
    self._plain = plain
    self._bar = tqdm(**bar) if plain is not None and sys.stderr.isatty() else None

  def say(self, line: str) -> None:
    if self._bar is not None:
      self._bar.write(line, file=sys.stderr)
    elif self._plain is not None:
      print(line, file=self._plain, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


class Progress(Display):
  """Tokens: how many are done, how fast, and how long the rest takes; a plain line every ten seconds.

  Attributes:
    done: tokens, as they were told last.
  """

  def __init__(self, label: str, total: int, done: int, visible: bool = True):
    super().__init__(
      sys.stderr if visible else None, total=total, initial=done, desc=label, unit='tok', unit_scale=True
    )
    self._label, self._total = label, total
    self.done = self._first = done
    self._begin = self._last_line = time.monotonic()

  def update(self, done: int, words: str = '') -> None:
    """Brings the display to `done` tokens; `words` are shown in place of that number, and beside the bar."""
    done = min(done, self._total)
    if self._bar is not None:
      self._bar.set_postfix_str(words, refresh=False)
      self._bar.update(done - self.done)
    elif (now := time.monotonic()) - self._last_line >= LINE_EVERY_S or done == self._total:
      self._last_line = now
      rate = (done - self._first) / max(1e-9, now - self._begin)
      left = (self._total - done) / rate if rate > 0 else math.inf
      words = words or f'{done:,} of {self._total:,} tokens'
      self.say(f'{self._label}: {words}  {rate:,.0f} tokens/s  {left:.0f} s left')
    self.done = done
