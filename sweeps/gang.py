"""One worker made of several processes: rank 0 holds the lease and chooses the cell, the others wait for its word.

The word goes through the coordination service, not through devices: cells differ in their meshes, and a rank that
hangs in a collective still has a thread that listens. A gang in which one rank failed is ended and started again.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

import jax

from sae_jax import config, distributed, watchdog
from sae_jax.errors import UserError
from sweeps import ledger

GRACE_S = 5.0  # for the other ranks to fail of the same cause, or to hear that the gang ends
BROKEN = (
  128 + signal.SIGABRT
)  # also what jax ends a process with when a rank is gone: restart, within a budget
_POLL_S = 0.5
_TROUBLE, _VERDICT = 'trouble', 'verdict'


class RankFailed(Exception):
  """Stands in failure.json for an exception in a rank that may not write there."""


def outlive(error: Exception, permanent: tuple[type[Exception], ...]) -> None:
  """Returns when an error in one rank cannot come from the death of another, which is no fault of the cell.

  A collective whose peer died raises what it likes; the coordination service then ends this process within its
  heartbeat (exit code 134), before a failure is written down. What is known to be the cell's own needs no wait.
  """
  if not isinstance(error, (UserError, *permanent)):
    time.sleep(1.5 * distributed.heartbeat_s() + GRACE_S)


def disband(code: int) -> NoReturn:
  """Ends every rank at once, also those that hang; rank 0 last, because the others abort when it is gone."""
  distributed.tell(_VERDICT, str(code))
  sys.stdout.flush()
  until = time.monotonic() + GRACE_S
  for rank in range(1, jax.process_count()):
    distributed.hear(f'bye/{rank}', timeout_s=until - time.monotonic())
  os._exit(code)


class Leader:
  """Rank 0's side. `vote` is polled in training by every rank and between cells by this one alone."""

  outlive, disband = staticmethod(outlive), staticmethod(disband)  # for work.py, which loads without jax

  def __init__(self, vote: distributed.Vote):
    self._vote, self._words = vote, 0
    self._breaking, self._voting = threading.Lock(), False

  @contextlib.contextmanager
  def training(self, cell: ledger.Cell, label: str, charge: Callable[[Exception], int]) -> Iterator[None]:
    """Sends the gang to a cell and watches over it until the block ends.

    When another rank fails while this one is caught in a collective, `charge` is called with what it said, in
    another thread, and the gang ends with the exit code that it returns.
    """
    self._tell({'id': cell.id, 'config': cell.config.to_json().decode(), 'label': label})
    back = threading.Event()
    thread = threading.Thread(target=self._listen, args=(back, charge), daemon=True, name='gang')
    thread.start()
    try:
      yield
    finally:
      with self._breaking:  # never released once the thread is ending the gang
        back.set()
      thread.join()

  def call_vote(self) -> None:
    """Has all ranks stop at one step, as a SIGTERM to this one would."""
    if not self._voting:
      self._voting = True
      os.kill(os.getpid(), signal.SIGTERM)

  def dismiss(self, code: int) -> None:
    """Between cells: the other ranks return with this exit code."""
    self._tell({'end': code})

  def _tell(self, word: dict) -> None:
    self._words += 1
    distributed.tell(f'word/{self._words}', json.dumps(word | {'polls': self._vote.polls}))

  def _listen(self, back: threading.Event, charge: Callable[[Exception], int]) -> None:
    while not back.wait(_POLL_S):
      trouble = distributed.hear(_TROUBLE)
      if trouble is None:
        continue
      if back.wait(GRACE_S):
        return  # this rank failed as well, and says so itself
      with self._breaking:
        if not back.is_set():
          disband(charge(RankFailed(trouble)))


def follow(
  train: Callable[..., str],
  store: ledger.Ledger,
  vote: distributed.Vote,
  permanent: tuple[type[Exception], ...] = (),
) -> int:
  """The other ranks' side: trains what rank 0 says, until it dismisses them with an exit code."""
  dismissed = threading.Event()
  thread = threading.Thread(target=_await_verdict, args=(dismissed,), daemon=True, name='gang')
  thread.start()
  words = 0
  while True:
    words += 1
    try:
      while (said := distributed.hear(f'word/{words}', timeout_s=60)) is None:
        pass
    except jax.errors.JaxRuntimeError as error:
      print(f'rank 0 is gone: {error}', file=sys.stderr, flush=True)
      os._exit(BROKEN)
    word = json.loads(said)
    vote.polls = word['polls']
    if 'end' in word:
      dismissed.set()
      thread.join()
      return word['end']
    try:
      with watchdog.Watchdog() as alive:
        cell = config.from_json(word['config'].encode())
        train(cell, store.folder(word['id']), should_stop=alive.beating(vote), label=word['label'])
    except Exception as error:
      traceback.print_exception(error)
      outlive(error, permanent)
      _report(error)


def _await_verdict(dismissed: threading.Event) -> None:
  code = None
  while code is None:
    if dismissed.wait(_POLL_S):
      return
    try:
      code = distributed.hear(_VERDICT)
    except jax.errors.JaxRuntimeError:
      return  # rank 0 is gone, and the coordination service ends this process
  sys.stdout.flush()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    distributed.tell(f'bye/{jax.process_index()}', code)
  os._exit(int(code))


def _report(error: Exception) -> NoReturn:
  """Leaves it to rank 0 to write down the failure and to end the gang."""
  # The first rank to fail is the one that counts, and rank 0 may be gone.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    distributed.tell(_TROUBLE, f'{type(error).__name__} on {socket.gethostname()}: {error}')
  sys.stderr.flush()
  time.sleep(4 * GRACE_S)
  os._exit(1)
