"""The ledger: one folder a cell, the only truth about what is done, and the lease that lets one worker train a cell.

No clock of another machine is ever read. A lease is taken over by creating the next generation exclusively, so
two observers who both find it stale cannot both win, and nobody needs compare-and-swap.
"""

import dataclasses
import json
import os
import pathlib
import re
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import sae_jax
from sae_jax import config, files, metrics
from sae_jax.errors import UserError
from sweeps import grid

MAX_FAILURES = 3  # attempts of a cell before it has failed for good
_ID = re.compile(r'[0-9a-f]{12}')
_CLAIM = re.compile(r'([1-9][0-9]*)\.json')


class LeaseLost(Exception):
  """Another worker took the cell over; whoever held it must stop at once, without writing anything."""


@dataclasses.dataclass(frozen=True)
class Cell:
  id: str
  overrides: grid.Overrides
  config: config.Config


@dataclasses.dataclass(frozen=True)
class CellState:
  """What the files say of one cell. `failed` means for good: permanent, or all attempts used."""

  cell: Cell
  state: str  # 'done', 'running', 'failed' or 'waiting'
  attempts: int  # failed ones
  reason: str  # one line: the last error, or who holds the lease


class Ledger:
  """The result store at `path`, a folder or an fsspec URL with exclusive create.

  Args:
    path: where; `register` fills an empty one.
    refresh_s: how often a holder rewrites its lease.
    stale_s: a lease unchanged for this long by the observer's own clock is free.
    clock: monotonic seconds of this process.
  """

  def __init__(
    self,
    path: str,
    *,
    refresh_s: float = 30.0,
    stale_s: float = 90.0,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.path = str(files.local(path)) if files.is_local(path) else path.rstrip('/')
    self.refresh_s, self.stale_s = refresh_s, stale_s
    self._clock = clock
    self._seen: dict[
      str, tuple[bytes, float]
    ] = {}  # a cell's last claim, and when this process first saw it so
    self._done: set[str] = set()
    files.check_exclusive_create(self.path)

  def folder(self, cell_id: str) -> str:
    """The cell's folder; also the only way to a path, so that no other name can lead out of the ledger."""
    if not _ID.fullmatch(cell_id):
      raise UserError(f'{cell_id!r} is not a cell id; an id is 12 hex digits, as sweeps.status prints them')
    return files.join(self.path, 'cells', cell_id)

  def check_free_for(self, sweep: grid.Sweep) -> None:
    """Raises `UserError` when another sweep lives here."""
    if files.exists(self._sweep_file):
      record = self._record()
      if (record['name'], record['experiment']) != (sweep.name, sweep.experiment):
        raise UserError(
          f'{self.path} holds the sweep {record["name"]!r} on {record["experiment"]}, not {sweep.name!r} on '
          f'{sweep.experiment}; give every sweep its own --ledger'
        )

  def register(self, sweep: grid.Sweep) -> None:
    """Adds the cells of a sweep that are not here yet. Raises `UserError` when another sweep lives here."""
    self.check_free_for(sweep)
    record = self._record() if files.exists(self._sweep_file) else {'cells': {}}
    old = record['cells']
    cells = {
      c.id: {'overrides': overrides, 'config': json.loads(c.to_json())} for overrides, c in sweep.cells
    }
    try:
      for cell_id in cells.keys() - old.keys():
        try:
          files.create(files.join(self.folder(cell_id), 'config.json'), _dump(cells[cell_id]['config']))
        except FileExistsError:  # an interrupted or simultaneous launch of the same sweep
          pass
      # Cells that left the grid stay: their results are worth keeping and another launch may be running them.
      union = {
        'name': sweep.name,
        'experiment': sweep.experiment,
        'code_version': f'{sae_jax.__version__} {metrics.git_commit()}'.strip(),
        'cells': old | cells,
      }
      if union != record:
        files.replace(self._sweep_file, _dump(union))
    except OSError as error:
      raise UserError(f'cannot write the ledger {self.path}: {error}; choose another --ledger') from None

  def name(self) -> str:
    return self._record()['name']

  def cells(self) -> list[Cell]:
    """Every cell, in the order of the grid. Raises `UserError` when there is no ledger or it was edited.

    The configuration is the one last registered: its id is the folder's, and what lies outside the id (mesh,
    paths, checkpoint interval) may have changed since config.json was written.
    """
    return [
      Cell(cell_id, entry['overrides'], config.from_json(_dump(entry['config'])))
      for cell_id, entry in self._record()['cells'].items()
    ]

  def states(self, max_failures: int = MAX_FAILURES) -> list[CellState]:
    return [self.state(cell, max_failures) for cell in self.cells()]

  def state(self, cell: Cell, max_failures: int = MAX_FAILURES) -> CellState:
    """Of one cell, which need not be registered."""
    names = set() if cell.id in self._done else set(files.listdir(self.folder(cell.id)))
    if cell.id in self._done or 'result.json' in names:
      self._done.add(cell.id)
      return CellState(cell, 'done', 0, '')
    failure = self._failure(cell.id) if 'failure.json' in names else None
    attempts = failure['attempts'] if failure else 0
    holder = self._live_holder(cell.id) if 'claims' in names else None
    if holder is not None:
      return CellState(cell, 'running', attempts, printable(f'process {holder["pid"]} on {holder["host"]}'))
    if failure is None:
      return CellState(cell, 'waiting', 0, '')
    reason = failure['reason']
    if failure['permanent'] or attempts >= max_failures:
      return CellState(cell, 'failed', attempts, f'{reason} ({attempts} attempts)')
    return CellState(cell, 'waiting', attempts, f'attempt {attempts} of {max_failures} failed: {reason}')

  def claim(self, cell_id: str) -> 'Lease | None':
    """The right to train a cell, or None when it is done, someone holds it, or someone was faster."""
    generation, _ = self._last_claim(cell_id)
    if self._live_holder(cell_id) is not None:
      return None
    lease = Lease(self, cell_id, generation + 1)
    try:
      lease.acquire()
    except FileExistsError:
      return None
    if files.exists(files.join(self.folder(cell_id), 'result.json')):  # finished since the caller looked
      lease.release()
      return None
    return lease

  def held_by(self, pid: int) -> str | None:
    """The cell whose last, unreleased lease belongs to this process of this host, alive or dead."""
    for cell in self.cells():
      record = _claim_record(self._last_claim(cell.id)[1])
      if record and record['pid'] == pid and record['pid_space'] == _pid_space():
        return cell.id
    return None

  def _live_holder(self, cell_id: str) -> dict[str, Any] | None:
    began = (
      self._clock()
    )  # taken before reading, and `since` after it: a slow read must not make a lease stale
    _, data = self._last_claim(cell_id)
    record = _claim_record(data)
    if record is None:
      return None
    if cell_id not in self._seen or self._seen[cell_id][0] != data:
      self._seen[cell_id] = data, self._clock()
    since = self._seen[cell_id][1]
    return None if began - since >= self.stale_s or _is_dead_here(record) else record

  def _last_claim(self, cell_id: str) -> tuple[int, bytes]:
    folder = files.join(self.folder(cell_id), 'claims')
    generations = [int(m[1]) for m in map(_CLAIM.fullmatch, files.listdir(folder)) if m]
    if not generations:
      return 0, b''
    return max(generations), files.read(files.join(folder, f'{max(generations)}.json'))

  def _failure(self, cell_id: str) -> dict[str, Any] | None:
    try:
      record = json.loads(files.read(files.join(self.folder(cell_id), 'failure.json')))
      return {
        'reason': printable(f'{record["kind"]}: {record["error"]}'),
        'attempts': int(record['attempts']),
        'permanent': bool(record['permanent']),
      }
    except FileNotFoundError:  # cleared since the folder was listed
      return None
    except (ValueError, KeyError, TypeError, OverflowError) as error:
      return {'reason': printable(f'unreadable failure.json: {error!r}'), 'attempts': 1, 'permanent': True}

  @property
  def _sweep_file(self) -> str:
    return files.join(self.path, 'sweep.json')

  def _record(self) -> dict[str, Any]:
    try:
      record = json.loads(files.read(self._sweep_file))
      for cell_id, entry in record['cells'].items():
        if not (
          _ID.fullmatch(cell_id) and entry['config']['id'] == cell_id and isinstance(entry['overrides'], dict)
        ):
          raise ValueError(f'cell {cell_id!r} does not match its configuration')
      if not (isinstance(record['name'], str) and isinstance(record['experiment'], str)):
        raise ValueError('name and experiment are text')
      return record
    except (FileNotFoundError, NotADirectoryError):
      raise UserError(f'no sweep at {self.path!r}; start one with python -m sweeps.launch') from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f'{self._sweep_file} is not a sweep record ({error}); was it edited by hand?') from None


