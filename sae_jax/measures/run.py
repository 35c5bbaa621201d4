"""Measures one autoencoder: what is missing or stale, unit by unit, under a lease of its own."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from sae_jax import artifact, cell_state, config, files, form, lease, product, schema
from sae_jax.errors import UserError
from sae_jax.measures import Scope, results
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged, Measure, Unit
from sae_jax.measures.names import VERSIONS


@dataclasses.dataclass(frozen=True)
class Target:
  """A finished cell that is to be measured.

  Attributes:
    folder: of the cell.
    config: how it was trained.
    info: its sae.json.
    weights: 'raw' or 'ema'.
  """

  folder: str
  config: config.Cell
  info: dict[str, Any]
  weights: str

  @property
  def id(self) -> str:
    return self.config.id

  @property
  def tensors(self) -> str:
    return (self.info.get('sha256') or {}).get(self.weights, '')


def target(folder: str, weights: str | None = None) -> Target:
  """The cell in a folder. `weights` None takes those that training found better.

  Raises `UserError` for a folder without a finished cell, and for one whose files cannot be believed.
  """
  shown = cell_state.printable(folder)
  try:
    cell = config.from_record(schema.parse(files.read(files.join(folder, schema.CONFIG))))
    state = cell_state.read(folder, cell.id)
    if state.state not in schema.FINISHED:
      reason = f' ({state.reason})' if state.reason else ''
      raise UserError(f'{shown} is {state.state}{reason}; measures need a finished cell')
    info = product.info(folder)
  except FileNotFoundError as error:
    what = str(error.filename or '').rpartition('/')[2]
    raise UserError(f'{shown} has no {what or "autoencoder"}; measures need a finished cell') from None
  except (schema.Broken, OSError) as error:
    raise UserError(
      f'{shown} cannot be believed ({product.why(error)[:120]}); python -m sweeps.retry mends it'
    ) from None
  return Target(folder, cell, info, weights or _weights(info))


def _weights(info: dict[str, Any]) -> str:
  """Those that training found better."""
  return info.get('weights') or 'raw'


def judged(of: Target) -> Judged:
  """The autoencoder itself."""
  loaded = artifact.load(of.folder, of.weights)
  other = 'raw' if of.weights == 'ema' else 'ema'
  try:
    others = artifact.load(of.folder, other).sae.params()
  except UserError:
    others = None  # an imported one has a single set
  return Judged(of.id, form.of(loaded.sae.size, loaded.info), loaded.sae.params(), of.tensors, of.weights, others)


def key(measure: Measure, of: Target, inputs: Inputs) -> results.Key:
  assert dataclasses.is_dataclass(measure)
  settings = dataclasses.asdict(measure)
  return results.Key(measure.NAME, VERSIONS[measure.NAME], settings, of.tensors, of.weights, inputs.identity)


def missing(of: Target, wanted: Sequence[Measure], inputs: Inputs) -> list[Measure]:
  """The measures that have no value of this autoencoder, these settings and these inputs, or lack lines of their units."""
  found = _read(of)

  def lacks(measure: Measure) -> bool:
    if measure.NAME not in found or found[measure.NAME].key != (this := key(measure, of, inputs)):
      return True
    return not results.is_whole(of.folder, this, measure.units(inputs))

  return [measure for measure in wanted if lacks(measure)]


def run(
  of: Target,
  wanted: Sequence[Measure],
  inputs: Inputs,
  held: lease.Lease | None,
  *,
  stop: Callable[[], bool] = lambda: False,
  update: Callable[[Measure, int, int], None] = lambda measure, done, units: None,
) -> bool:
  """Measures what is missing of `wanted`; False when `stop` became true before the end.

  Args:
    of: the cell.
    wanted: measures.
    inputs: what it is measured on.
    held: the lease of the cell's measures. Nothing is written once it is lost.
    stop: asked before every unit.
    update: hears after each unit: the measure, how many units are done, and how many there are.

  Raises:
    LeaseLost: another worker took over.
    UserError: what `Measure.run` refuses.
  """
  todo = missing(of, wanted, inputs)
  if todo and _settled(of, todo, held):
    todo = missing(of, wanted, inputs)
  the = functools.cache(lambda: judged(of))
  for measure in todo:
    this = key(measure, of, inputs)
    lines, n = results.Lines(of.folder, this), measure.units(inputs)
    for unit in range(len(lines.records), n):
      update(measure, unit, n)
      if stop():
        return False
      found = measure.run(unit, the(), inputs)
      if held is not None:
        held.check(fresh=True)
      lines.add(found.record | _saved(of, lines.stem, unit, found.arrays))
    update(measure, n, n)
    units = [Unit(record, _arrays(of, this, i, record)) for i, record in enumerate(lines.records)]
    values = {name: dataclasses.asdict(value) for name, value in measure.values(units).items()}
    for name, value in values.items():
      if not np.isfinite(value['value']) or not np.isfinite(value['se'] or 0.0):
        raise UserError(f'{of.id}: {measure.NAME}/{name}={value["value"]} is not a finite number; measure more windows')
    if held is not None:
      held.check(fresh=True)
    lines.complete()
    results.write(of.folder, of.id, _read(of) | {measure.NAME: results.Result(this, values)})
    if held is not None:
      held.check(fresh=True)
    results.settle(of.folder, this)
  return True


class Finished(NamedTuple):
  """A measure that was taken: its units in order, its settings, and a digest of all that decides them."""

  units: list[Unit]
  settings: dict[str, Any]
  digest: str


def finished(of: Target, name: str, inputs: Inputs) -> Finished | None:
  """What a measure found; None where it was not taken.

  Raises `UserError` for what is of other weights, another autoencoder, another version or other inputs, and for broken
  files.
  """
  if (result := _read(of).get(name)) is None:
    return None
  again, weights = command(of, name, inputs), cell_state.printable(result.key.weights)
  why = result.stale(of.tensors)
  if result.key.weights != of.weights:
    why = f'of the {weights} weights; give --weights={weights}'
  elif not why and result.key.inputs != inputs.identity:
    why = 'of other windows; give --windows and --train_windows as they were'
  if why:
    raise UserError(f'{name} of {of.id} is {why}; or take it again: {again}')
  units = [Unit(record, _arrays(of, result.key, i, record)) for i, record in enumerate(records(of, result))]
  return Finished(units, result.key.settings, result.key.digest)


def records(of: Target, result: results.Result) -> list[dict[str, Any]]:
  """`results.records`. Raises `UserError` for lines that are not there, or not those of the result."""
  name = result.key.name
  try:
    return results.records(of.folder, result)
  except (schema.Broken, OSError) as error:
    raise UserError(
      f'{name} of {of.id} cannot be believed ({cell_state.printable(str(error))[:120]}); take it again: '
      f'{_again(of, name)}'
    ) from None


def command(of: Target, name: str, inputs: Inputs) -> str:
  """What takes a measure of these weights on these inputs."""
  said = _again(of, name)
  for flag, stream, usual in (('windows', 'held_out', Scope.held_out), ('train_windows', 'train', Scope.train)):
    if inputs.count(stream) != usual:
      said += f' --{flag}={inputs.count(stream)}'
  return said


def inputs_of(of: Target, scope: Scope, folder: str) -> Inputs:
  """What a cell is measured on."""
  return Inputs(of.config.data, scope, folder, of.info, of.id)


def inputs_folder(cell: str) -> str:
  """Where the inputs of a cell's ledger are kept; a cell that stands alone keeps its own."""
  folder = str(files.local(cell)) if files.is_local(cell) else cell.rstrip('/')
  cells, _, _ = folder.rpartition('/')
  ledger, _, name = cells.rpartition('/')
  if name == schema.CELLS and files.exists(files.join(ledger, schema.SWEEP)):
    return files.join(ledger, schema.MEASURES)
  return files.join(folder, schema.MEASURES, 'inputs')


