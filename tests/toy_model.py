"""Weights for models that are small enough to be computed by hand."""

import numpy as np

from sae_jax.subjects import llama


def llama_params(arch: llama.Arch, seed: int, scale: float, n_blocks: int | None = None) -> dict:
  """Random parameters of a Llama, those of fewer blocks with the same numbers."""
  rng = np.random.default_rng(seed)
  block, rest = llama.tensors(arch)

  def drawn(shapes: dict) -> dict:
    return {name: rng.standard_normal(shape).astype(np.float32) * scale for name, shape in shapes.items()}

  params = llama.rest_params(arch, drawn(rest))
  blocks = [llama.block_params(arch, drawn(block)) for _ in range(arch.n_layers)][:n_blocks]
  return params | {'blocks': {key: np.stack([one[key] for one in blocks]) for key in blocks[0]}}
