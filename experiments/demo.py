"""SmolLM2-135M, layer 12, State of the Union speeches: the cells of `make demo`.

python -m sae_jax.data.harvest --config=experiments/demo.py --out=runs/demo/store
python -m sae_jax.train --config=experiments/demo.py --workdir=runs/demo/one

The learning rate is c / sqrt(n / 2^14) with c = 1e-3, from sweeps/grids/demo_learning_rate.py (2026-11-24, two CPU
cores, 6.5 minutes), held-out NMSE at c = 5e-4, 1e-3, 2e-3:
  k=8:  n=256 .368 .362 .383   n=1,024 .316 .298 .310   n=4,096 .322 .279 .259
  k=64: n=256 .207 .200 .240   n=1,024 .172 .162 .162   n=4,096 .154 .140 .142
1e-3 is best or within 0.2 % in all but the largest, sparsest cell, where 2e-3 leaves 15 % of the latents dead.
One epoch is about 500 steps, so cells are compared at equal tokens and not at convergence.
"""

import ml_collections

from sae_jax import config


def get_config() -> ml_collections.ConfigDict:
  c = config.template()
  c.data.source = 'store'
  c.data.path = 'runs/demo/store'
  c.data.subject = 'smollm2-135m'
  c.data.site = 'resid_post.12'
  c.data.text = 'sotu'
  c.data.window_tokens = 128
  c.data.block_windows = 256
  c.data.store_tokens = 260_096  # 8 blocks of 256 windows of 127 tokens
  c.data.held_out_tokens = 16_256  # 128 windows
  c.data.normalize = 'center_unit'
  c.data.dtype = 'float16'
  c.sae.n_latents = 1024
  c.sae.k = 32
  c.recipe.learning_rate_at_16k = 1e-3
  c.train.batch_tokens = 512
  c.train.tokens = 260_096
  c.train.checkpoint_every = 250
  c.eval.tokens = 8192
  c.eval.per_decade = 4
  c.eval.batch_tokens = 4096
  return c
