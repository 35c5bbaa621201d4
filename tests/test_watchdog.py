import itertools
import subprocess
import sys
import threading
import time

import pytest

from sae_jax import watchdog
from sae_jax.errors import UserError

SLEEPER = """
import time
from sae_jax import watchdog
with watchdog.Watchdog() as alive:
  alive.beat()
  time.sleep(60)
"""


@pytest.fixture
def ended(monkeypatch):
  """Whether the watchdog would have ended the process."""
  monkeypatch.setenv('SAE_JAX_STALL_S', '0.05')
  return threading.Event()


def test_stall_ends_the_process_with_a_restartable_code_and_says_where():
  found = subprocess.run(
    [sys.executable, '-c', SLEEPER], env={'SAE_JAX_STALL_S': '0.1'}, capture_output=True, text=True
  )
  assert found.returncode == 142 and 128 < watchdog.STALLED_EXIT
  assert 'no step for 0 s after 1 steps' in found.stderr and 'line 6 in <module>' in found.stderr


def test_progress_and_a_finished_run_are_left_alone(ended):
  with watchdog.Watchdog(lambda _: ended.set()) as alive:
    for _ in range(50):
      alive.beat()
      time.sleep(0.005)
  time.sleep(0.2)
  assert not ended.is_set()


def test_start_gets_longer_and_slow_steps_their_multiple(ended, monkeypatch):
  monkeypatch.setenv('SAE_JAX_STALL_S', '600')
  alive = watchdog.Watchdog(lambda _: ended.set())
  assert alive.limit_s() == 1800
  now = itertools.count(0, 47)
  monkeypatch.setattr(watchdog.time, 'monotonic', lambda: next(now))
  alive.beat()
  assert alive.limit_s() == 600
  for _ in range(7):
    alive.beat()
  assert alive.limit_s() == 20 * 47


@pytest.mark.parametrize('stated', ['', 'ten', '0', '-1', 'inf', 'nan'])
def test_limit_must_be_a_number_of_seconds(monkeypatch, stated):
  monkeypatch.setenv('SAE_JAX_STALL_S', stated)
  with pytest.raises(UserError, match='not a positive number'):
    watchdog.Watchdog()
