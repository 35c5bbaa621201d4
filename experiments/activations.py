"""SmolLM2-135M, layer 12: the cells that compare activation functions.

python -m sae_jax.data.harvest --config=experiments/activations.py --out=runs/activations/store
python -m sae_jax.train --config=experiments/activations.py --workdir=runs/activations/one

All is as in the demo but for twice its tokens, each seen once. The environment variable RUNS names another folder than
runs/activations. Each family has its own recipe, and sweeps/grids/activations.py gives it to its cells.
"""

import dataclasses
import os

import ml_collections

from experiments import demo
from sae_jax import recipe


def get_config() -> ml_collections.ConfigDict:
  c = demo.get_config()
  c.recipe = dataclasses.asdict(recipe.TOPK)
  c.data.path = os.environ.get('RUNS', 'runs/activations') + '/store'
  c.data.store_tokens = 520_192  # 16 blocks of 256 windows of 127 tokens
  c.train.tokens = 520_192
  return c
