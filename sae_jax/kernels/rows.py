"""Sparse products on a CPU of codes whose rows use far fewer slots than there are: loops over rows, some slots at a time.

A row that its own slots pass over stays in the nearest cache. Blocks of slots that no row uses are not looked at, so that
a code may have room for a rare crowded row.
"""

import jax
import jax.numpy as jnp

from sae_jax.kernels import loops
from sae_jax.kernels.loops import Slots, sum_dtype

BLOCK = 32  # slots passed over together
# Gradients of codes are made of more slots, and of some rows at once: XLA takes longer for many small products.
_WIDE_BLOCK, _ROWS = 96, 16


def code_gradient(idx_BK: jax.Array, w_FD: jax.Array, g_BD: jax.Array, slots: Slots = None) -> jax.Array:
  """<w[idx[b, k]], g[b]>: gradient [B, K] of the codes for reconstruction gradient g; 0 in blocks from `slots` on."""
  if idx_BK.shape[1] <= BLOCK:
    return loops.code_gradient(idx_BK, w_FD, g_BD, slots)
  block, wide = min(_WIDE_BLOCK, idx_BK.shape[1]), sum_dtype(w_FD)
  idx_CBk = _blocks(idx_BK, block)

  def add_block(i: jax.Array, dz_CBk: jax.Array) -> jax.Array:
    pairs = idx_CBk[i], g_BD
    dz_Bk = jax.lax.map(lambda row: w_FD[row[0]].astype(wide) @ row[1].astype(wide), pairs, batch_size=_ROWS)
    return dz_CBk.at[i].set(dz_Bk.astype(g_BD.dtype))

  dz_CBk = jax.lax.fori_loop(0, _count(idx_BK, slots, block), add_block, jnp.zeros(idx_CBk.shape, g_BD.dtype))
  return dz_CBk.swapaxes(0, 1).reshape(len(idx_BK), -1)[:, : idx_BK.shape[1]]


def add_weight_gradients(
  dw_enc_FD: jax.Array,
  dw_dec_FD: jax.Array,
  idx_BK: jax.Array,
  dz_BK: jax.Array,
  x_BD: jax.Array,
  z_BK: jax.Array,
  g_BD: jax.Array,
  slots: Slots = None,
) -> tuple[jax.Array, jax.Array]:
  """Adds sum_b dz[b, k] x[b] to row idx[b, k] of the first and sum_b z[b, k] g[b] to that of the second."""
  idx_CBk = _blocks(idx_BK, BLOCK)

  def added(dw_FD: jax.Array, values_BK: jax.Array, rows_BD: jax.Array) -> jax.Array:
    wide = sum_dtype(dw_FD)
    values_CBk, rows_BD = _blocks(values_BK.astype(wide), BLOCK), rows_BD.astype(wide)

    def add_block(i: jax.Array, total_FD: jax.Array) -> jax.Array:
      idx_Bk, values_Bk = idx_CBk[i], values_CBk[i]

      def add_row(b: jax.Array, total_FD: jax.Array) -> jax.Array:
        return total_FD.at[idx_Bk[b]].add(values_Bk[b][:, None] * rows_BD[b][None])

      return jax.lax.fori_loop(0, len(idx_Bk), add_row, total_FD)

    return jax.lax.fori_loop(0, _count(idx_BK, slots, BLOCK), add_block, dw_FD.astype(wide)).astype(dw_FD.dtype)

  return added(dw_enc_FD, dz_BK, x_BD), added(dw_dec_FD, z_BK, g_BD)


def _blocks(a_BK: jax.Array, block: int) -> jax.Array:
  """[C, B, block]: blocks of slots, the last filled up with zeros."""
  a_BK = jnp.pad(a_BK, ((0, 0), (0, -a_BK.shape[1] % block)))
  return a_BK.reshape(len(a_BK), -1, block).swapaxes(0, 1)


def _count(codes_BK: jax.Array, slots: Slots, block: int) -> int | jax.Array:
  """Of blocks."""
  return -(-(codes_BK.shape[1] if slots is None else slots) // block)
