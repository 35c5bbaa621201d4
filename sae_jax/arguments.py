"""argparse types for numbers with a rule; a broken rule is a `UserError` of one line that names the flag."""

import math
from collections.abc import Callable

from sae_jax.errors import UserError


def whole(flag: str, least: int = 1) -> Callable[[str], int]:
  """For `add_argument(flag, type=whole(flag))`: a whole number of at least `least`."""

  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      value = least - 1
    if value < least:
      raise UserError(f'{flag}={text} is not a whole number of at least {least}; give e.g. {max(least, 2)}')
    return value

  return parse


def positive(flag: str, example: str) -> Callable[[str], float]:
  """For `add_argument(flag, type=positive(flag, '1e12'))`: a finite number above zero."""

  def parse(text: str) -> float:
    try:
      value = float(text)
    except ValueError:
      value = math.nan
    if not 0 < value < math.inf:
      raise UserError(f'{flag}={text} is not a positive number; give e.g. {example}')
    return value

  return parse
