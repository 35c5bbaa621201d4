"""argparse types for numbers with a rule; a broken rule is a `UserError` of one line that names the flag."""

import math
from collections.abc import Callable

from sae_jax.errors import UserError


def whole(flag: str, least: int = 1) -> Callable[[str], int]:
  """For `add_argument(flag, type=whole(flag))`: a whole number of at least `least`."""

  def parse(text: str) -> int:
    value = whole_or_none(text, least)
    if value is None:
      raise UserError(f'{flag}={text} is not a whole number of at least {least}; give e.g. {max(least, 2)}')
    return value

  return parse


def positive(flag: str, example: str) -> Callable[[str], float]:
  """For `add_argument(flag, type=positive(flag, '1e12'))`: a finite number above zero."""

  def parse(text: str) -> float:
    value = positive_or_none(text)
    if value is None:
      raise UserError(f'{flag}={text} is not a positive number; give e.g. {example}')
    return value

  return parse


def shape(text: str) -> tuple[int, ...]:
  """For `add_argument('--shape', type=shape)`: D,N,B,K as four positive numbers."""
  parts = text.split(',')
  if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
    raise UserError(f'--shape={text} is not D,N,B,K; e.g. --shape=512,8192,2048,32')
  return tuple(int(part) for part in parts)


def whole_or_none(text: str | int, least: int) -> int | None:
  """A whole number of at least `least`; None for anything else."""
  try:
    value = int(text)
  except ValueError:
    return None
  return value if value >= least else None


def positive_or_none(text: str) -> float | None:
  """A finite number above zero; None for anything else."""
  try:
    value = float(text)
  except ValueError:
    return None
  return value if 0 < value < math.inf else None
