"""Sparse products as loops: over the k slots (decode, code gradient), and over the rows (weight gradients).

Weight gradients loop over slots too where their number is bounded. The path of any platform without one of its own. On a CPU decode and weight gradients have kernels in C++, and these loops say
in which order they add. An einsum over a gather [B, K, D] would take many times as long.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Slots = jax.Array | None  # may be traced: a loop bound


def decode(z_BK: jax.Array, idx_BK: jax.Array, w_FD: jax.Array, slots: Slots = None) -> jax.Array:
  """sum_k z[b, k] w[idx[b, k]]: reconstruction [B, D]."""

  def add_slot(j: jax.Array, x_BD: jax.Array) -> jax.Array:
    return x_BD + z_BK[:, j, None].astype(x_BD.dtype) * w_FD[idx_BK[:, j]].astype(x_BD.dtype)

  zeros_BD = jnp.zeros((z_BK.shape[0], w_FD.shape[1]), sum_dtype(w_FD))
  return jax.lax.fori_loop(0, _count(z_BK, slots), add_slot, zeros_BD).astype(w_FD.dtype)


def code_gradient(idx_BK: jax.Array, w_FD: jax.Array, g_BD: jax.Array, slots: Slots = None) -> jax.Array:
  """<w[idx[b, k]], g[b]>: gradient [B, K] of the codes for reconstruction gradient g."""

  def slot(j: jax.Array, dz_KB: jax.Array) -> jax.Array:
    products_BD = w_FD[idx_BK[:, j]].astype(sum_dtype(w_FD)) * g_BD.astype(sum_dtype(w_FD))
    return dz_KB.at[j].set(jnp.sum(products_BD, axis=-1).astype(g_BD.dtype))

  zeros_KB = jnp.zeros(idx_BK.shape[::-1], g_BD.dtype)
  return jax.lax.fori_loop(0, _count(idx_BK, slots), slot, zeros_KB).T


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
  dtype = dw_dec_FD.dtype
  totals = (dw_enc_FD.astype(sum_dtype(dw_enc_FD)), dw_dec_FD.astype(sum_dtype(dw_dec_FD)))
  dz_BK, x_BD, z_BK, g_BD = (a.astype(sum_dtype(dw_dec_FD)) for a in (dz_BK, x_BD, z_BK, g_BD))

  if slots is None:
    # Row by row, x[b] and g[b] stay in the nearest cache.
    def add_row(values_BK: jax.Array, rows_BD: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
      return lambda b, total_FD: total_FD.at[idx_BK[b]].add(values_BK[b][:, None] * rows_BD[b][None])

    n_rows = idx_BK.shape[0]
    enc_FD = jax.lax.fori_loop(0, n_rows, add_row(dz_BK, x_BD), totals[0])
    dec_FD = jax.lax.fori_loop(0, n_rows, add_row(z_BK, g_BD), totals[1])
    return enc_FD.astype(dtype), dec_FD.astype(dtype)

  def add_slot(j: jax.Array, grads: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    dw_enc, dw_dec = grads
    rows_B = idx_BK[:, j]
    return dw_enc.at[rows_B].add(dz_BK[:, j, None] * x_BD), dw_dec.at[rows_B].add(z_BK[:, j, None] * g_BD)

  enc_FD, dec_FD = jax.lax.fori_loop(0, slots, add_slot, totals)
  return enc_FD.astype(dtype), dec_FD.astype(dtype)


def add_at(total_F: jax.Array, idx_BK: jax.Array, values_BK: jax.Array) -> jax.Array:
  """Adds values [B, K] to the entries of total [F] that their indices name."""
  total = total_F.astype(sum_dtype(total_F)).at[idx_BK].add(values_BK.astype(sum_dtype(total_F)))
  return total.astype(total_F.dtype)


def sum_dtype(w: jax.Array) -> jnp.dtype:
  """The type to sum in: float32, or float64 for such weights."""
  return jnp.promote_types(w.dtype, jnp.float32)


def _count(codes_BK: jax.Array, slots: Slots) -> int | jax.Array:
  return codes_BK.shape[1] if slots is None else slots
