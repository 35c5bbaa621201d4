"""Real workers on one ledger of a real, tiny language model: killed with -9 inside every measure, they end with the same bytes."""

import hashlib
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from sae_jax import config, schema, training
from sae_jax.data import harvest
from sae_jax.measures import names
from sweeps import grid, ledger
from tests import cells

ROOT = pathlib.Path(__file__).parents[1]
FAMILIES = ('topk', 'relu', 'gated')
COMMAND = (
  *('-m', 'sweeps.measure', '--windows=40', '--train_windows=48', '--pad= the', '--suffix=3'),
  f'--measures={",".join(names.VERSIONS)}',
)

pytestmark = pytest.mark.chaos  # for its length


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A ledger of three families, trained for some steps on a store of a tiny Llama."""
  folder = tmp_path_factory.mktemp('tiny')
  shutil.copytree(ROOT / 'tests' / 'subjects' / 'llama', folder / 'model')
  (folder / 'texts').mkdir()
  words = np.random.default_rng(0).choice(['the', 'sea', 'wall', 'and', 'In 1912', 'boat,', 'by.'], (30, 500))
  for i, row in enumerate(words):
    (folder / 'texts' / f'{i}.txt').write_text(' '.join(row))
  c = config.template()
  flat = {
    'data.source': 'store',
    'data.path': str(folder / 'store'),
    'data.subject': str(folder / 'model'),
    'data.site': 'resid_post.0',
    'data.text': str(folder / 'texts'),
    'data.window_tokens': 32,
    'data.block_windows': 32,
    'data.store_tokens': 6200,
    'data.held_out_tokens': 1240,
    'sae.n_latents': 64,
    'train.batch_tokens': 64,
    'train.tokens': 2560,
    'train.checkpoint_every': 100,
    'eval.tokens': 620,
    'eval.batch_tokens': 128,
  }
  asked = config.override(c, flat)
  harvest.harvest(asked, str(folder / 'store'), progress=False)
  store, made = ledger.Ledger(str(folder / 'ledger')), []
  for name in FAMILIES:
    own = cells.family_keys(name)
    own = own | {'sae.k': 4} if own.get('sae.k', 4) else own
    made.append((own, config.resolve(config.override(asked, own))))
  store.register(grid.Sweep('measured', 'tiny.py', tuple(made), dropped=0))
  for _, cell in made:
    assert training.train(cell, store.folder(cell.id)) == 'done'
  return folder / 'ledger'


def start(where: pathlib.Path) -> subprocess.Popen:
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT)}
  return subprocess.Popen(
    [sys.executable, *COMMAND, f'--ledger={where}'], env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True
  )


def ended(worker: subprocess.Popen) -> None:
  _, said = worker.communicate(timeout=500)
  assert worker.returncode == 0, said


def lines(where: pathlib.Path) -> int:
  return sum(path.read_bytes().count(b'\n') for path in where.glob('cells/*/measures/*.jsonl'))


def tree(where: pathlib.Path) -> dict[str, str]:
  """The digest of every file of the measures and their inputs but the leases.

  A worker that dies while it writes leaves a file under a temporary name, which nobody reads. What is in the bank is
  compared by `bank`: who comes first decides in which file a token is.
  """
  return {
    str(path.relative_to(where)): hashlib.sha256(path.read_bytes()).hexdigest()
    for path in sorted(where.rglob('*'))
    if path.is_file()
    and path.suffix != '.tmp'
    and not re.search(r'bank-[0-9a-f]{16}/([0-9]|plans)', str(path))
    and schema.MEASURES in path.parts
    and not {schema.CLAIMS, 'compile_cache'} & set(path.parts)
  }


def bank(where: pathlib.Path) -> dict[int, bytes]:
  """What is kept of each token of the bank. Fails for a token that is there twice."""
  (folder,) = where.glob('measures/bank-*')
  found = {}
  for plan in sorted(folder.glob('plans/*.json')):
    places = schema.parse_large(plan.read_bytes())['places']
    parts = [safetensors.numpy.load_file(path)['x_PRD'] for path in sorted(folder.glob(f'{plan.stem}.*/*.safetensors'))]
    x_PRD = np.concatenate(parts)
    assert len(x_PRD) == len(places) and not found.keys() & set(places)
    found |= {place: x_RD.tobytes() for place, x_RD in zip(places, x_PRD, strict=True)}
  return found


def test_two_workers_killed_inside_every_measure_end_with_the_same_bytes(trained, tmp_path):
  whole, shared = tmp_path / 'whole', tmp_path / 'shared'
  for where in (whole, shared):
    shutil.copytree(trained, where)
  ended(start(whole))
  total, rng, kills = lines(whole), random.Random(0), 0
  # A worker dies each time that some more lines are there: in inputs, between units, while a value is written.
  for share in (0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85):
    workers = [start(shared), start(shared)]
    while lines(shared) < share * total and all(worker.poll() is None for worker in workers):
      time.sleep(0.02)
    time.sleep(rng.uniform(0.0, 0.2) if share else 6.0)
    for worker in workers:
      kills += worker.poll() is None
      worker.kill()
      worker.communicate()
  for worker in [start(shared), start(shared)]:
    ended(worker)
  assert kills >= 8
  assert tree(shared) == tree(whole)
  assert bank(shared) == bank(whole) and len(bank(whole)) > 400
  measured = {path.parent.parent.name for path in shared.glob('cells/*/measures/measures.json')}
  assert len(measured) == len(FAMILIES) and set(names.USUAL) <= {
    path.stem for path in shared.glob('cells/*/measures/*.jsonl')
  }
