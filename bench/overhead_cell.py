"""Trains one cell as `sae_jax.train` does and says where its time went: python -m bench.overhead_cell --began=T FLAGS

The flags are those of `sae_jax.train`. A line of JSON on standard output holds seconds and CPU-seconds by part. What
happens inside a part within another belongs to the inner one, so the parts add up to the process.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

PROCESS, STEPS = 'process and imports', 'steps'


class Parts:
  """Seconds and CPU-seconds of this process by part. The first part began with the process, at wall time `began`."""

  def __init__(self, began: float):
    self.spent: dict[str, list[float]] = {}
    self._open, self._at = [PROCESS], (began, 0.0)

  def enter(self, name: str) -> None:
    self._charge()
    self._open.append(name)

  def leave(self) -> None:
    self._charge()
    self._open.pop()

  def timed(self, function: Callable, name: str, first: str = '') -> Callable:
    """The function, whose calls belong to a part; its first call to the part `first`, where that is another."""
    names = iter([first] if first else [])

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
      self.enter(next(names, name))
      try:
        return function(*args, **keywords)
      finally:
        self.leave()

    return call

  def _charge(self) -> None:
    now = time.time(), time.process_time()
    spent = self.spent.setdefault(self._open[-1], [0.0, 0.0])
    for i in range(2):
      spent[i] += now[i] - self._at[i]
    self._at = now


def watch(parts: Parts) -> None:
  """Has the parts of a run charged to `parts`, for the rest of this process."""
  from sae_jax import member, single_run, training
  from sae_jax.evaluate import Evaluator

  def charge(owner: Any, name: str, part: str) -> None:
    setattr(owner, name, parts.timed(getattr(owner, name), part))

  charge(training, 'claim_folder', 'claims')
  charge(single_run, '_claim', 'claims')
  charge(training, 'open_source', 'data and sample')
  charge(training, 'start_up_sample', 'data and sample')
  charge(Evaluator, '__init__', 'data and sample')
  charge(member.Member, 'start', 'first state, compiled')
  charge(member.Member, 'save', 'checkpoints')
  charge(member.Member, 'close', 'checkpoints')
  charge(member.Member, 'finish', 'autoencoder and result')
  member.Member.evaluate = parts.timed(member.Member.evaluate, 'evaluations', 'first evaluation, compiled')
  made = training.make_group_step
  training.make_group_step = lambda *args: parts.timed(made(*args), STEPS, 'first step, compiled')
  charge(training, '_train_together', STEPS)


def main(argv: list[str]) -> None:
  parts = Parts(float(argv[0].removeprefix('--began=')))
  from sae_jax import train

  watch(parts)
  parts.enter('other')
  try:
    train.main(argv[1:])
  except SystemExit as ended:
    parts.leave()
    print(json.dumps({'parts': parts.spent, 'ended': time.time()}))
    raise ended


if __name__ == '__main__':
  main(sys.argv[1:])
