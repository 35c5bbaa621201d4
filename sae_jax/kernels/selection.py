"""The columns of the k largest of each row on a CPU, by a kernel in C++ (selection.cc).

XLA's own top-k sorts on one core. The kernel finds the same columns in the same order, so that every bit of a run stays
as it is without it.
"""

import jax
import jax.numpy as jnp


def columns(product_BF: jax.Array, bias_F: jax.Array, k: int) -> jax.Array:
  """Indices [B, k] of the k largest of each row of product + bias, descending, as `jax.lax.top_k` orders them.

  On a CPU, in float32, and where `native.available` says so. No gradient goes through.
  """
  made = jax.ShapeDtypeStruct((product_BF.shape[0], k), jnp.int32)
  call = jax.ffi.ffi_call('sae_jax_columns', made, vmap_method='sequential')
  return call(jax.lax.stop_gradient(product_BF), jax.lax.stop_gradient(bias_F))
