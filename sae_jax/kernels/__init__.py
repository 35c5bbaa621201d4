"""Sparse products by platform: loops on a CPU, Triton on an NVIDIA GPU, dense matmuls on a TPU. `sae_jax.sparse` chooses."""
