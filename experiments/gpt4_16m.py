"""Sixteen million latents, the paper's largest autoencoder, for a pod that need not be here.

python -m sae_jax.plan --config=experiments/gpt4_16m.py --topology=v5p:8x8x8 --json=runs/gpt4_16m.json

GPT-4's width is not public: d = 8,192 stands in, and planted inputs for its activations. n = 2^24, k = 256, batches of
131,072, AuxK 4,096, an EMA and 40 billion tokens are the paper's.
"""

import ml_collections

from sae_jax import config


def get_config() -> ml_collections.ConfigDict:
  c = config.template()
  c.sae.d_model = 8192
  c.sae.n_latents = 2**24
  c.sae.k = 256
  c.sae.k_aux = 4096
  c.data.source = 'planted'
  c.train.batch_tokens = 131_072
  c.train.tokens = 40_000_000_000
  c.train.compute_dtype = 'bfloat16'  # matmul inputs; sums, gradients and state are float32
  c.mesh.data = 4
  c.mesh.latent = 128
  c.mesh.row_chunks = 16
  return c
