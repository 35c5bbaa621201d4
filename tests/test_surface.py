"""Every public name answers bad input with one line that names it: never with another traceback, never with a number.

The names are walked, so a new one fails until `CALLS` in tests/surface.py says how it is called, and a new parameter
until `BAD` there says what it must refuse. Each call is made once for every bad value of every parameter, the others good.
"""

import importlib
import inspect
import pathlib
import pkgutil
import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

import analysis
import sae_jax
from analysis import (
  allocation,
  compare,
  convergence,
  family,
  fit_result,
  frontier,
  isoflop,
  learning_rate,
  plots,
  predict,
  read_ledger,
  table,
)
from sae_jax import artifact, autoencoder, checks
from sae_jax.errors import UserError
from tests import planted_ledger
from tests.surface import BAD, CALLS, LEDGER, OTHER, SLOW, Table

# What notebooks call beside the package itself. Classes stand for their methods.
MODULES = (allocation, convergence, family, frontier, isoflop, learning_rate, plots, predict, read_ledger, table)
CLASSES = (artifact.Autoencoder, autoencoder.SAE, fit_result.Fit)
# Given by code of this project alone, from its own arrays and words.
NOT_INPUT = ('table.warning', 'Fit.derived', 'Fit.redrawn', 'Fit.warned', 'Fit.words')


@pytest.fixture(scope='module')
def ledger(tmp_path_factory):
  return planted_ledger.write(tmp_path_factory.mktemp('surface'), sizes=(64, 128, 256, 512), ks=(3, 7))


def public() -> dict[str, Callable[..., Any]]:
  """Every public function, and every method of what they return, by a name that is unique."""
  found: dict[str, Callable[..., Any]] = {'compare.Comparison': compare.Comparison}
  for package in (sae_jax, analysis):
    for name in package.__all__:
      if not isinstance(getattr(package, name), types.ModuleType):
        found[f'{package.__name__}.{name}'] = getattr(package, name)
  for module in MODULES:
    short = module.__name__.rpartition('.')[2]
    for name, value in vars(module).items():
      listed = name in getattr(module, '__all__', ()) or getattr(value, '__module__', '') == module.__name__
      if listed and inspect.isfunction(value) and name[0] != '_' and value not in found.values():
        found[f'{short}.{name}'] = value
  for owner in CLASSES:
    for name, value in vars(owner).items():
      if inspect.isfunction(value) and name[0] != '_' and len(inspect.signature(value).parameters) > 1:
        found[f'{owner.__name__}.{name}'] = value
  return {name: value for name, value in found.items() if name not in NOT_INPUT and not name.endswith('.main')}


PUBLIC = public()


def test_every_public_name_says_how_it_is_called():
  missing = sorted(set(PUBLIC) - set(CALLS))
  assert not missing, f'add to CALLS in tests/surface.py a good call of {", ".join(missing)}'
  assert set(CALLS) <= set(PUBLIC), f'these are no public names: {sorted(set(CALLS) - set(PUBLIC))}'


def test_no_module_hides_a_public_function():
  """Importing `analysis.x` puts a module where `analysis.x` was a function, had both the name."""
  for module in pkgutil.walk_packages(analysis.__path__, 'analysis.'):
    if '.notebooks' not in module.name:
      importlib.import_module(module.name)
  for name in set(analysis.__all__) - {'plots'}:
    assert inspect.isfunction(getattr(analysis, name)), name


def test_notebooks_call_nothing_that_is_not_walked():
  walked = {module.__name__.rpartition('.')[2] for module in MODULES} | {'compare'}
  for path in (pathlib.Path(analysis.__file__).parent / 'notebooks').glob('*.py'):
    for line in re.findall(r'^from analysis import (.*)$', path.read_text(), re.MULTILINE):
      assert set(line.split(', ')) <= walked, f'{path.name}: add the modules it imports to MODULES'


def bad(name: str, parameter: str, good: Any) -> list[Any]:
  owner = name.partition('.')[0]
  if isinstance(good, Table):
    return good.broken()
  kinds = [key for key in (f'{name}.{parameter}', f'{owner}.{parameter}', parameter) if key in BAD]
  assert kinds, f'add to BAD in tests/surface.py what the parameter {parameter} of {name} must refuse'
  return [*BAD[kinds[0]], *(other() for key, other in OTHER.items() if key == f'{name}.{parameter}')]


def plain(value: Any) -> Any:
  return value.frame if isinstance(value, Table) else value


def is_named(value: Any, message: str) -> bool:
  """Whether a reader finds a plain value, a word of it, or what is inside it, in the message."""
  if isinstance(value, dict):
    return any(is_named(one, message) for pair in value.items() for one in pair)
  if isinstance(value, list):
    return checks.shown(value) in message or any(is_named(one, message) for one in value)
  if isinstance(value, str):
    return any(word in message for word in re.findall(r'[\w.]+', value) or [value])
  if isinstance(value, fit_result.Fit):
    return value.y in message
  return checks.shown(value) in message or (isinstance(value, float) and f'{value:g}' in message)


def faults(call: Callable[..., Any], good: dict[str, Any], parameter: str, value: Any) -> str:
  """What is wrong with the answer to one bad value; empty when nothing is."""
  try:
    result = call(**{key: plain(one) for key, one in (good | {parameter: value}).items()})
  except UserError as error:
    message = str(error)
    if '\n' in message or len(message) > 600 or len(message) < 20:
      return f'is not one line: {message!r}'
    if isinstance(value, str | int | float | list | dict | None) and value not in ('', ' ', [], {}):
      return '' if is_named(value, message) else f'does not name the value: {message!r}'
    return ''
  except Exception as error:  # the fault that this test is about
    return f'ends with a traceback of {type(error).__name__}: {str(error)[:120]}'
  empty = hasattr(result, '__len__') and len(result) == 0
  return '' if empty else f'answers with {checks.shown(result)}'


@pytest.mark.parametrize('name', sorted(PUBLIC))
def test_bad_values_end_with_one_line_that_names_them(name, ledger):
  good = {key: ledger if value is LEDGER else value for key, value in CALLS[name]().items()}
  wrong = []
  for parameter in inspect.signature(PUBLIC[name]).parameters:
    if parameter == 'self':
      continue
    assert parameter in good, f'add to CALLS[{name!r}] a good value of {parameter}'
    for value in bad(name, parameter, good[parameter]):
      if value is None and good[parameter] is None:
        continue
      if fault := faults(PUBLIC[name], good, parameter, value):
        wrong.append(f'{parameter}={_describe(value, good[parameter])}: {fault}')
  assert not wrong, '\n'.join(wrong)


def _describe(value: Any, good: Any) -> str:
  if not isinstance(good, Table) or not isinstance(value, pd.DataFrame):
    return checks.shown(value) if not isinstance(value, np.ndarray) else f'{value.dtype} {value.shape}'
  changed = [
    f'{column}={value[column].iloc[:2].tolist()}'
    for column in value.columns.unique()
    if column not in good.frame or value[column].ndim > 1 or not value[column].equals(good.frame[column])
  ]
  return f'a table of {len(value)} with {changed}, without {[*good.frame.columns.difference(value.columns)]}'


@pytest.mark.parametrize('name', sorted(set(PUBLIC) - SLOW))
def test_good_values_are_taken(name, ledger):
  """Else a bad value could be refused for another one's sake."""
  PUBLIC[name](**{key: ledger if one is LEDGER else plain(one) for key, one in CALLS[name]().items()})