class Lease:
  """One generation of a claim, refreshed by a background thread until `release`; a context manager.

  `check` must be called before anything is written to the cell: it raises `LeaseLost` once another generation
  exists, or when this process could not refresh for so long that one may.
  """

  def __init__(self, ledger: Ledger, cell_id: str, generation: int):
    claims = files.join(ledger.folder(cell_id), 'claims')
    self._path = files.join(claims, f'{generation}.json')
    self._next = files.join(claims, f'{generation + 1}.json')
    self._ledger, self._clock = ledger, ledger._clock
    self._record = {
      'pid': os.getpid(), 'started': _process_start(os.getpid()), 'pid_space': _pid_space(),
      'host': os.uname().nodename, 'nonce': secrets.token_hex(8), 'refreshed': 0, 'released': False,
    }  # fmt: skip
    self._lost = False
    self._lock = threading.Lock()
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._keep, daemon=True, name=f'lease-{cell_id}')

  def acquire(self) -> None:
    """Raises FileExistsError when this generation is taken."""
    self._refreshed = self._clock()
    files.create(self._path, _dump(self._record))
    self._thread.start()

  def check(self) -> None:
    """Cheap enough for every step: looks at the files only when the background thread has fallen behind."""
    if not self._lost and self._clock() - self._refreshed < 2 * self._ledger.refresh_s:
      return
    try:
      self._refresh()
    except OSError as error:
      if self._clock() - self._refreshed >= self._ledger.stale_s:
        raise LeaseLost(
          f'{self._path} could not be refreshed for {self._ledger.stale_s:g} s: {error}'
        ) from error

  def release(self) -> None:
    """Ends the lease; a successor may then start at once."""
    self._stop.set()
    self._thread.join()
    with self._lock:
      if not self._lost and not files.exists(self._next):
        files.replace(self._path, _dump(self._record | {'released': True}))

  def __enter__(self) -> 'Lease':
    return self

  def __exit__(self, *_: object) -> None:
    self.release()

  def _keep(self) -> None:
    while not self._stop.wait(self._ledger.refresh_s):
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
        files.replace(self._path, _dump(self._record))
        self._lost = files.exists(self._next)
      if self._lost:
        raise LeaseLost(f'{self._next} exists: another worker took this cell over')
      self._refreshed = begun


