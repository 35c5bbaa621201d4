"""The public names are seen: by a notebook that completes them, and with their types by what checks types."""

import pathlib
import subprocess
import sys

import pytest

import analysis
import analysis.plots
import sae_jax

ROOT = pathlib.Path(__file__).parents[1]
NAMES = (
  *(f'sae_jax.{name}' for name in sae_jax.__all__),
  *(f'analysis.{name}' for name in analysis.__all__),
  *(f'analysis.plots.{name}' for name in analysis.plots.__all__),
)
# A line for every name, then what people write, then a name that is none.
USE = """
from typing import reveal_type
import pandas as pd
import analysis, sae_jax
{}
reveal_type(sae_jax.load('cell'))
reveal_type(sae_jax.load('cell').encode)
reveal_type(analysis.fit_law(pd.DataFrame()))
reveal_type(analysis.load_ledger('ledger'))
analysis.fit_lwa
"""


@pytest.mark.parametrize('module', ['sae_jax', 'analysis'])
def test_dir_lists_every_public_name_and_imports_nothing(module):
  code = (
    f'import sys, {module} as m; lacking = set(m.__all__) - set(dir(m)); '
    'heavy = {"jax", "pandas", "scipy", "matplotlib", "jinja2"} & set(sys.modules); '
    'sys.exit(str(lacking | heavy) if lacking | heavy else 0)'
  )
  ran = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize('module', [sae_jax, analysis])
def test_every_name_that_dir_lists_is_there(module):
  for name in dir(module):
    assert getattr(module, name) is not None
  assert (pathlib.Path(module.__file__).parent / 'py.typed').exists()


def test_a_type_checker_sees_every_public_name(tmp_path):
  path = tmp_path / 'use.py'
  path.write_text(USE.format('\n'.join(f'reveal_type({name})' for name in NAMES)))
  checker = [str(pathlib.Path(sys.executable).parent / 'pyrefly'), 'check', '--preset', 'default']
  options = [
    '--search-path',
    str(ROOT),
    '--python-interpreter-path',
    sys.executable,
    '--output-format',
    'min-text',
  ]
  ran = subprocess.run([*checker, *options, str(path)], cwd=tmp_path, capture_output=True, text=True)
  said = ran.stdout + ran.stderr
  found = [line.partition('revealed type: ')[2] for line in said.splitlines() if 'reveal-type' in line]
  assert len(found) == len(NAMES) + 4, said
  for name, kind in zip(NAMES, found, strict=False):
    assert 'Unknown' not in kind and 'Any' not in kind.rpartition('->')[2], (
      f'{name} is {kind}: import it where TYPE_CHECKING'
    )
  load, encode, fit, table = found[len(NAMES) :]
  assert load.startswith('Autoencoder ') and fit.startswith('Fit ') and table.startswith('DataFrame '), said
  assert 'tuple[' in encode and 'Array' in encode, said
  errors = [line for line in said.splitlines() if line.startswith('ERROR')]
  assert len(errors) == 1 and 'fit_lwa' in errors[0], said
