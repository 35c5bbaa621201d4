"""Which waiting cells train together: those of one stream, whose checkpoints are at one step.

A group pays once for its activations. That matters when the subject runs live. With a store it saves nothing and costs
memory and time to compile, so cells of a store train alone unless the user asks for more.
"""

from collections.abc import Sequence

from sae_jax import files, schema
from sae_jax.config import Cell
from sweeps import ledger

_LIVE = 8  # cells of a live subject, unless the user states another number


def most(cell: Cell, stated: int | None) -> int:
  """How many cells may train together with this one."""
  if stated is not None:
    return stated
  return _LIVE if cell.data.source == 'live' else 1


def partition(entries: Sequence[ledger.Entry], stated: int | None) -> list[list[ledger.Entry]]:
  """Cells by stream, in their order, in groups of at most `most`.

  What is done already plays no part. So a job for a group has the same cells in every launch of one ledger.
  """
  parts: list[list[ledger.Entry]] = []
  last: dict[str, list[ledger.Entry]] = {}  # of each stream the newest group; those before it are full
  for entry in entries:
    part = last.get(entry.cell.group_key)
    if part is not None and len(part) < most(entry.cell, stated):
      part.append(entry)
    else:
      parts.append([entry])
      last[entry.cell.group_key] = parts[-1]
  return parts


def companions(
  store: ledger.Ledger, first: ledger.EntryState, waiting: Sequence[ledger.EntryState], count: int
) -> list[ledger.EntryState]:
  """At most `count` others of `waiting`, in their order, that can train with `first`.

  Cells that failed before stay alone. One that takes its process down then takes no other cell with it.
  """
  if count < 1 or first.attempts:
    return []
  step = newest_step(store, first.entry.id)
  fitting = (
    s
    for s in waiting
    if s.entry.id != first.entry.id
    and not s.attempts
    and s.entry.cell.group_key == first.entry.cell.group_key
    and newest_step(store, s.entry.id) == step
  )
  return [s for s, _ in zip(fitting, range(count), strict=False)]


def newest_step(store: ledger.Ledger, cell_id: str) -> int:
  """The step of a cell's newest checkpoint, 0 without one. Whether it is damaged is not looked at here."""
  return max(saved_steps(store, cell_id), default=0)


def saved_steps(store: ledger.Ledger, cell_id: str) -> list[int]:
  """The steps of all checkpoints of a cell."""
  names = files.listdir(files.join(store.folder(cell_id), schema.CHECKPOINTS))
  return [int(name) for name in names if name.isdecimal()]
