"""A new model family is one new file and one case: a copy of the library gets both, harvests from it and trains."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import safetensors.numpy
import tokenizers

from tests import cells

ROOT = pathlib.Path(__file__).parents[1]
D, BLOCKS = cells.SHARED['sae.d_model'], 2
TOKENS = ['<start>', *'abcdefghijklmnopqrstuvwxyz', 'ab']
FAMILY = """
import dataclasses

import jax.numpy as jnp

from sae_jax.subjects.subject import Names, Tensors

NAMES = Names(prefixes=('',), block='blk.{}.', embedding='words', tied=True)


@dataclasses.dataclass(frozen=True)
class Arch:
  n_layers: int
  context: int
  d_model: int
  vocabulary: int


def arch_of(settings):
  return Arch(*(settings.whole(key) for key in ('depth', 'longest', 'width', 'vocab_size')))


def tensors(arch):
  return Tensors({'turn': (arch.d_model, arch.d_model)}, {'words': (arch.vocabulary, arch.d_model)})


def block_params(arch, w):
  return w


def rest_params(arch, w):
  return {'embedding': w['words']}


def widths(arch):
  return dict.fromkeys(('resid_pre', 'mlp_out', 'resid_post'), arch.d_model)


def costs(arch):
  whole = (arch.d_model**2, False)
  return {'resid_pre': (0, False), 'mlp_out': whole, 'resid_post': whole}


def reach(arch):
  return (None,) * arch.n_layers


def embed(arch, params, ids_BT, positions_T):
  return params['embedding'][ids_BT]


def block(arch, p, x_BTD, layer, positions_T, attend, tap):
  x_BTD = tap('resid_pre', x_BTD)
  return tap('resid_post', x_BTD + tap('mlp_out', jnp.tanh(x_BTD @ p['turn'])))


def unembed(arch, params, x_BTD):
  return x_BTD @ params['embedding'].T
"""
CASE = """
    case 'mills':
      from sae_jax.subjects import mills as family
"""
USE = """
import json, sys
import numpy as np
from sae_jax import config, subjects, training
from sae_jax.data import harvest
from sae_jax.subjects import text
from experiments import tiny

model, out, changes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
letters = np.random.default_rng(0).choice(list('abcdefghij'), (40, 100))
text.load = lambda name: [(str(i), ''.join(row)) for i, row in enumerate(letters)]
data = {'data.subject': model, 'data.site': 'mlp_out.1', 'data.text': 'letters', 'data.window_tokens': 12}
data |= {'data.block_windows': 16, 'data.store_tokens': 840, 'data.held_out_tokens': 101, 'data.dtype': 'float32'}
asked = config.override(tiny.get_config(), data | changes)
assert harvest.harvest(asked, f'{out}/store', progress=False)
assert training.train(config.resolve(config.override(asked, {'data.source': 'store', 'data.path': f'{out}/store'})), f'{out}/cell')
subject = subjects.load(model)
ids_BT = np.arange(12).reshape(2, 6)
x_BTD = subject.residual(ids_BT, 'mlp_out.1')
ce_BT, kl_BT = subject.next_token(x_BTD, ids_BT, 'mlp_out.1')
print(json.dumps({'file': subject.family.__file__, 'kl': float(abs(kl_BT).max()), 'x': x_BTD.tolist()}))
"""


def write_model(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Random weights and one token a letter."""
  rng = np.random.default_rng(1)
  tensors = {f'blk.{i}.turn': rng.standard_normal((D, D), np.float32) for i in range(BLOCKS)}
  tensors['words'] = rng.standard_normal((len(TOKENS), D), np.float32)
  path.mkdir()
  sizes = {'depth': BLOCKS, 'longest': 16, 'width': D, 'vocab_size': len(TOKENS), 'bos_token_id': 0}
  (path / 'config.json').write_text(json.dumps({'model_type': 'mills'} | sizes))
  safetensors.numpy.save_file(tensors, path / 'model.safetensors')
  vocabulary = {token: i for i, token in enumerate(TOKENS)}
  tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [('a', 'b')])).save(str(path / 'tokenizer.json'))
  return tensors


def test_a_family_is_one_file_and_one_case(tmp_path):
  shutil.copytree(ROOT / 'sae_jax', tmp_path / 'sae_jax', ignore=shutil.ignore_patterns('__pycache__'))
  (tmp_path / 'experiments').symlink_to(ROOT / 'experiments')
  folder = tmp_path / 'sae_jax' / 'subjects'
  (folder / 'mills.py').write_text(FAMILY)
  before, match, after = (folder / '__init__.py').read_text().partition('  match files.settings.kind:')
  (folder / '__init__.py').write_text(before + match + CASE.rstrip('\n') + after)
  tensors = write_model(tmp_path / 'mills')
  changes = {key: value for key, value in cells.SHARED.items() if not key.startswith('data.')}
  ran = subprocess.run(
    [sys.executable, '-c', USE, tmp_path / 'mills', tmp_path, json.dumps(changes)],
    cwd=tmp_path,
    env=os.environ | {'PYTHONPATH': str(tmp_path), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert ran.returncode == 0, ran.stderr
  found = json.loads(ran.stdout)
  assert found['file'] == str(folder / 'mills.py') and found['kl'] == 0
  x_BTD = tensors['words'][np.arange(12).reshape(2, 6)].astype(np.float64)
  x_BTD = x_BTD + np.tanh(x_BTD @ tensors['blk.0.turn'])
  np.testing.assert_allclose(found['x'], np.tanh(x_BTD @ tensors['blk.1.turn']), atol=1e-4)
  result = json.loads((tmp_path / 'cell' / 'result.json').read_text())
  assert result['d_model'] == D and 0 < result['nmse'] < 1
  assert result['flops_subject'] == 2 * BLOCKS * D**2 * 12 / 11 * result['tokens']
  meta = json.loads((tmp_path / 'store' / 'store.json').read_text())
  assert meta['config']['site'] == 'mlp_out.1' and meta['provenance']['subject_file'] == 'mills'
