"""Sparse products and top-k by platform; `sae_jax.sparse` and `sae_jax.topk` choose.

A CPU has kernels in C++ and loops, an NVIDIA GPU Triton, a TPU dense matmuls.
"""