def printable(text: str) -> str:
  """One line without control characters: what comes from files is shown in a terminal."""
  return ''.join(c if c.isprintable() else '?' for c in ' '.join(text.split()))


def _claim_record(data: bytes) -> dict[str, Any] | None:
  """A claim that is not released, or None. One that cannot be read counts as held, until it is stale."""
  if not data:
    return None
  try:
    record = json.loads(data)
    claim = {key: record[key] for key in ('host', 'pid', 'started', 'pid_space')}
    return None if record['released'] else claim
  except (ValueError, KeyError, TypeError):
    return {'host': 'an unreadable lease', 'pid': 0, 'started': 0, 'pid_space': ''}


def _is_dead_here(record: dict[str, Any]) -> bool:
  """Whether the holder lived where this process lives and is gone. Unknown counts as alive: staleness decides."""
  if not record['pid_space'] or record['pid_space'] != _pid_space():
    return False
  return _process_start(record['pid']) != record['started']


def _pid_space() -> str:
  """Names the set of process ids that this process can see; '' where that cannot be known.

  The boot is part of it, so that a reboot is another space, and the namespace, because two containers of one
  host share boot and often host name, but not process ids.
  """
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return ''


def _process_start(pid: int) -> int:
  """Start of a live process in clock ticks since boot, which tells a reused id apart; -1 when it is gone."""
  try:
    # The name in parentheses may contain anything: fields are counted after the last one.
    state, *fields = pathlib.Path(f'/proc/{int(pid)}/stat').read_text().rpartition(')')[2].split()
  except (OSError, ValueError, TypeError, OverflowError):
    return -1
  return -1 if state in 'ZX' else int(fields[18])


def _dump(record: dict[str, Any]) -> bytes:
  return json.dumps(record, indent=1, allow_nan=False).encode() + b'\n'
