"""bfloat16 matmul inputs: the selection still reads float32, and the final NMSE does not drift."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import config, sae, training
from sae_jax.axes import Shard
from tests import cells

STEPS = 120


def cell(**overrides) -> config.Cell:
  longer = {'train.tokens': STEPS * cells.cell().train.batch_tokens, 'train.checkpoint_every': STEPS}
  return cells.cell(**longer | overrides)


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
  params = sae.init_params(jax.random.key(0), jnp.zeros(cell().sae.d_model), cell().sae)
  x_BD = jax.random.normal(jax.random.key(1), (7, cell().sae.d_model))
  product_BF, codes, _ = sae.encode(params, x_BD, cell().sae, Shard(dtype=jnp.bfloat16))
  assert product_BF.dtype == codes.z_BK.dtype == jnp.float32
  rounded = np.asarray(product_BF.astype(jnp.bfloat16).astype(jnp.float32))
  assert (rounded != np.asarray(product_BF)).mean() > 0.9  # accumulated in float32, not rounded to bfloat16 after
