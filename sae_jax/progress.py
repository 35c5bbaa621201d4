"""How many tokens are done: a bar when a person watches, a plain line every ten seconds otherwise."""

import math
import sys
import time

from tqdm import tqdm

LINE_EVERY_S = 10


class Progress:
  """Says how far it is, how fast, and how long the rest takes; nothing at all unless `visible`.

  Attributes:
    done: tokens, as they were told last.
  """

  def __init__(self, label: str, total: int, done: int, visible: bool = True):
    self._visible = visible
    self._label, self._total = label, total
    self.done = self._first = done
    self._begin = self._last_line = time.monotonic()
    # tqdm counts tokens, so that its rate is one people compare.
    self._bar = (
      tqdm(total=total, initial=done, desc=label, unit='tok', unit_scale=True)
      if visible and sys.stderr.isatty()
      else None
    )

  def update(self, done: int, words: str = '') -> None:
    """Brings the display to `done` tokens; `words` are shown in place of that number, and beside the bar."""
    done = min(done, self._total)
    if self._bar is not None:
      self._bar.set_postfix_str(words, refresh=False)
      self._bar.update(done - self.done)
    elif self._visible and ((now := time.monotonic()) - self._last_line >= LINE_EVERY_S or done == self._total):
      self._last_line = now
      rate = (done - self._first) / max(1e-9, now - self._begin)
      left = (self._total - done) / rate if rate > 0 else math.inf
      words = words or f'{done:,} of {self._total:,} tokens'
      print(f'{self._label}: {words}  {rate:,.0f} tokens/s  {left:.0f} s left', file=sys.stderr, flush=True)
    self.done = done

  def note(self, text: str) -> None:
    """One line that does not break the bar."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    elif self._visible:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
