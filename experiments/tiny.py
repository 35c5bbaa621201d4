"""A planted dictionary recovered in seconds on one CPU: for tests and first tries.

python -m sae_jax.train --config=experiments/tiny.py --workdir=runs/tiny
"""

import ml_collections

from sae_jax import config


def get_config() -> ml_collections.ConfigDict:
  c = config.template()
  c.sae.d_model = 32
  c.sae.n_latents = 128
  c.sae.k = 4
  c.data.source = 'planted'
  c.data.planted = dict(n_features=64, active=3.0, exponent=0.5, noise=0.05, seed=0)
  c.recipe.learning_rate_at_16k = 3e-4
  c.train.batch_tokens = 256
  c.train.tokens = 256 * 200
  c.train.checkpoint_every = 50
  c.eval.tokens = 2048
  c.eval.batch_tokens = 1024
  return c
