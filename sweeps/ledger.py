"""The ledger: one folder a cell, the only truth about what is done. Who may train a cell is in lease.py."""

import dataclasses
import json
import re
import time
from collections.abc import Callable
from typing import Any

import sae_jax
from sae_jax import cell_state, config, files, lease, metrics, schema
from sae_jax.cell_state import MAX_FAILURES
from sae_jax.errors import UserError
from sweeps import grid

_ID = re.compile(r'[0-9a-f]{12}')


@dataclasses.dataclass(frozen=True)
class Cell:
  id: str
  overrides: grid.Overrides
  config: config.Config


@dataclasses.dataclass(frozen=True)
class CellState:
  """What the files say of one cell: see `sae_jax.cell_state`."""

  cell: Cell
  state: str
  attempts: int  # failed ones
  reason: str
  result: dict[str, Any] | None = None


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
    self._done: dict[str, CellState] = {}
    files.check_exclusive_create(self.path)

  def folder(self, cell_id: str) -> str:
    """The cell's folder; also the only way to a path, so that no other name can lead out of the ledger."""
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
      c.id: {'overrides': overrides, 'config': json.loads(c.to_json())} for overrides, c in sweep.cells
    }
    try:
      for cell_id in cells.keys() - old.keys():
        try:
          files.create(files.join(self.folder(cell_id), schema.CONFIG), schema.dump(cells[cell_id]['config']))
        except FileExistsError:  # an interrupted or simultaneous launch of the same sweep
          pass
      # Cells that left the grid stay: their results are worth keeping and another launch may be running them.
      union = {
        'name': sweep.name,
        'experiment': sweep.experiment,
        'code_version': f'{sae_jax.__version__} {metrics.git_commit()}'.strip(),
        'cells': old | cells,
      }
      if union != schema.content(record):
        files.replace(self._sweep_file, schema.dump(union))
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
      Cell(cell_id, entry['overrides'], config.from_record(entry['config']))
      for cell_id, entry in self._record()['cells'].items()
    ]

  def states(self, max_failures: int = MAX_FAILURES) -> list[CellState]:
    return [self.state(cell, max_failures) for cell in self.cells()]

  def state(self, cell: Cell, max_failures: int = MAX_FAILURES) -> CellState:
    """Of one cell, which need not be registered."""
    if cell.id in self._done:
      return dataclasses.replace(self._done[cell.id], cell=cell)
    found = cell_state.read(
      self.folder(cell.id), cell.id, max_failures=max_failures, holder=lambda: self._live_holder(cell.id)
    )
    state = CellState(cell, found.state, found.attempts, found.reason, found.result)
    if state.state == schema.DONE:  # what is done stays so
      self._done[cell.id] = state
    return state

  def claim(self, cell_id: str) -> lease.Lease | None:
    """The right to train a cell, or None when it is done or cancelled, or someone holds it or was faster."""
    folder = self.folder(cell_id)
    generation, _ = lease.last_claim(folder)
    if self._live_holder(cell_id) is not None:
      return None
    taken = lease.Lease(
      folder, generation + 1, refresh_s=self.refresh_s, stale_s=self.stale_s, clock=self._clock
    )
    try:
      taken.acquire()
    except FileExistsError:
      return None
    if any(files.exists(files.join(folder, name)) for name in (schema.RESULT, schema.CANCEL)):
      taken.release()  # finished or cancelled since the caller looked
      return None
    return taken

  def held_by(self, pid: int) -> list[str]:
    """The cells whose last, unreleased leases belong to this process of this host, alive or dead."""
    holders = ((cell.id, lease.holder_of(lease.last_claim(self.folder(cell.id))[1])) for cell in self.cells())
    here = lease.pid_space()
    return [cell_id for cell_id, r in holders if r and (r['pid'], r['pid_space']) == (pid, here)]

  def _live_holder(self, cell_id: str) -> dict[str, Any] | None:
    began = (
      self._clock()
    )  # taken before reading, and `since` after it: a slow read must not make a lease stale
    _, data = lease.last_claim(self.folder(cell_id))
    record = lease.holder_of(data)
    if record is None:
      return None
    if cell_id not in self._seen or self._seen[cell_id][0] != data:
      self._seen[cell_id] = data, self._clock()
    since = self._seen[cell_id][1]
    return None if began - since >= self.stale_s or lease.is_dead_here(record) else record

  @property
  def _sweep_file(self) -> str:
    return files.join(self.path, schema.SWEEP)

  def _record(self) -> dict[str, Any]:
    try:
      record = schema.parse_large(files.read(self._sweep_file))
      schema.check(record, schema.SWEEPS)
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
    except (IsADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f'{self._sweep_file} is not a sweep record ({error}); was it edited by hand?') from None
