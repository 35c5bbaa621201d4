"""The ledger: one folder a cell. It is the only truth about what is done. Who may train a cell is in lease.py."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import sae_jax
from sae_jax import cell_state, config, files, lease, metrics, schema
from sae_jax.cell_state import MAX_FAILURES
from sae_jax.errors import BrokenFile, UserError
from sweeps import grid

_ID = re.compile(r'[0-9a-f]{12}')
_POLL_S = 0.05  # between two tries for the lease of the ledger
_REST = 20.0  # a nap is so many times as long as the CPU time of the look before it


@dataclasses.dataclass(frozen=True)
class Entry:
  """A cell as the ledger lists it.

  Attributes:
    id: content hash of its configuration.
    overrides: what the grid changes.
    source: the cell, or the record of it that a digest covers.
  """

  id: str
  overrides: grid.Overrides
  source: config.Cell | dict[str, Any]

  @functools.cached_property
  def cell(self) -> config.Cell:
    """The cell, made when it is asked for: a status of finished cells never does."""
    if isinstance(self.source, dict):
      return config.from_record(self.source, verified=True)
    return self.source


@dataclasses.dataclass(frozen=True)
class EntryState:
  """What the files say of one cell: see `sae_jax.cell_state`."""

  entry: Entry
  state: str
  attempts: int  # failed ones
  reason: str
  result: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class _Read:
  """sweep.json as it was read last."""

  version: tuple[Any, ...] | None
  digest: bytes
  record: dict[str, Any]


def nap_s(poll_s: float, look_s: float) -> float:
  """Seconds until the next look, after one that took `look_s` of CPU time: at least `poll_s`."""
  return max(poll_s, _REST * look_s)


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
    self._observer = lease.Observer(refresh_s=refresh_s, stale_s=stale_s, clock=clock)
    self._done: dict[str, EntryState] = {}
    self._configs: dict[str, dict[str, Any]] = {}  # config.json of unfinished cells, once found sound
    self._read: _Read | None = None
    # By id, of the last record: what it says of each cell, and the entry made of that.
    self._parsed: dict[str, tuple[dict[str, Any], Entry]] = {}
    self._listed: tuple[dict[str, Any], list[Entry]] | None = None  # a record, and its entries
    files.check_exclusive_create(self.path)

  def folder(self, cell_id: str) -> str:
    """The cell's folder. Every path is made from it, so that no name can lead out of the ledger."""
    if not _ID.fullmatch(cell_id):
      raise UserError(f'{cell_id!r} is not a cell id; an id is 12 hex digits, as sweeps.status prints them')
    return files.join(self.path, schema.CELLS, cell_id)

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
      c.id: {'overrides': json.loads(json.dumps(overrides)), 'config': c.to_record()} for overrides, c in sweep.cells
    }
    for _, c in sweep.cells:  # reading them back then parses nothing
      self._parsed[c.id] = cells[c.id], Entry(c.id, cells[c.id]['overrides'], c)
    try:
      missing = {files.join(self.folder(cell_id), schema.CONFIG): cell_id for cell_id in cells.keys() - old.keys()}
      # Some may exist, of an interrupted or simultaneous launch of the same sweep.
      made = files.create_missing(
        {path: schema.dump_sealed(cells[cell_id]['config']) for path, cell_id in missing.items()}
      )
      self._configs |= {missing[path]: cells[missing[path]]['config'] for path in made}
      self._merge(sweep, cells)
    except OSError as error:
      raise UserError(f'cannot write the ledger {self.path}: {error}; choose another --ledger') from None

  def _merge(self, sweep: grid.Sweep, cells: dict[str, dict[str, Any]]) -> None:
    """Adds cells to sweep.json, under a lease of the whole ledger, so one process at a time."""
    version = f'{sae_jax.__version__} {metrics.git_commit()}'.strip()
    if self._union(sweep, cells, version) is None:
      return
    waited_for: dict[str, Any] | None = None
    while True:
      held = self._observer.claim(self.path)
      if held is None:
        holder = self._observer.holder(self.path)
        if holder is not None and waited_for is None:
          print(
            f'process {holder["pid"]} on {holder["host"]} registers cells in {self.path}; waiting for it',
            file=sys.stderr,
            flush=True,
          )
        waited_for = holder or waited_for
        time.sleep(_POLL_S)
        continue
      with contextlib.suppress(lease.LeaseLost), held:
        if (union := self._union(sweep, cells, version)) is not None:
          data = schema.dump_large(union)
          held.check(fresh=True)
          files.replace(self._sweep_file, data)
          self._read = _Read(None, hashlib.sha256(data).digest(), union)
      # A holder that was stopped just before its write may have undone ours meanwhile.
      if cells.keys() <= self._record()['cells'].keys():
        return

  def _union(self, sweep: grid.Sweep, cells: dict[str, dict[str, Any]], version: str) -> dict[str, Any] | None:
    """sweep.json with these cells in it, or None when it has them. Raises `UserError` when it is another sweep's.

    Cells that left the grid stay. Their results are worth keeping, and another launch may be running them.
    """
    self.check_free_for(sweep)
    record = self._record() if files.exists(self._sweep_file) else {'cells': {}}
    union = {
      'name': sweep.name,
      'experiment': sweep.experiment,
      'code_version': version,
      'cells': record['cells'] | cells,
    }
    return None if union == schema.content(record) else union

  def name(self) -> str:
    return self._record()['name']

  def entries(self) -> list[Entry]:
    """Every cell, in the order of the grid. Raises `UserError` when there is no ledger or it was edited.

    A cell is as it was registered last. What lies outside its id (mesh, paths, checkpoint interval) may have changed since
    config.json was written. Until sweep.json changes the answer is the same list. After that only what changed is parsed.
    """
    record = self._record()
    if self._listed is None or self._listed[0] is not record:
      parsed, verified = self._parsed, schema.verified(record)
      self._parsed = {
        cell_id: parsed[cell_id]
        if cell_id in parsed and parsed[cell_id][0] == said
        else (said, self._entry(cell_id, said, verified))
        for cell_id, said in record['cells'].items()
      }
      self._listed = record, [entry for _, entry in self._parsed.values()]
    return self._listed[1]

  def check_known(self, ids: Iterable[str]) -> None:
    """Raises `UserError` for the first that is no cell of this ledger."""
    known = {entry.id for entry in self.entries()}
    for cell_id in ids:
      if cell_id not in known:
        raise UserError(f'no cell {cell_id!r} in {self.path}; python -m sweeps.status lists the ids')

  def _entry(self, cell_id: str, said: dict[str, Any], verified: bool) -> Entry:
    if verified:
      return Entry(cell_id, said['overrides'], said['config'])
    try:
      return Entry(cell_id, said['overrides'], config.from_record(said['config']))
    except UserError as error:
      raise self._broken(f'cell {cell_id}: {str(error).partition(";")[0]}') from None

  def states(self, max_failures: int = MAX_FAILURES) -> list[EntryState]:
    """The state of every cell. Of finished cells nothing is read twice, of the others only what can have changed."""
    return [self.state(entry, max_failures) for entry in self.entries()]

  def state(self, entry: Entry, max_failures: int = MAX_FAILURES) -> EntryState:
    """The state of one cell, which need not be registered."""
    if (done := self._done.get(entry.id)) is not None:
      return done if done.entry is entry else dataclasses.replace(done, entry=entry)
    found = cell_state.read(
      self.folder(entry.id),
      entry.id,
      max_failures=max_failures,
      holder=lambda: self._observer.holder(self.folder(entry.id)),
      known=self._configs.get(entry.id),
      registered=self._registered(entry.id),
    )
    state = EntryState(entry, found.state, found.attempts, found.reason, found.result)
    if state.state == schema.DONE:  # it stays so
      self._done[entry.id] = state
      self._configs.pop(entry.id, None)
    elif found.config is not None:
      self._configs[entry.id] = found.config
    return state

  def _registered(self, cell_id: str) -> dict[str, Any] | None:
    """What config.json of a cell should be; None when this process has it from no record that it checked."""
    if cell_id in self._parsed:
      return self._parsed[cell_id][0]['config']
    if self._read is None or not schema.verified(self._read.record) or cell_id not in self._read.record['cells']:
      return None
    return self._read.record['cells'][cell_id]['config']

  def claim(self, cell_id: str) -> lease.Lease | None:
    """The right to train a cell; None when it is done, cancelled or invalid, and when someone holds it or was faster."""
    folder = self.folder(cell_id)
    try:
      if self._is_settled(folder) or (taken := self._observer.claim(folder)) is None:
        return None
    except BrokenFile:
      return None  # `state` says what is wrong
    if self._is_settled(folder):  # since the look above
      taken.release()
      return None
    return taken

  def held_by(self, pid: int, started: int = lease.UNSEEN) -> list[str]:
    """The cells whose last leases are unreleased and of this process of this host, which may be dead.

    `started` is its `lease.process_start`, where that is known. It tells the process from a later one with the same id.
    """
    ids = [entry.id for entry in self.entries() if entry.id not in self._done]
    holders = ((cell_id, self._last_holder(cell_id)) for cell_id in ids)
    here = lease.pid_space()
    unknown = (lease.UNSEEN, lease.GONE)
    return [
      cell_id
      for cell_id, r in holders
      if r and (r['pid'], r['pid_space']) == (pid, here)
      if started in unknown or r['started'] in (started, *unknown)
    ]

  def _last_holder(self, cell_id: str) -> dict[str, Any] | None:
    try:
      return lease.holder_of(lease.last_claim(self.folder(cell_id))[1])
    except (IsADirectoryError, PermissionError):
      return None  # `state` says what is wrong

  @staticmethod
  def _is_settled(folder: str) -> bool:
    """Whether a cell is finished or cancelled."""
    return any(files.exists(files.join(folder, name)) for name in (schema.RESULT, schema.CANCEL))

  @property
  def _sweep_file(self) -> str:
    return files.join(self.path, schema.SWEEP)

  def _record(self) -> dict[str, Any]:
    """sweep.json. While its bytes are those of the last time, so is the object."""
    try:
      version = files.version(self._sweep_file)  # before reading: of a file replaced in between, this is the older
      if self._read is not None and version is not None and version == self._read.version:
        return self._read.record
      data = files.read(self._sweep_file, schema.LARGE)
      digest = hashlib.sha256(data).digest()
      if self._read is not None and digest == self._read.digest:
        self._read = dataclasses.replace(self._read, version=version)
        return self._read.record
      record = schema.parse_large(data)
      schema.check(record, schema.SWEEPS)
      for cell_id, said in record['cells'].items():
        if not (_ID.fullmatch(cell_id) and said['config']['id'] == cell_id and isinstance(said['overrides'], dict)):
          raise ValueError(f'cell {cell_id!r} does not match its configuration')
      if not (isinstance(record['name'], str) and isinstance(record['experiment'], str)):
        raise ValueError('name and experiment are text')
      self._read = _Read(version, digest, record)
      return record
    except (FileNotFoundError, NotADirectoryError):
      raise UserError(f'no sweep at {self.path!r}; start one with python -m sweeps.launch') from None
    except (IsADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise self._broken(str(error)) from None

  def _broken(self, why: str) -> UserError:
    return UserError(
      f'{self._sweep_file} is not a sweep record ({why}); move it aside and launch again: finished cells are found'
    )
