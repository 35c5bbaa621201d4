"""Which waiting cells train together: those of one stream, whose checkpoints are at one step.

A group pays once for the activations, which matters when the subject runs live. With a store a group saves nothing and
costs memory and compile time, so cells of a store train alone unless `mesh.member` or the user asks for more.
"""

import contextlib
from collections.abc import Callable, Sequence

from sae_jax import files, metrics, watchdog
from sae_jax.config import Config
from sae_jax.errors import UserError
from sweeps import grid, lease, ledger

TrainGroup = Callable[..., list]  # sae_jax.train.train_group
_LIVE = 8  # cells of a live subject, unless the user states another number


def most(config: Config, stated: int | None) -> int:
  """How many cells may train together with one of this configuration."""
  if stated is not None:
    return stated
  return max(config.mesh.member, _LIVE if config.data.source == 'live' else 1)


def companions(
  store: ledger.Ledger, first: ledger.CellState, waiting: Sequence[ledger.CellState], count: int
) -> list[ledger.CellState]:
  """At most `count` others of `waiting`, in their order, that can train with `first`.

  Cells that failed before stay alone, so that a cell that takes its process down takes no other with it.
  """
  if count < 1 or first.attempts:
    return []
  step = newest_step(store, first.cell.id)
  fitting = (
    s
    for s in waiting
    if s.cell.id != first.cell.id
    and not s.attempts
    and s.cell.config.stream == first.cell.config.stream
    and newest_step(store, s.cell.id) == step
  )
  return [s for s, _ in zip(fitting, range(count), strict=False)]


def newest_step(store: ledger.Ledger, cell_id: str) -> int:
  """The step of the newest checkpoint of a cell, 0 without one. It may turn out to be damaged; that is seen later."""
  names = files.listdir(files.join(store.folder(cell_id), 'ckpt'))
  return max((int(name) for name in names if name.isdecimal()), default=0)


def attempt(
  store: ledger.Ledger,
  train_group: TrainGroup,
  held: Sequence[tuple[ledger.Cell, lease.Lease]],
  stop: Callable[[], bool],
  permanent: tuple[type[Exception], ...],
) -> None:
  """Trains cells together under their leases, which end here, and records the failure of each that fails.

  When one is cancelled all save and stop: the rest form a new group. An error of the whole group counts as an attempt
  of each, after which each is tried alone. Raises `LeaseLost`, and `UserError` when the disk is full.
  """

  def say(cell: ledger.Cell, what: str) -> None:
    print(f'cell {cell.id} {grid.label(cell.overrides)}: {what}', flush=True)

  def record(cell: ledger.Cell, lease_: lease.Lease, error: Exception) -> None:
    lease_.check()
    metrics.record_failure(store.folder(cell.id), error, permanent=isinstance(error, permanent))
    say(cell, f'failed, {type(error).__name__}: {ledger.printable(str(error))}')

  with contextlib.ExitStack() as leases:
    for cell, lease_ in held:
      leases.enter_context(lease_)
      say(cell, f'starts in a group of {len(held)}')
    try:
      with watchdog.Watchdog() as alive:

        def should_stop() -> bool:
          alive.beat()
          for _, lease_ in held:
            lease_.check()
          return stop() or any(lease_.cancelled for _, lease_ in held)

        outcomes = train_group(
          [(cell.config, store.folder(cell.id)) for cell, _ in held],
          should_stop=should_stop,
          label=f'{len(held)} cells',
        )
    except lease.LeaseLost:
      raise
    except Exception as error:
      if files.is_disk_full(error):
        raise UserError(
          f'{store.path}: no space left on the device; free some (python -m sweeps.gc) and start again: it resumes'
        ) from error
      for cell, lease_ in held:
        record(cell, lease_, error)
      return
    for (cell, lease_), outcome in zip(held, outcomes, strict=True):
      if isinstance(outcome, Exception):
        record(cell, lease_, outcome)
      else:
        say(cell, outcome)
