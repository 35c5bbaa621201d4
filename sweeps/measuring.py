"""The loop of `sweeps.measure`: which cells of a ledger lack which measures, and measuring them, each under its lease."""

import contextlib
import json
import sys
import time
import types
from collections.abc import Mapping, Sequence

import jax

from sae_jax import cell_state, files, lease, measure, schema, signals
from sae_jax.errors import UserError
from sae_jax.measures import Scope, run
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Measure
from sweeps import ledger

_POLL_S = 1.0
_MATRIX = 1536  # of the product that tells how fast this machine is


class Measuring:
  """The cells of a ledger that are to be measured, and what was found out about them.

  Args:
    store: the ledger.
    wanted: measures.
    scope: how much text.
    weights: 'raw', 'ema', or None for the better ones.
    only: ids of cells; all finished ones when empty.
    where: values of their config, such as {'sae.n_latents': '1024'}: cells with others are left out.

  Raises `UserError` for unknown ids, and where no cell has these values.
  """

  def __init__(
    self,
    store: ledger.Ledger,
    wanted: list[Measure],
    scope: Scope,
    weights: str | None,
    only: Sequence[str] = (),
    where: Mapping[str, str] = types.MappingProxyType({}),
  ):
    store.check_known(only)
    self.wanted, self.scope, self.refused = wanted, scope, dict[str, str]()
    self._folder = files.join(store.path, schema.MEASURES)
    self._inputs: tuple[object, Inputs] | None = None
    targets = []
    for state in store.states():
      if only and state.entry.id not in only:
        continue
      if state.state in schema.FINISHED:
        try:
          targets.append(run.target(store.folder(state.entry.id), weights))
        except UserError as error:
          self.refused[state.entry.id] = str(error)
      elif only or state.state not in schema.UNFINISHED:
        reason = f' ({state.reason})' if state.reason else ''
        self.refused[state.entry.id] = f'it is {state.state}{reason}; measures need a finished cell'
    targets = [of for of in targets if all(_value(of, key) == value for key, value in where.items())]
    if where and not targets:
      asked = ','.join(f'{key}={value}' for key, value in where.items())
      raise UserError(f'--where={asked} leaves no finished cell; keys and values are those of config.json')
    # Cells that share their inputs in a row: one subject is in memory at a time.
    self.targets = sorted(targets, key=lambda of: (repr(run.group(of, scope)), of.id))

  def inputs(self, of: run.Target) -> Inputs:
    group = run.group(of, self.scope)
    if self._inputs is None or self._inputs[0] != group:
      self._inputs = None  # two subjects may not fit
      self._inputs = group, run.inputs_of(of, self.scope, self._folder)
    return self._inputs[1]

  def missing(self, of: run.Target) -> list[Measure]:
    return run.missing(of, self.wanted, self.inputs(of))


def work(measuring: Measuring, stop: signals.Signalled, visible: bool = True) -> bool:
  """Measures until nothing is missing; False when asked to stop. What cannot be measured is `measuring.refused`.

  Raises `LeaseLost` when this process was stopped for so long that another took its cell.
  """
  observer, waiting = lease.Observer(), list(measuring.targets)
  progress = measure.Shown('measures', 0, visible)
  with contextlib.closing(progress):
    while waiting:
      left = []
      for of in waiting:
        if stop():
          return False
        try:
          if not measuring.missing(of):
            continue
          held = observer.claim(files.join(of.folder, schema.MEASURES))
          if held is None:
            left.append(of)
            continue
          with held:
            if not _one(of, measuring, held, stop, progress):
              return False
        except UserError as error:
          measuring.refused[of.id] = str(error)
          print(f'{of.id}: {cell_state.printable(str(error))}', file=sys.stderr, flush=True)
      if len(left) == len(waiting):
        time.sleep(_POLL_S)  # others hold all that is left, and may die
      waiting = left
  return True


def _one(
  of: run.Target, measuring: Measuring, held: lease.Lease, stop: signals.Signalled, progress: measure.Shown
) -> bool:
  inputs = measuring.inputs(of)
  todo = run.missing(of, measuring.wanted, inputs)  # since the look before the lease
  units = {one.NAME: one.units(inputs) for one in todo}
  done: dict[str, int] = {}
  progress.restart(f'{of.id} ({measuring.targets.index(of) + 1} of {len(measuring.targets)})', sum(units.values()))

  def update(one: Measure, at: int, _: int) -> None:
    done[one.NAME] = at
    progress.update(sum(done.values()), one.NAME)

  return run.run(of, todo, inputs, held, stop=stop, update=update)


def preview(measuring: Measuring) -> list[str]:
  """What is missing, by measure, and about how long it takes on this machine."""
  flops: dict[str, float] = {}
  cells: dict[str, int] = {}
  for of in measuring.targets:
    todo = measuring.missing(of)
    judged = run.judged(of) if todo else None
    for one in todo:
      assert judged is not None
      cells[one.NAME] = cells.get(one.NAME, 0) + 1
      flops[one.NAME] = flops.get(one.NAME, 0.0) + one.flops(judged, measuring.inputs(of))
  speed = _flops_per_s()
  lines = [
    f'{name}: {cells[name]} of {len(measuring.targets)} cells, {flops[name]:.2g} FLOPs, at least '
    f'{flops[name] / speed / 60:.1f} min' for name in cells
  ]  # fmt: skip
  return lines or [f'nothing to measure: {len(measuring.targets)} cells are done']


def _value(of: run.Target, key: str) -> str | None:
  """A value of a cell's config as config.json has it, strings without quotes; None where there is none."""
  section, _, name = key.partition('.')
  value = getattr(getattr(of.config, section, None), name, ...)
  return None if value is ... else value if isinstance(value, str) else json.dumps(value, default=str)


def _flops_per_s() -> float:
  """Of a matrix product on this machine."""
  a = jax.numpy.ones((_MATRIX, _MATRIX))
  product = jax.jit(lambda a: a @ a)
  product(a).block_until_ready()
  began = time.perf_counter()
  product(a).block_until_ready()
  return 2 * _MATRIX**3 / (time.perf_counter() - began)
