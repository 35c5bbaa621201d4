"""Sparse products as dense matmuls for TPUs, whose matrix unit outruns reads of single rows.

Codes are built from their indices, never from a threshold, so that ties keep exactly the selected entries. They are
built by a matmul as well: with f = 128 h + l, codes [B, H, 128] are the product over k of two one-hot arrays, which
XLA fuses into it. Latents go in chunks, so that [B, F] is never whole and each gradient row is written once.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sae_jax.kernels.loops import Slots, sum_dtype

_LANES = 128
_SCRATCH = 2**27  # numbers in a chunk of codes [B, chunk], or in an array [rows, K, 128]
_NARROWEST = 2048  # latents in a chunk, so that its matmul outweighs reading and writing the [B, D] sum
# Of a v5e chip. A v5p has 2.3 and 3.4 times as much, so that the rule holds for both.
_FLOPS = 197e12
_BYTES = 819e9
_ROW_SECONDS = 100e-9  # one row read by its index: assumed, not measured


def dense_from(n_latents: int, d_model: int, k: int) -> int:
  """Slots a token from which dense products should beat row reads: by counting, as no TPU has been timed.

  A dense product costs a token 2 n (d + k') FLOPs, where k' is k rounded up to 128 for the one-hot matmul, and 4 n
  bytes for its bfloat16 codes, written and read. A slot costs one row of 4 d bytes, and at least 100 ns. With d=768,
  k=32 that is 0.46 us at n=32,768, as much as 5 slots, and 15 us at n=1,048,576, as much as 147.
  """
  padded_k = -(-k // _LANES) * _LANES
  dense = n_latents * (2 * (d_model + padded_k) / _FLOPS + 4 / _BYTES)
  return int(dense / max(4 * d_model / _BYTES, _ROW_SECONDS)) + 1


def adds_densely(n_latents: int) -> bool:
  """Whether `add_at` beats a scatter: 12 n FLOPs a slot (six passes for float32) against one indexed write."""
  return 12 * n_latents / _FLOPS < _ROW_SECONDS


def decode(z_BK: jax.Array, idx_BK: jax.Array, w_FD: jax.Array, slots: Slots = None) -> jax.Array:
  """sum_k z[b, k] w[idx[b, k]]: [B, D]. Operands as `_operand` says, sums in float32 or wider."""
  del slots  # values from there on are 0, and a dense product saves nothing by it
  w_FD = _padded(w_FD)

  def add_chunk(chunk: _Chunk, x_BD: jax.Array) -> jax.Array:
    codes_BHL = _codes(chunk, idx_BK, z_BK, _operand(w_FD))
    return x_BD + jnp.einsum('bhl,hld->bd', codes_BHL, chunk.rows(w_FD), preferred_element_type=x_BD.dtype)

  zeros_BD = jnp.zeros((z_BK.shape[0], w_FD.shape[1]), sum_dtype(w_FD))
  return _over_latents(add_chunk, w_FD.shape[0], z_BK.shape[0], zeros_BD).astype(w_FD.dtype)


def code_gradient(idx_BK: jax.Array, w_FD: jax.Array, g_BD: jax.Array, slots: Slots = None) -> jax.Array:
  """<w[idx[b, k]], g[b]>: [B, K], rounded to the operands' type, which the weight gradients would do to it."""
  w_FD = _padded(w_FD)
  n_rows, k = idx_BK.shape
  rows = min(n_rows, max(1, _SCRATCH // (k * _LANES)))

  def some_rows(i: jax.Array, dz_BK: jax.Array) -> jax.Array:
    # The last block overlaps the one before it and computes those rows again.
    first = jnp.minimum(i * rows, n_rows - rows)
    idx_RK, g_RD = (jax.lax.dynamic_slice_in_dim(a, first, rows) for a in (idx_BK, g_BD))

    def add_chunk(chunk: _Chunk, dz_RK: jax.Array) -> jax.Array:
      high_RKH, low_RKL = _one_hots(chunk, idx_RK)
      p_RHL = jnp.einsum(
        'bd,hld->bhl', g_RD.astype(_operand(w_FD)), chunk.rows(w_FD), preferred_element_type=sum_dtype(w_FD)
      )
      p_RKL = jnp.einsum(
        'bkh,bhl->bkl',
        high_RKH.astype(_operand(w_FD)),
        p_RHL.astype(_operand(w_FD)),
        preferred_element_type=sum_dtype(w_FD),
      )
      return dz_RK + jnp.sum(jnp.where(low_RKL, p_RKL, 0), axis=-1)

    zeros_RK = jnp.zeros(idx_RK.shape, sum_dtype(w_FD))
    dz_RK = _over_latents(add_chunk, w_FD.shape[0], rows, zeros_RK)
    return jax.lax.dynamic_update_slice_in_dim(dz_BK, dz_RK.astype(dz_BK.dtype), first, axis=0)

  dz_BK = jax.lax.fori_loop(0, -(-n_rows // rows), some_rows, jnp.zeros(idx_BK.shape, g_BD.dtype))
  return dz_BK if slots is None else jnp.where(jnp.arange(k)[None] < slots, dz_BK, 0)


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
  del slots
  return _add_product(dw_enc_FD, idx_BK, dz_BK, x_BD), _add_product(dw_dec_FD, idx_BK, z_BK, g_BD)


def add_at(total_F: jax.Array, idx_BK: jax.Array, values_BK: jax.Array) -> jax.Array:
  """Adds values to the entries their indices name: one product of two one-hot arrays, in full precision."""
  wide = sum_dtype(total_F)
  n_high = -(-total_F.size // _LANES)
  idx_P, values_P = idx_BK.reshape(-1), values_BK.reshape(-1).astype(wide)
  high_PH = (idx_P // _LANES)[:, None] == jnp.arange(n_high)[None]
  low_PL = (idx_P % _LANES)[:, None] == jnp.arange(_LANES)[None]
  sums_HL = jnp.einsum('ph,pl->hl', high_PH.astype(wide), jnp.where(low_PL, values_P[:, None], 0), precision='highest')
  return (total_F.astype(wide) + sums_HL.reshape(-1)[: total_F.size]).astype(total_F.dtype)


class _Chunk:
  """Latents first .. first + width, of which those before `done` are another chunk's."""

  def __init__(self, first: int | jax.Array, done: int | jax.Array, width: int):
    self.first, self.done, self.width = first, done, width

  def rows(self, w_FD: jax.Array) -> jax.Array:
    """Rows of a weight [H, 128, D], cast for the matrix unit."""
    w_HLD = jax.lax.dynamic_slice_in_dim(w_FD, self.first, self.width).reshape(-1, _LANES, w_FD.shape[1])
    return w_HLD.astype(_operand(w_FD))


def _over_latents(
  add_chunk: Callable[[_Chunk, jax.Array], jax.Array], n_latents: int, n_rows: int, start: jax.Array
) -> jax.Array:
  """Folds add_chunk(chunk, carry) over chunks of whole lanes. The last overlaps the one before it."""
  narrow = max(_NARROWEST, _SCRATCH // n_rows)
  even = -(-n_latents // -(-n_latents // narrow))
  width = min(-(-even // _LANES), n_latents // _LANES) * _LANES
  count = -(-n_latents // width)
  if count == 1:
    return add_chunk(_Chunk(0, 0, width), start)

  def step(i: jax.Array, carry: jax.Array) -> jax.Array:
    return add_chunk(_Chunk(jnp.minimum(i * width, n_latents - width), i * width, width), carry)

  return jax.lax.fori_loop(0, count, step, start)


def _one_hots(chunk: _Chunk, idx_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Masks [B, K, H] and [B, K, 128] whose product marks each index; empty for an index outside the chunk."""
  local_BK = jnp.where(idx_BK >= chunk.done, idx_BK - chunk.first, -1)
  high_BKH = (local_BK // _LANES)[:, :, None] == jnp.arange(chunk.width // _LANES)[None, None]
  low_BKL = (local_BK % _LANES)[:, :, None] == jnp.arange(_LANES)[None, None]
  return high_BKH, low_BKL


def _codes(chunk: _Chunk, idx_BK: jax.Array, z_BK: jax.Array, dtype: DTypeLike) -> jax.Array:
  high_BKH, low_BKL = _one_hots(chunk, idx_BK)
  z_BKL = jnp.where(low_BKL, z_BK[:, :, None], 0).astype(dtype)
  return jnp.einsum('bkh,bkl->bhl', high_BKH.astype(dtype), z_BKL, preferred_element_type=dtype)


def _add_product(dw_FD: jax.Array, idx_BK: jax.Array, z_BK: jax.Array, x_BD: jax.Array) -> jax.Array:
  padded_FD = _padded(dw_FD)
  dtype, wide = _operand(dw_FD), sum_dtype(dw_FD)

  def add_chunk(chunk: _Chunk, dw_FD: jax.Array) -> jax.Array:
    codes_BHL = _codes(chunk, idx_BK, z_BK, dtype)
    dw_HLD = jnp.einsum('bhl,bd->hld', codes_BHL, x_BD.astype(dtype), preferred_element_type=wide)
    old_WD = jax.lax.dynamic_slice_in_dim(dw_FD, chunk.first, chunk.width)
    new_WD = (old_WD.astype(wide) + dw_HLD.reshape(old_WD.shape)).astype(old_WD.dtype)
    return jax.lax.dynamic_update_slice_in_dim(dw_FD, new_WD, chunk.first, axis=0)

  return _over_latents(add_chunk, padded_FD.shape[0], z_BK.shape[0], padded_FD)[: dw_FD.shape[0]]


def _padded(w_FD: jax.Array) -> jax.Array:
  """At least one lane's worth of latents; no index names the added ones."""
  return jnp.pad(w_FD, ((0, max(0, _LANES - w_FD.shape[0])), (0, 0)))


def _operand(w: jax.Array) -> jnp.dtype:
  """What the matrix unit is fed: bfloat16, its own default for float32, unless `jax_default_matmul_precision` is set."""
  if jax.config.jax_default_matmul_precision in (None, 'default', 'fastest', 'bfloat16'):
    return jnp.dtype(jnp.bfloat16)
  return w.dtype
