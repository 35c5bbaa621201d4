"""`--config=FILE --config.sae.k=64` on a command line, with argparse for everything else."""

import argparse

import ml_collections
from absl import flags
from ml_collections import config_flags

from sae_jax.errors import UserError

HELP = 'python file with get_config() -> ConfigDict; override any key with --config.KEY=VALUE'


def parse(
  parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, ml_collections.ConfigDict]:
  """Known arguments and the configuration. Raises `UserError` for an unknown key, a wrong type or no such file."""
  parser.add_argument(
    '--config', metavar='FILE', help=HELP
  )  # for --help and for a missing flag; parsed below
  config_args = [a for a in argv if a.startswith('--config')]
  for i, arg in enumerate(argv):
    if arg == '--config' or (arg.startswith('--config.') and '=' not in arg):
      raise UserError(f'{" ".join(argv[i : i + 2])!r}: write {arg}=VALUE')
  args = parser.parse_args([a for a in argv if not a.startswith('--config')])
  if not any(a.startswith('--config=') for a in config_args):
    raise UserError('no --config=FILE given; for a first try use --config=experiments/tiny.py')
  values = flags.FlagValues()
  config_flags.DEFINE_config_file('config', flag_values=values, lock_config=True)
  try:
    values(['sae_jax', *config_args])
    return args, values['config'].value
  except UserError:
    raise
  except FileNotFoundError as error:
    raise UserError(f'no such configuration file ({error}); see experiments/') from None
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
    raise UserError(f'{" ".join(config_args)}: {error}; the keys are in sae_jax/config.py') from None
