"""Command lines: `--config=FILE --config.sae.k=64` is read by ml_collections, everything else by argparse.

Also argparse types for numbers with a rule. A broken rule is a `UserError` of one line that names the flag.
"""

import argparse
import math
import pathlib
from collections.abc import Callable

import absl.flags
import ml_collections
import ml_collections.config_flags

from sae_jax import cell, config
from sae_jax.errors import UserError

HELP = 'python file with get_config() -> ConfigDict; override any key with --config.KEY=VALUE'


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
  """Known arguments and the configuration. Raises `UserError` for an unknown key, a wrong type or no such file."""
  parser.add_argument('--config', metavar='FILE', help=HELP)  # for --help; the values are ml_collections' to read
  ours = [a for a in argv if not a.startswith('--config')]
  theirs = [a for a in argv if a.startswith('--config')]
  for arg in theirs:
    if '=' not in arg:
      raise UserError(f'{arg} has no value; write {arg}=VALUE')
  args = parser.parse_args(ours)
  paths = [a.removeprefix('--config=') for a in theirs if a.startswith('--config=')]
  if len(paths) != 1:
    raise UserError(f'{len(paths)} --config=FILE given; give one, for a first try --config=experiments/tiny.py')
  if not pathlib.Path(paths[0]).is_file():
    raise UserError(f'{paths[0]} is not a file; see experiments/ and sweeps/grids/')
  module = config.load_file(paths[0], pathlib.Path(paths[0]).stem)
  if not hasattr(module, 'get_config'):
    raise UserError(f'{paths[0]} has no get_config(); see experiments/tiny.py')
  overrides = [a for a in theirs if not a.startswith('--config=') and not _is_retired(a)]
  # ml_collections reads a number or nothing as a number.
  unset = {a.removeprefix('--config.').removesuffix('=None') for a in overrides if a.endswith('=None')}
  overrides = [a for a in overrides if not a.endswith('=None')]
  values, made = absl.flags.FlagValues(), config.of_file(module)
  try:
    ml_collections.config_flags.DEFINE_config_dict('config', made, flag_values=values, sys_argv=overrides)
    values(['sae_jax', *overrides])
  except (absl.flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f'{" ".join(overrides) or paths[0]}: {error}; the keys are in sae_jax/config.py') from None
  return args, config.override(values['config'].value, dict.fromkeys(unset))


def _is_retired(argument: str) -> bool:
  """Whether `--config.KEY=VALUE` names a key that is gone. Raises `UserError` when its value is not the neutral one."""
  key, _, text = argument.removeprefix('--config.').partition('=')
  if key in cell.RETIRED and text != str(cell.RETIRED[key][0]):
    cell.without_retired({key: text})
  return key in cell.RETIRED


def whole(flag: str, least: int = 1) -> Callable[[str | int], int]:
  """For `add_argument(flag, type=whole(flag))`: a whole number of at least `least`."""

  def parse(text: str | int) -> int:
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
      value = 0.0
    if not 0 < value < math.inf:
      raise UserError(f'{flag}={text} is not a positive number; give e.g. {example}')
    return value

  return parse


def shape(text: str) -> tuple[int, ...]:
  """For `add_argument('--shape', type=shape)`: D,N,B,K as four positive numbers."""
  parts = text.split(',')
  if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
    raise UserError(f'--shape={text} is not D,N,B,K; e.g. --shape=512,8192,2048,32')
  return tuple(int(part) for part in parts)
