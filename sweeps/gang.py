"""One worker made of several processes. Rank 0 holds the lease and chooses the cell; the others wait for its word.

The word goes through the coordination service and not through devices. Cells differ in their meshes, so the devices of one
cell may not reach every rank. And a rank that hangs in a collective still has a thread that listens.

A gang in which one rank failed is ended and started again.
"""

import contextlib
import errno
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax

from sae_jax import config, distributed, faults, watchdog
from sae_jax.errors import UserError, end_at_once
from sweeps import ledger

GRACE_S = 5.0  # for the other ranks to fail of the same cause, or to hear that the gang ends
_POLL_S = 0.5
_TROUBLE, _VERDICT = 'trouble', 'verdict'


class RankFailed(Exception):
  """Stands in failure.json for an exception in a rank that may not write there; its note is that rank's traceback."""


def outlive(error: Exception) -> None:
  """Waits until an error of this rank is known to be its own, and returns then.

  A rank whose peer has died gets an error too, of any kind, from the collective that both were in. The cell is not at
  fault then, and no failure may be written down.

  The wait tells the two apart. The coordination service notices a dead rank within one heartbeat
  (`distributed.heartbeat_s`) and ends all others with exit code 134. Who is still alive after one and a half heartbeats
  has lost no peer. Until then this thread sleeps; leases are refreshed and other ranks are heard in their own threads.

  An error that only this rank can have needs no wait: bad input, a full disk, an error of the machine.
  """
  if not (isinstance(error, UserError) or faults.is_disk_full(error) or faults.is_host_error(error)):
    time.sleep(1.5 * distributed.heartbeat_s() + GRACE_S)


def disband(code: int) -> NoReturn:
  """Ends every rank at once, also those that hang.

  Rank 0 ends last: the coordination service is in it, and the others abort when that is gone.
  """
  distributed.tell(_VERDICT, str(code))
  until = time.monotonic() + GRACE_S
  for rank in range(1, jax.process_count()):
    distributed.hear(f'bye/{rank}', timeout_s=until - time.monotonic())
  time.sleep(1.0)  # who said bye still has to end, which takes a moment on a busy machine
  end_at_once(code)


class Leader:
  """Rank 0's side.

  Args:
    vote: whether the gang was asked to stop. In training every rank polls it, between cells rank 0 alone.
  """

  disband = staticmethod(disband)  # for work.py, which loads without jax

  def __init__(self, vote: distributed.Vote):
    self._vote, self._words = vote, 0
    self._breaking = threading.Lock()

  @contextlib.contextmanager
  def training(self, entries: Sequence[ledger.Entry], label: str, charge: Callable[[Exception], int]) -> Iterator[None]:
    """Sends the gang to a group of cells, and watches over it until the block ends.

    Another rank may fail while this one is caught in a collective. Then a thread calls `charge` with what that rank said,
    and ends the gang with the exit code that `charge` returns.
    """
    told = [{'id': entry.id, 'config': entry.cell.to_json().decode()} for entry in entries]
    self._tell({'cells': told, 'label': label})
    back = threading.Event()
    thread = threading.Thread(target=self._listen, args=(back, charge), daemon=True, name='gang')
    thread.start()
    try:
      yield
    finally:
      with self._breaking:  # waits for ever when the thread is ending the gang
        back.set()
      thread.join()

  def outlive(self, error: Exception) -> None:
    """Waits as the function does. Then names another rank's failure as the cause, if there was one."""
    outlive(error)
    if error.__cause__ is None and (trouble := distributed.hear(_TROUBLE)):
      error.__cause__ = _as_told(trouble)

  def call_vote(self) -> None:
    """Has all ranks stop at one step."""
    self._vote.ask()

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
          disband(charge(_as_told(trouble)))


def follow(train_group: Callable[..., list], store: ledger.Ledger, vote: distributed.Vote) -> int:
  """The side of the other ranks: trains what rank 0 says. Returns the exit code with which it dismisses them."""
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
      end_at_once(distributed.BROKEN)
    word = json.loads(said)
    vote.polls = word['polls']
    if 'end' in word:
      dismissed.set()
      thread.join()
      return word['end']
    try:
      with watchdog.Watchdog(_stalled) as alive:
        cells = [(config.from_json(c['config'].encode()), store.folder(c['id'])) for c in word['cells']]
        train_group(cells, should_stop=alive.beating(vote), label=word['label'])
    except Exception as error:
      traceback.print_exception(error)
      outlive(error)
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
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    distributed.tell(f'bye/{jax.process_index()}', code)
  end_at_once(int(code))


def _stalled(why: str) -> None:
  # All ranks stall together. Rank 0 sees it as soon as this rank does, writes it down and ends the gang.
  time.sleep(2 * GRACE_S)
  watchdog.end(why)


def _report(error: Exception) -> NoReturn:
  """Tells rank 0 of a failure. Rank 0 writes it down and ends the gang."""
  trouble = {
    'error': f'{type(error).__name__} on {socket.gethostname()}: {error}'[:2000],
    'traceback': ''.join(traceback.format_exception(error))[-6000:],
    'disk_full': faults.is_disk_full(error),
    'of_host': faults.is_host_error(error),
  }
  # Raises when another rank has told of a failure, which then counts, and when rank 0 is gone.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    distributed.tell(_TROUBLE, json.dumps(trouble))
  time.sleep(4 * GRACE_S)
  end_at_once(1)


def _as_told(trouble: str) -> RankFailed:
  told = json.loads(trouble)
  error = RankFailed(told['error'])
  error.add_note(told['traceback'])
  if told['disk_full']:
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  elif told['of_host']:
    error.__cause__ = OSError(errno.EIO, os.strerror(errno.EIO))
  return error