def group(of: Target, scope: Scope) -> tuple[Any, ...]:
  """Equal for cells that share their inputs, without making these."""
  data = of.config.data
  facts = tuple(of.info.get(name) for name in ('subject_sha256', 'text_sha256'))
  stream = (data.subject, data.weights, data.site, data.text, data.window_tokens, data.positions)
  return (*stream, data.store_tokens, data.held_out_tokens, data.seed, *facts, scope)


def _read(of: Target) -> dict[str, results.Result]:
  try:
    return results.read(of.folder, of.id)
  except (schema.Broken, OSError) as error:
    path = cell_state.printable(results.path(of.folder, schema.MEASURES_INFO))
    raise UserError(
      f'{path} cannot be believed ({cell_state.printable(str(error))[:120]}); delete it: lines are kept'
    ) from None


def _again(of: Target, name: str) -> str:
  weights = f' --weights={of.weights}' if of.weights != _weights(of.info) else ''
  return f'python -m sae_jax.measure --cell={cell_state.printable(of.folder)} --measures={name}{weights}'


def _settled(of: Target, wanted: Sequence[Measure], held: lease.Lease | None) -> bool:
  """Whether a process was killed when it had finished one of some measures, and left names to be given."""
  found, left = _read(of), False
  for measure in wanted:
    result = found.get(measure.NAME)
    if result is not None and not results.is_settled(of.folder, result.key):
      if held is not None:
        held.check(fresh=True)
      results.settle(of.folder, result.key)
      left = True
  return left


def _saved(of: Target, stem: str, unit: int, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
  """Writes the arrays of a unit; their digest for its record."""
  if not arrays:
    return {}
  data = safetensors.numpy.save({key: np.asarray(a, order='C') for key, a in arrays.items()})
  return results.save_arrays(of.folder, stem, unit, data)


def _arrays(of: Target, key: results.Key, unit: int, record: dict[str, Any]) -> dict[str, np.ndarray]:
  """The arrays of a unit. Raises `UserError` for others than its record says."""
  try:
    data = results.arrays(of.folder, key, unit, record)
    return safetensors.numpy.load(data) if data else {}
  except (schema.Broken, OSError, safetensors.SafetensorError) as error:
    raise UserError(
      f'{key.name} of {of.id} cannot be believed ({cell_state.printable(str(error))[:120]}); delete its '
      f'{key.name}.jsonl and take it again: {_again(of, key.name)}'
    ) from None
