"""The child's half of a measurement: a process that sits still until it is asked to do its piece of work n times.

One process a competitor, so that neither shares a thread pool, an allocator or a dependency with another. Standard
library and numpy only: it is imported inside environments that do not hold sae_jax.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

_POOL = 4  # batches in turn: a single one would be learnt by heart

Work = dict[str, Callable[[], Any]]
Facts = dict[str, Any]


def serve(prepare: Callable[[], Callable[[], tuple[Work, Facts]]]) -> None:
  """Answers requests on standard input until it ends.

  `prepare()` imports and makes inputs; what it returns is called next and gives pieces of work by name and JSON-able
  facts, which are the first line out. A request is {"do": name, "times": n}. Its answer holds the seconds of each of n
  calls and the most memory held so far beyond what was held when `prepare` was done.
  """
  # Libraries print. From here on what they print goes to standard error.
  reply = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  begin = prepare()
  before = memory()['VmRSS']
  work, facts = begin()

  def send(record):
    print(json.dumps(record), file=reply, flush=True)

  send(facts)
  for line in sys.stdin:
    request = json.loads(line)
    seconds = []
    for _ in range(request['times']):
      began = time.perf_counter()
      work[request['do']]()
      seconds.append(time.perf_counter() - began)
    send({'seconds': seconds, 'peak_bytes': memory()['VmHWM'] - before})


def memory(pid: int | str = 'self') -> dict[str, int]:
  """Bytes of resident memory of a process, by default this one: now (VmRSS) and at most (VmHWM). Linux only."""
  with open(f'/proc/{pid}/status') as f:
    lines = dict(line.split(':', 1) for line in f)
  return {key: int(lines[key].split()[0]) * 1024 for key in ('VmRSS', 'VmHWM')}


def cpu_time() -> tuple[float, float]:
  """Busy and total time of all cores since boot; time that a hypervisor gave to others counts as busy."""
  with open('/proc/stat') as f:
    ticks = [int(v) for v in f.readline().split()[1:9]]
  return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def share_of_others(before: tuple[float, float], own_s: float) -> float:
  """The share of all cores that other processes kept busy since `before`, a `cpu_time`. `own_s`: the CPU time of these."""
  busy_s, total_s = ((b - a) / os.sysconf('SC_CLK_TCK') for a, b in zip(before, cpu_time(), strict=True))
  return max(0.0, busy_s - own_s) / max(total_s, 1e-9)


def inputs(d: int, n: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
  """The same for every library: batches of unit-norm Gaussian tokens [4, B, D] and unit-norm decoder rows [F, D]."""
  rng = np.random.default_rng(0)

  def unit(*shape):
    x = rng.standard_normal(shape, dtype=np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)

  return unit(_POOL, batch, d), unit(n, d)
