"""`--config=FILE --config.sae.k=64` on a command line, with argparse for everything else."""

import argparse
import pathlib

import ml_collections
from absl import flags
from ml_collections import config_flags

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
  values, made = flags.FlagValues(), config.of_file(module)
  try:
    config_flags.DEFINE_config_dict('config', made, flag_values=values, sys_argv=overrides)
    values(['sae_jax', *overrides])
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f'{" ".join(overrides) or paths[0]}: {error}; the keys are in sae_jax/config.py') from None
  return args, values['config'].value


def _is_retired(argument: str) -> bool:
  """Whether `--config.KEY=VALUE` names a key that is gone. Raises `UserError` unless its value is the neutral one."""
  key, _, text = argument.removeprefix('--config.').partition('=')
  if key in cell.RETIRED and text != str(cell.RETIRED[key][0]):
    cell.without_retired({key: text})
  return key in cell.RETIRED
