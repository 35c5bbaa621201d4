"""What pip installs is the library alone, under its licence, and it works far from a checkout."""

import json
import pathlib
import subprocess
import sys
import sysconfig
import venv
import zipfile

from sae_jax.kernels import native

ROOT = pathlib.Path(__file__).parents[1]
# The folder of the dependencies is on the path of this process, and what the checkout adds to it is not.
USE = """
import importlib.util, json, sys
import numpy as np, sae_jax
absent = [name for name in ('sweeps', 'analysis', 'experiments', 'bench', 'tests') if importlib.util.find_spec(name)]
sae = sae_jax.load(sys.argv[1])
z, idx = sae.encode(np.ones((2, sae.info['d_model']), np.float32))
print(json.dumps({'file': sae_jax.__file__, 'absent': absent, 'shape': z.shape, 'k': sae.info['k']}))
"""


def test_wheel_installs_the_library_alone_and_loads_an_autoencoder(trained, tmp_path):
  build = [sys.executable, '-m', 'hatchling', 'build', '-t', 'wheel', '-d', str(tmp_path)]
  subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
  (wheel,) = tmp_path.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
    (facts,) = (name for name in names if name.endswith('.dist-info/METADATA'))
    metadata = archive.read(facts).decode()
  assert {name.split('/')[0].split('-')[0] for name in names} == {'sae_jax'}
  assert {f'sae_jax/kernels/{name}' for name in native._SOURCES} <= set(names)
  assert 'sae_jax/py.typed' in names  # without it editors take the types of an installed package for unknown
  assert 'License-Expression: Apache-2.0' in metadata and any(name.endswith('/LICENSE') for name in names)

  clean = tmp_path / 'clean'
  venv.create(clean, with_pip=False)
  python = clean / 'bin' / 'python'
  install = [
    sys.executable,
    '-m',
    'pip',
    '--python',
    str(python),
    'install',
    '--quiet',
    '--no-deps',
    '--no-index',
  ]
  subprocess.run([*install, str(wheel)], check=True, capture_output=True)
  (site,) = clean.glob('lib/python*/site-packages')
  (site / 'dependencies.pth').write_text(sysconfig.get_paths()['purelib'])
  cell = next(trained.glob('cells/*'))
  ran = subprocess.run([python, '-c', USE, cell], cwd=tmp_path, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr
  found = json.loads(ran.stdout)
  assert pathlib.Path(found['file']).is_relative_to(clean) and found['absent'] == []
  assert found['shape'] == [2, found['k']]
