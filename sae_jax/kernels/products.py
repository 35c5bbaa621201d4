"""Products with k-sparse codes on a CPU, by kernels in C++ (products.cc).

They add in the order of `loops` and `rows`, so that every bit of a run of finite numbers stays as it is without them, but for
the sign of a sum that underflows to 0. They take float32 alone, and are there where `native.available` says so. The gradient of
codes is not among them: XLA sums it in an order of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.kernels.loops import Slots


def decode(z_BK: jax.Array, idx_BK: jax.Array, w_FD: jax.Array, slots: Slots = None) -> jax.Array:
  """sum_k z[b, k] w[idx[b, k]]: reconstruction [B, D]."""
  made = jax.ShapeDtypeStruct((len(z_BK), w_FD.shape[1]), w_FD.dtype)
  call = jax.ffi.ffi_call('sae_jax_decode', made, vmap_method='sequential')
  return call(z_BK, idx_BK, w_FD, _used(idx_BK, slots))


def add_weight_gradients(
  dw_enc_FD: jax.Array,
  dw_dec_FD: jax.Array,
  idx_BK: jax.Array,
  dz_BK: jax.Array,
  x_BD: jax.Array,
  z_BK: jax.Array,
  g_BD: jax.Array,
  slots: Slots = None,
  *,
  together: int,
) -> tuple[jax.Array, jax.Array]:
  """Adds sum_b dz[b, k] x[b] to row idx[b, k] of the first and sum_b z[b, k] g[b] to that of the second.

  A block of so many slots is added for all tokens before the next one.
  """
  made = tuple(jax.ShapeDtypeStruct(dw_FD.shape, dw_FD.dtype) for dw_FD in (dw_enc_FD, dw_dec_FD))
  call = jax.ffi.ffi_call(
    'sae_jax_add_weight_gradients', made, input_output_aliases={0: 0, 1: 1}, vmap_method='sequential'
  )
  args = (dw_enc_FD, dw_dec_FD, idx_BK, dz_BK, x_BD, z_BK, g_BD, _used(idx_BK, slots))
  return call(*args, together=np.int64(together))


def _used(idx_BK: jax.Array, slots: Slots) -> jax.Array:
  return jnp.asarray(idx_BK.shape[1] if slots is None else slots, jnp.int32)
