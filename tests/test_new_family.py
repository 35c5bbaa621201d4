"""A new family is one file and one case: a copy of the library gets both from the guide, and goes from a sweep to a report."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

ROOT = pathlib.Path(__file__).parents[1]
GRID = """
from experiments import tiny
from sweeps import grid
from tests import cells
EXPERIMENT = tiny
def sweep():
  return [cells.SHARED, cells.SHARED | {'sae.activation': 'log_relu', 'sae.k': 9, 'sae.k_aux': 0}]
"""
USE = """
import sys
from analysis import load_ledger, report
from sweeps import launch, work
import numpy as np
import sae_jax

def run(main, *argv):
  try:
    main([*argv])
  except SystemExit as end:
    assert end.code == 0, (argv, end.code)

run(launch.main, '--sweep=cells.py', '--ledger=ledger', '--workers=0')
run(work.main, '--ledger=ledger', '--group=1')
run(report.main, '--ledger=ledger', '--out=report', '--bootstrap=0')
table = load_ledger('ledger')
assert sorted(table['activation']) == ['log_relu', 'topk']
assert table['nmse'].between(0, 1, inclusive='neither').all() and table['l0'].between(0, 88, inclusive='neither').all()
made = sae_jax.load(f'ledger/cells/{table.set_index("activation")["id"]["log_relu"]}')
params = {name: np.asarray(value) for name, value in made.sae.params().items()}
x_BD = np.random.default_rng(0).standard_normal((9, 24), np.float32)
z_BK, idx_BK = made.encode(x_BD)
pre_BF = (x_BD - params['b_pre_D']) @ params['w_enc_FD'].T + params['b_enc_F']
np.testing.assert_allclose(z_BK, np.maximum(np.take_along_axis(pre_BF, np.asarray(idx_BK), 1), 0), atol=1e-5)
assert made.encode(x_BD, made.threshold_for(x_BD, 3))[0].shape[0] == 9
print(sae_jax.__file__, sys.modules['sae_jax.families.log_relu'].__file__)
"""


def test_a_family_is_one_file_and_one_case(tmp_path):
  shutil.copytree(ROOT / 'sae_jax', tmp_path / 'sae_jax', ignore=shutil.ignore_patterns('__pycache__'))
  for part in ('analysis', 'experiments', 'sweeps', 'tests'):
    (tmp_path / part).symlink_to(ROOT / part)
  guide = (ROOT / 'docs' / 'add_a_family.md').read_text()
  assert len(guide.splitlines()) <= 40
  named, file = re.search(r'```python\n *# (\S+)\n(.*?)```', guide, re.DOTALL).groups()
  (tmp_path / 'sae_jax' / 'families' / named).write_text(textwrap.dedent(file))
  case = textwrap.dedent(re.search(r"\n( +case 'log_relu':\n.*?)\n\n", guide, re.DOTALL)[1])
  family = tmp_path / 'sae_jax' / 'families' / 'family.py'
  code = family.read_text().replace('NAMES = (', "NAMES = ('log_relu',", 1)
  family.write_text(code.replace('  match name:', f'  match name:\n{textwrap.indent(case, "    ")}', 1))
  (tmp_path / 'cells.py').write_text(GRID)
  ran = subprocess.run(
    [sys.executable, '-c', USE],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(tmp_path), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr
  assert ran.stdout.splitlines()[-1].split() == [
    str(tmp_path / 'sae_jax' / path) for path in ('__init__.py', 'families/log_relu.py')
  ]
  page = (tmp_path / 'report' / 'index.html').read_text()
  assert 'log_relu' in page
