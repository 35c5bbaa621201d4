"""What a launch would do and cost, before anybody pays for it. Writes nothing."""

import heapq
import json
import time

import numpy as np

from sae_jax import flops, notes, schema
from sae_jax.config import Cell
from sweeps import grid, ledger, status


def states_of(sweep: grid.Sweep, store: ledger.Ledger, max_failures: int) -> list[ledger.EntryState]:
  """The state of every cell of a grid, whether or not the ledger has it already."""
  return [store.state(ledger.Entry(c.id, overrides, c), max_failures) for overrides, c in sweep.cells]


def table(name: str, store: ledger.Ledger, states: list[ledger.EntryState], workers: int, stated: float | None) -> str:
  """A line a cell with its FLOPs and time on one worker, and the time they should take on all.

  `stated` is the FLOP/s of a worker, used until finished cells of this ledger have told.
  """
  costs = {s.entry.id: flops.cell_flops(s.entry.cell) for s in states}
  rate, source = _rate(store, states, stated)
  rows = [('id', 'cell', 'steps', 'useful FLOPs', 'dense FLOPs', 'time', 'state')]
  for s in states:
    cost = costs[s.entry.id]
    rows.append(
      (
        s.entry.id,
        grid.label(s.entry.overrides),
        str(s.entry.cell.train.steps),
        f'{cost["useful"]:.2e}',
        f'{cost["dense"]:.2e}',
        status.duration(cost['dense'] / rate),
        f'{s.state}: {s.reason}' if s.reason else s.state,
      )
    )
  todo = [costs[s.entry.id] for s in states if s.state in schema.UNFINISHED]
  busy = [0.0] * workers  # as the workers do it: the largest cell next, to whoever is free
  for dense in sorted((cost['dense'] for cost in todo), reverse=True):
    heapq.heapreplace(busy, busy[0] + dense / rate)
  total = {key: sum(cost[key] for cost in todo) for key in ('useful', 'dense')}
  return '\n'.join(
    [
      *status.table(rows),
      f'{name}: {len(states)} cells, {len(todo)} to do, {total["useful"]:.2e} useful and '
      f'{total["dense"]:.2e} dense FLOPs, about {status.duration(max(busy))} on {workers} worker{"s"[: workers > 1]}',
      f'time at {rate:.2e} dense FLOP/s a worker, {source}',
      *(f'note: {line}' for line in notes.of_all(s.entry.cell for s in states if s.result is None)),
    ]
  )


def cost_table(states: list[ledger.EntryState], topology: str, dollars: float | None) -> str:
  """Chip-hours of the cells to do on a slice such as 'v5p:2x2x2', each alone on all of it, and what they cost.

  Each shape of step is compiled once, for chips that need not be here. The time is the roofline, a lower bound. `dollars`
  is the price of a chip-hour, None when it does not matter. Raises `UserError` for a cell that does not fit.
  """
  from sae_jax import plan  # brings the compiler; a launch does without

  plans: dict[str, plan.Plan] = {}
  rows = [('id', 'cell', 'mesh', 'memory', 'chip-hours', *(('dollars',) if dollars else ()))]
  total = 0.0
  todo = [s for s in states if s.state in schema.UNFINISHED]
  for s in todo:
    cell = s.entry.cell
    key = _step_shape(cell)
    if key not in plans:
      plans[key] = plan.plan(cell, topology)
    made = plans[key]
    hours = made.seconds * cell.train.steps * made.chips / 3600
    total += hours
    rows.append(
      (
        s.entry.id,
        grid.label(s.entry.overrides),
        f'{made.mesh["data"]}x{made.mesh["latent"]}',
        f'{made.memory_fraction:.1%}',
        f'{hours:.3g}',
        *((f'{hours * dollars:.2f}',) if dollars else ()),
      )
    )
  price = f', {total * dollars:,.2f} dollars at {dollars:g} a chip-hour' if dollars else ''
  return '\n'.join(
    [
      *status.table(rows),
      f'{topology}: {len(todo)} cells, {total:.3g} chip-hours{price}',
      f'at the roofline of {len(plans)} compiled steps that nobody ran: a lower bound, without start, evaluation and subject',
    ]
  )


def _step_shape(cell: Cell) -> str:
  """Equal for cells whose compiled steps are alike. What only enters them as a number stays out."""
  free = ('train.seed', 'train.tokens', 'train.checkpoint_every')
  kept = {k: v for k, v in cell.flat().items() if k.startswith(('sae.', 'mesh.', 'train.')) and k not in free}
  return json.dumps(kept | {'aux': cell.loss.aux_coefficient > 0}, sort_keys=True)


def _rate(store: ledger.Ledger, states: list[ledger.EntryState], stated: float | None) -> tuple[float, str]:
  spent = seconds = 0.0
  for s in states:
    if s.result is not None and s.result.get('wall_s'):  # those of early versions may lack it
      spent, seconds = spent + s.result['flops_dense'], seconds + s.result['wall_s']
  if seconds > 0:
    return spent / seconds, 'measured on the finished cells of this ledger'
  if stated is not None:
    return stated, 'as stated by --flops_per_second'
  x = np.ones((1024, 1024), np.float32)
  products, begin = 0, time.monotonic()
  while (elapsed := time.monotonic() - begin) < 1:
    x @ x
    products += 1
  return products * 2.0 * 1024**3 / elapsed, 'that of a numpy matrix product here: no cell has finished yet'
