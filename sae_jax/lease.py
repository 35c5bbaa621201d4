"""The lease that lets one worker train a cell: one generation of a claim file, kept fresh by a thread.

No clock of another machine is ever read. A lease is taken over by creating the next generation exclusively, so
two observers who both find it stale cannot both win, and nobody needs compare-and-swap.
"""

import os
import pathlib
import re
import secrets
import sys
import threading
from collections.abc import Callable
from typing import Any

from sae_jax import files, schema

_CLAIM = re.compile(r'([1-9][0-9]{0,8})\.json')


class LeaseLost(Exception):
  """Another worker took the cell over; whoever held it must stop at once, without writing anything."""


class Lease:
  """One generation of a claim, refreshed by a background thread until `release`; a context manager.

  `check` must be called before anything is written to the cell: it raises `LeaseLost` once another generation
  exists, or when this process could not refresh for so long that one may.

  Args:
    cell_folder: the cell.
    generation: of the claim, from 1.
    refresh_s: how often it is rewritten.
    stale_s: unchanged for so long, others take it for free.
    clock: monotonic seconds of this process.
  """

  def __init__(
    self, cell_folder: str, generation: int, *, refresh_s: float, stale_s: float, clock: Callable[[], float]
  ):
    claims = files.join(cell_folder, schema.CLAIMS)
    self._path = files.join(claims, f'{generation}.json')
    self._next = files.join(claims, f'{generation + 1}.json')
    self._cancel = files.join(cell_folder, schema.CANCEL)
    self._refresh_s, self._stale_s, self._clock = refresh_s, stale_s, clock
    self._record = {
      'pid': os.getpid(), 'started': process_start(os.getpid()), 'pid_space': pid_space(),
      'host': os.uname().nodename, 'nonce': secrets.token_hex(8), 'refreshed': 0, 'released': False,
    }  # fmt: skip
    self.cancelled = (
      False  # whether someone asked, by sweeps.cancel, that the cell be left; seen at a refresh
    )
    self._lost = False
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True, name='lease')

  def acquire(self) -> None:
    """Raises FileExistsError when this generation is taken."""
    self._refreshed = self._clock()
    files.create(self._path, schema.dump(self._record))
    self._thread.start()

  def check(self) -> None:
    """Cheap enough for every step: looks at the files only when the background thread has fallen behind."""
    if not self._lost and self._clock() - self._refreshed < 2 * self._refresh_s:
      return
    try:
      self._refresh()
    except OSError as error:
      if self._clock() - self._refreshed >= self._stale_s:
        raise LeaseLost(f'{self._path} could not be refreshed for {self._stale_s:g} s: {error}') from error

  def release(self) -> None:
    """Ends the lease; a successor may then start at once."""
    self._stop.set()
    self._thread.join()
    with self._lock:
      if self._lost:
        return
      try:
        if not files.exists(self._next):
          files.replace(self._path, schema.dump(self._record | {'released': True}))
      except OSError as error:  # it ends by itself when it is stale; the error that led here matters more
        print(f'{self._path} could not be released ({error.strerror})', file=sys.stderr, flush=True)

  def __enter__(self) -> 'Lease':
    return self

  def __exit__(self, *_: object) -> None:
    self.release()

  def _keep(self) -> None:
    while not self._stop.wait(self._refresh_s):
      try:
        self._refresh()
      except LeaseLost:
        return  # `check` raises it where the work is done
      except OSError:
        continue  # a filesystem that comes back before the lease is stale does no harm; `check` counts

  def _refresh(self) -> None:
    with self._lock:
      begun = self._clock()  # before writing: an observer can only have started to count later
      self._lost = self._lost or files.exists(self._next)
      if not self._lost:
        self._record['refreshed'] += 1
        files.replace(self._path, schema.dump(self._record))
        self._lost = files.exists(self._next)
      if self._lost:
        raise LeaseLost(f'{self._next} exists: another worker took this cell over')
      self._refreshed = begun
      self.cancelled = files.exists(self._cancel)


def last_claim(cell_folder: str) -> tuple[int, bytes]:
  """Generation and bytes of the newest claim of a cell; (0, b'') when it was never claimed."""
  folder = files.join(cell_folder, schema.CLAIMS)
  generations = [int(m[1]) for m in map(_CLAIM.fullmatch, files.listdir(folder)) if m]
  if not generations:
    return 0, b''
  return max(generations), files.read(files.join(folder, f'{max(generations)}.json'))


def last_holder(cell_folder: str) -> dict[str, Any] | None:
  """Who claimed a cell last, unless they let go or are known to be dead. One look cannot tell a stale lease."""
  record = holder_of(last_claim(cell_folder)[1])
  return None if record is None or is_dead_here(record) else record


def holder_of(data: bytes) -> dict[str, Any] | None:
  """A claim that is not released, or None. One that cannot be read counts as held, until it is stale."""
  if not data:
    return None
  try:
    record = schema.parse(data)
    schema.check(record, schema.CLAIM)
  except schema.Broken:
    return {'host': 'an unreadable lease', 'pid': 0, 'started': 0, 'pid_space': ''}
  if any(not schema.is_kind(record.get(f.name), f.kind) for f in schema.CLAIM if f.name != 'nonce'):
    return {'host': 'an unreadable lease', 'pid': 0, 'started': 0, 'pid_space': ''}
  return None if record['released'] else record


def is_dead_here(record: dict[str, Any]) -> bool:
  """Whether the holder lived where this process lives and is gone. Unknown counts as alive: staleness decides."""
  if not record['pid_space'] or record['pid_space'] != pid_space():
    return False
  return process_start(record['pid']) != record['started']


def pid_space() -> str:
  """Names the set of process ids that this process can see; '' where that cannot be known.

  The boot is part of it, so that a reboot is another space, and the namespace, because two containers of one
  host share boot and often host name, but not process ids.
  """
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def process_start(pid: int) -> int:
  """Start of a live process in clock ticks since boot, which tells a reused id apart; -1 when it is gone."""
  try:
    # The name in parentheses may contain anything: fields are counted after the last one.
    state, *fields = pathlib.Path(f'/proc/{int(pid)}/stat').read_text().rpartition(')')[2].split()
  except (OSError, ValueError, TypeError, OverflowError):
    return -1
  return -1 if state in 'ZX' else int(fields[18])
