"""bfloat16 matmul inputs: the selection still reads float32, and the final NMSE does not drift."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from experiments import tiny
from sae_jax import config, sae
from sae_jax import train as training

STEPS = 120


def cell(**overrides) -> config.Config:
  small = {
    'sae.n_latents': 61, 'sae.d_model': 13, 'sae.k': 3, 'train.batch_tokens': 64, 'train.tokens': STEPS * 64,
    'train.checkpoint_every': STEPS, 'eval.tokens': 509, 'eval.batch_tokens': 509, 'data.planted.n_features': 31,
  }  # fmt: skip
  return config.resolve(config.override(tiny.get_config(), small | overrides))


def test_bfloat16_inputs_do_not_move_the_final_nmse(tmp_path):
  nmse = {}
  for dtype in ('float32', 'bfloat16'):
    training.train(cell(**{'train.compute_dtype': dtype}), str(tmp_path / dtype))
    nmse[dtype] = json.loads((tmp_path / dtype / 'result.json').read_text())['nmse']
  start = json.loads((tmp_path / 'float32' / 'metrics.jsonl').read_text().splitlines()[0])['eval/nmse']
  gained = start - nmse['float32']
  assert gained > 0.1  # something was learnt that could have been lost
  assert abs(nmse['bfloat16'] - nmse['float32']) < 0.02 * gained
  assert nmse['bfloat16'] != nmse['float32']


def test_bfloat16_selection_reads_float32_products():
  params = sae.init_params(jax.random.key(0), jnp.zeros(13), cell().sae)
  x_BD = jax.random.normal(jax.random.key(1), (7, 13))
  product_BF, codes, _ = sae.encode(params, x_BD, 3, sae.Axes(), jnp.bfloat16)
  assert product_BF.dtype == codes.z_BK.dtype == jnp.float32
  rounded = np.asarray(product_BF.astype(jnp.bfloat16).astype(jnp.float32))
  assert (
    rounded != np.asarray(product_BF)
  ).mean() > 0.9  # accumulated in float32, not rounded to bfloat16 after
