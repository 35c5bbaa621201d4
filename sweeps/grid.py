"""A sweep is a printable list of flat overrides on one experiment, composed by pure functions.

product(param('sae.k', [4, 8]), zipped(param('sae.n_latents', [64, 128]), param('train.seed', [0, 1])))
"""

import dataclasses
import itertools
import pathlib
import types
from collections.abc import Iterable
from typing import Any

from sae_jax import cell, config
from sae_jax.errors import UserError

Overrides = dict[str, Any]
_SCALARS = (bool, int, float, str)


def param(name: str, values: Iterable[Any]) -> list[Overrides]:
  """One override a value. Raises `UserError` when there is no value: a product with it would be empty."""
  sweep = [{name: value} for value in values]
  if not sweep:
    raise UserError(f'param({name!r}) has no values; give at least one')
  return sweep


def merged(overrides: Iterable[Overrides]) -> Overrides:
  """The union of overrides. Raises `UserError` when a key is set twice, even to the same value."""
  union: Overrides = {}
  for part in overrides:
    for key, value in part.items():
      if key in union:
        raise UserError(f'{key} is set twice in one cell ({union[key]!r}, {value!r}); set it in one place')
      union[key] = value
  return union


def product(*sweeps: list[Overrides]) -> list[Overrides]:
  """Every combination, the last sweep varying fastest."""
  return [merged(parts) for parts in itertools.product(*sweeps)]


def zipped(*sweeps: list[Overrides]) -> list[Overrides]:
  """Sweeps that vary together. Raises `UserError` when their lengths differ."""
  lengths = [len(sweep) for sweep in sweeps]
  if len(set(lengths)) > 1:
    raise UserError(f'zipped sweeps have lengths {lengths}; make them equal, or use product')
  return [merged(parts) for parts in zip(*sweeps, strict=True)]


def chain(*sweeps: list[Overrides]) -> list[Overrides]:
  """One sweep after another. Cells that come out equal are dropped by `build`, which compares ids."""
  return list(itertools.chain(*sweeps))


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The cells of a grid file in its order; `dropped` counts those that were the same cell as an earlier one."""

  name: str
  experiment: str  # e.g. 'experiments/tiny.py'
  cells: tuple[tuple[Overrides, config.Cell], ...]
  dropped: int


def build(path: str) -> Sweep:
  """Reads a grid file (`EXPERIMENT`, an imported module; `sweep()`, a list of overrides) and resolves its cells.

  Raises `UserError` for a file that is not a grid, and for a cell whose configuration is not valid.
  """
  if not pathlib.Path(path).is_file() or pathlib.Path(path).suffix != '.py':
    raise UserError(f'no grid file at {path!r}; name a Python file such as sweeps/grids/tiny.py')
  grid = config.load_file(path, f'grid_{pathlib.Path(path).stem}')
  if not (isinstance(vars(grid).get('EXPERIMENT'), types.ModuleType) and callable(vars(grid).get('sweep'))):
    raise UserError(
      f'{path} defines no EXPERIMENT (an imported module of experiments/) or no sweep(); '
      'see sweeps/grids/tiny.py for the form'
    )
  listed = grid.sweep()
  if not (isinstance(listed, list) and listed and all(_is_overrides(item) for item in listed)):
    raise UserError(f'sweep() of {path} gave {str(listed)[:80]!r}; return a list of dicts such as grid.param makes')
  listed = [{key: cell.plain(value) for key, value in overrides.items()} for overrides in listed]
  base = config.of_file(grid.EXPERIMENT)
  flat = config.flatten(base.copy_and_resolve_references())
  cells: dict[str, tuple[Overrides, config.Cell]] = {}
  checked: set[tuple[str, type]] = set()
  for overrides in listed:
    # ml_collections takes most of the time of a large grid. It only looks at keys and types, so it is asked once for each.
    kinds = {(key, type(value)) for key, value in overrides.items()}
    try:
      if kinds <= checked:
        resolved = config.resolve_flat(flat | overrides)
      else:
        resolved = config.resolve(config.override(base, overrides))
        checked |= {(key, kind) for key, kind in kinds if kind in _SCALARS}
    except UserError as error:
      raise UserError(f'cell {overrides} of {path}: {error}') from None
    cells.setdefault(resolved.id, (overrides, resolved))
  return Sweep(
    name=pathlib.Path(path).stem,
    experiment=grid.EXPERIMENT.__name__.replace('.', '/') + '.py',
    cells=tuple(cells.values()),
    dropped=len(listed) - len(cells),
  )


def label(overrides: Overrides) -> str:
  """Overrides as people say them: 'n_latents=128 k=4'."""
  return ' '.join(f'{key.rsplit(".", 1)[-1]}={value}' for key, value in overrides.items())


def _is_overrides(item: Any) -> bool:
  return isinstance(item, dict) and all(isinstance(key, str) for key in item)
