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
import time
from collections.abc import Callable
from typing import Any

from sae_jax import files, schema
from sae_jax.errors import BrokenFile

GONE, UNSEEN = -1, 0  # in place of a process's start
_CLAIM = re.compile(r'([1-9][0-9]{0,8})\.json')


class LeaseLost(Exception):
  """Another worker took the cell over; whoever held it must stop at once, without writing anything."""


class Lease:
  """One generation of a claim, refreshed by a background thread until `release`; a context manager.

  The claim carries a nonce, and it is this lease's only as long as the file has it: whoever finds another one, none, or
  a later generation has lost the lease. A claim is rewritten and never made again, so that a folder that was deleted or
  moved away stays so.

  `check` must be called before anything is written to the cell. It raises `LeaseLost` once the lease is lost, or when
  this process could not refresh for so long that it may be. A process can be stopped between a check and the write
  behind it. What it then still writes does no harm: result.json is created once, and a checkpoint or a line of metrics
  is a function of the cell and the step, whoever writes it.

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
      'pid': os.getpid(),
      'started': process_start(os.getpid()),
      'pid_space': pid_space(),
      'host': os.uname().nodename,
      'nonce': secrets.token_hex(8),
      'refreshed': 0,
      'released': False,
    }
    self.cancelled = False  # whether someone asked, by sweeps.cancel, that the cell be left; seen at a refresh
    self._lost = ''  # why, once it is
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True, name='lease')

  def acquire(self) -> None:
    """Raises FileExistsError when this generation is taken."""
    self._refreshed = self._clock()
    files.create(self._path, schema.dump(self._record))
    self._thread.start()

  def check(self, fresh: bool = False) -> None:
    """Raises `LeaseLost` unless the lease is still this one's.

    Cheap enough for every step: it looks at the files only when the background thread has fallen behind, as it has in a
    process that was stopped. With `fresh` it looks in any case, as is right before others see what is written.
    """
    behind = self._clock() - self._refreshed >= 2 * self._refresh_s
    if not (self._lost or fresh or behind):
      return
    try:
      if behind:
        self._refresh()
      else:
        with self._lock:
          self._verify()
    except OSError as error:
      if self._clock() - self._refreshed >= self._stale_s:
        raise LeaseLost(f'{self._path} could not be refreshed for {self._stale_s:g} s: {error}') from error

  def release(self) -> None:
    """Ends the lease; a successor may then start at once."""
    self._stop.set()
    self._thread.join()
    with self._lock:
      try:
        self._verify()
        files.replace(self._path, schema.dump(self._record | {'released': True}), parents=False)
      except LeaseLost:
        return
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
      self._verify()
      self._record['refreshed'] += 1
      try:
        files.replace(self._path, schema.dump(self._record), parents=False)
      except FileNotFoundError:
        pass  # the folder is gone, as the next line says
      self._verify()
      self._refreshed = begun
      self.cancelled = files.exists(self._cancel)

  def _verify(self) -> None:
    """Raises `LeaseLost` unless the claim on disk is this lease's and the newest."""
    self._lost = self._lost or self._why_lost()
    if self._lost:
      raise LeaseLost(self._lost)

  def _why_lost(self) -> str:
    if files.exists(self._next):
      return f'{self._next} exists: another worker took this cell over'
    try:
      found = schema.parse(files.read(self._path))
    except (FileNotFoundError, NotADirectoryError):
      return f'{self._path} is gone: it was deleted, or moved away with its folder'
    except schema.Broken as error:
      return f'{self._path} is not what this worker wrote: {error}'
    if found.get('nonce') != self._record['nonce']:
      return f'{self._path} carries the nonce of another worker'
    return ''


class Observer:
  """Sees who holds leases, and takes those that nobody holds. What is stale is decided by its own clock.

  Args:
    refresh_s: how often a holder rewrites its lease.
    stale_s: a lease unchanged for this long is free.
    clock: monotonic seconds of this process.
  """

  def __init__(self, *, refresh_s: float = 30.0, stale_s: float = 90.0, clock: Callable[[], float] = time.monotonic):
    self._refresh_s, self._stale_s, self._clock = refresh_s, stale_s, clock
    self._seen: dict[str, tuple[bytes, float]] = {}  # a folder's last claim, and when it was first seen so

  def holder(self, folder: str) -> dict[str, Any] | None:
    """The claim of whoever holds the lease of a folder, or None."""
    # Taken before reading, and `since` after it: a slow read must not make a lease stale.
    began = self._clock()
    _, data = last_claim(folder)
    record = holder_of(data)
    if record is None:
      return None
    if folder not in self._seen or self._seen[folder][0] != data:
      self._seen[folder] = data, self._clock()
    since = self._seen[folder][1]
    return None if began - since >= self._stale_s or is_dead_here(record) else record

  def claim(self, folder: str) -> Lease | None:
    """The lease of a folder, or None when someone holds it or was faster. Raises `BrokenFile` for no claim in its place."""
    claims = files.join(folder, schema.CLAIMS)
    try:
      generation, _ = last_claim(folder)
      if self.holder(folder) is not None:
        return None
    except (IsADirectoryError, PermissionError) as error:
      raise BrokenFile(f'{claims}: a claim cannot be read ({error.strerror}); move it aside') from error
    taken = Lease(folder, generation + 1, refresh_s=self._refresh_s, stale_s=self._stale_s, clock=self._clock)
    try:
      taken.acquire()
    except FileExistsError:
      if files.is_file(claims):
        raise BrokenFile(f'{claims} is a file and not a folder; move it aside') from None
      return None
    return taken


def last_claim(cell_folder: str) -> tuple[int, bytes]:
  """Generation and bytes of the newest claim of a cell; (0, b'') when it was never claimed."""
  folder = files.join(cell_folder, schema.CLAIMS)
  generations = [int(m[1]) for m in map(_CLAIM.fullmatch, files.listdir(folder)) if m]
  if not generations:
    return 0, b''
  try:
    return max(generations), files.read(files.join(folder, f'{max(generations)}.json'))
  except schema.Broken:
    return max(generations), b'?'  # far too large, and to `holder_of` as unreadable as other rubbish


def last_holder(cell_folder: str) -> dict[str, Any] | None:
  """Who claimed a cell last, unless they let go or are known to be dead. One look cannot tell a stale lease."""
  record = holder_of(last_claim(cell_folder)[1])
  return None if record is None or is_dead_here(record) else record


def name_of(record: dict[str, Any]) -> str:
  """A holder as people are told of it."""
  return f'process {record["pid"]} on {record["host"]}'


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
  return process_start(record['pid']) not in (record['started'], UNSEEN)


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
  """Start of a live process in clock ticks since boot, which tells a reused id apart.

  `GONE` when there is no such process, `UNSEEN` when there is one that this process may not look at: another user's,
  where /proc is mounted with hidepid.
  """
  try:
    # The name in parentheses may contain anything: fields are counted after the last one.
    state, *fields = pathlib.Path(f'/proc/{int(pid)}/stat').read_text().rpartition(')')[2].split()
  except (ValueError, TypeError, OverflowError):
    return GONE
  except OSError:
    return UNSEEN if _exists(pid) else GONE
  return GONE if state in 'ZX' else int(fields[18])


def _exists(pid: int) -> bool:
  if pid < 1:
    return False
  try:
    os.kill(pid, 0)
  except (ProcessLookupError, OverflowError):
    return False
  except OSError:  # EPERM: it is there, and someone else's
    return True
  return True
