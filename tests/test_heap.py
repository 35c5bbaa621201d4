"""Memory kept from one step to the next: what a process asks of the system."""

import subprocess
import sys

import pytest

from sae_jax import heap

# Touches 64 MB of some temporary memory a few times in a thread of its own, and prints page faults a run: before, inside
# and after `kept`.
_CHILD = """
import resource, sys, threading
import numpy as np
from sae_jax import heap

heap.one_arena()

def faults(runs=4):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(runs):
    np.empty(int(sys.argv[1]), np.uint8)[: 2**26] = 1
  return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // runs

def main():
  plain = faults()
  with heap.kept():
    faults(1)  # the first has to ask
    inside = faults()
  print(plain, inside, faults())

thread = threading.Thread(target=main)
thread.start()
thread.join()
"""


@pytest.mark.skipif(not heap._glibc(), reason='another C library')
@pytest.mark.parametrize('size', [2**26, 3 * 2**30])
def test_memory_freed_inside_is_used_again_and_not_asked_for_anew(size):
  done = subprocess.run([sys.executable, '-c', _CHILD, str(size)], capture_output=True, text=True, check=True)
  plain, inside, after = map(int, done.stdout.split())
  assert plain > 20 and after > 20  # large pages; more of small ones
  assert inside < plain / 10


def test_nothing_happens_with_another_c_library(monkeypatch):
  monkeypatch.setattr(heap.ctypes, 'CDLL', lambda _: object())
  heap.one_arena()
  with heap.kept():
    pass
