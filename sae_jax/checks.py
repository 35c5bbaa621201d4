"""What a caller handed over, checked before anything is computed from it; a broken rule is a `UserError` of one line.

Each line has the value, the rule and the remedy. A truth value is no number here, and a text is no list.
"""

import math
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from sae_jax.errors import UserError


def shown(value: Any, most: int = 60) -> str:
  """A value on one short line, whatever it is."""
  if isinstance(value, np.generic):
    value = value.item()
  if value is None or isinstance(value, bool | int | float | complex | str | bytes | pathlib.PurePath):
    text = repr(str(value)) if isinstance(value, pathlib.PurePath) else _short(value, most)
  elif isinstance(value, list | tuple | dict | set | frozenset):
    text = f'{type(value).__name__} of {len(value)}'
  else:  # the words of a table or an array are many lines
    text = f'{type(value).__module__.partition(".")[0]}.{type(value).__name__}'
  text = ' '.join(text.split())
  return text if len(text) <= most else text[: most - 1] + '…'


def path(name: str, value: Any) -> str:
  """A path or URL as text. An empty one would silently mean the folder one happens to be in."""
  if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str) or not str(value).strip():
    raise UserError(f'{name}={shown(value)} is not a path; give a file, folder or URL as text, or a pathlib.Path')
  return str(value)


def text(name: str, value: Any, remedy: str) -> str:
  """A text that is not empty."""
  if not isinstance(value, str) or not value.strip():
    raise UserError(f'{name}={shown(value)} is not a text; {remedy}')
  return value


def texts(name: str, value: Any, example: str, *, least: int = 1) -> tuple[str, ...]:
  """At least `least` texts, in a list or tuple."""
  if isinstance(value, str) or not isinstance(value, Sequence) or len(value) < least:
    raise UserError(f'{name}={shown(value)} is not a list of names; write {example}')
  for one in value:
    text(f'an entry of {name}', one, f'write {example}')
  return tuple(value)


def truth(name: str, value: Any) -> bool:
  """True or False; a number or a text would count as one of them without a word."""
  if not isinstance(value, bool | np.bool_):
    raise UserError(f'{name}={shown(value)} is not a truth value; give True or False')
  return bool(value)


def whole(name: str, value: Any, least: int, most: int, remedy: str) -> int:
  """A whole number in least..most, of Python or numpy."""
  if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
    raise UserError(f'{name}={shown(value)} is not a whole number in {least}..{most}; {remedy}')
  return int(value)


def seed(value: Any) -> int:
  """Of numpy's generators, which take no negative number."""
  return whole('seed', value, 0, 2**63 - 1, 'give e.g. 0')


def number(
  name: str,
  value: Any,
  rule: str,
  remedy: str,
  *,
  least: float = -math.inf,
  above: float = -math.inf,
  below: float = math.inf,
) -> float:
  """A finite number of at least `least`, strictly between the other two; `rule` says that in words."""
  real = not isinstance(value, bool | np.bool_) and isinstance(value, int | float | np.integer | np.floating)
  try:
    found = float(value) if real else math.nan
  except OverflowError:  # a whole number with hundreds of digits
    found = math.inf
  if not (math.isfinite(found) and found >= least and above < found < below):
    raise UserError(f'{name}={shown(value)} is not {rule}; {remedy}')
  return found


def positive(name: str, value: Any, remedy: str) -> float:
  """A finite number above 0."""
  return number(name, value, 'a positive number', remedy, above=0)


def numbers(name: str, value: Any, remedy: str) -> list[float]:
  """Positive numbers, each once; none of them is fine."""
  if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray) or not np.iterable(value):
    raise UserError(f'{name}={shown(value)} is not a list of numbers; {remedy}')
  found = [positive(name, one, remedy) for one in value]
  if twice := {one for one in found if found.count(one) > 1}:
    raise UserError(f'{name} holds {min(twice):g} twice; {remedy}')
  return found


def _short(value: Any, most: int) -> str:
  if isinstance(value, str | bytes):
    return repr(value[:most])
  if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**most:
    return f'a number of more than {most} digits'  # Python refuses to write out the longest
  return repr(value)
