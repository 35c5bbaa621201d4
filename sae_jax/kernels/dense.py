"""Sparse products as dense matmuls for TPUs, whose matrix unit outruns reads of single rows.

Codes are built from their indices, never from a threshold, so that ties keep exactly the selected entries. They are
built by a matmul as well: with f = 128 h + l, codes [B, H, 128] are the product over k of two one-hot arrays, which
XLA fuses into it. Tokens and latents go in chunks, so that [B, F] is never whole.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sae_jax.kernels.loops import Slots, sum_dtype

_LANES = 128
_SCRATCH = 2**27  # numbers in a chunk of codes [rows, chunk]
_CHUNK = _LANES * _LANES  # latents: both one-hot arrays are as wide as the matrix unit
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

  def of_rows(codes: tuple[jax.Array, jax.Array]) -> jax.Array:
    def add_chunk(chunk: _Chunk, x_RD: jax.Array) -> jax.Array:
      codes_RHL = _codes(chunk, *codes, _operand(w_FD))
      return x_RD + jnp.einsum('bhl,hld->bd', codes_RHL, chunk.rows(w_FD), preferred_element_type=x_RD.dtype)

    zeros_RD = jnp.zeros((len(codes[0]), w_FD.shape[1]), sum_dtype(w_FD))
    return _over_latents(add_chunk, len(w_FD), zeros_RD).astype(w_FD.dtype)

  x_CRD = jax.lax.map(of_rows, tuple(map(_in_rows, (idx_BK, z_BK))))
  return x_CRD.reshape(-1, w_FD.shape[1])[: len(z_BK)]


def code_gradient(idx_BK: jax.Array, w_FD: jax.Array, g_BD: jax.Array, slots: Slots = None) -> jax.Array:
  """<w[idx[b, k]], g[b]>: [B, K], rounded to the operands' type, which the weight gradients would do to it."""
  w_FD, k = _padded(w_FD), idx_BK.shape[1]
  dtype, wide = _operand(w_FD), sum_dtype(w_FD)

  def of_rows(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
    idx_RK, g_RD = rows

    def add_chunk(chunk: _Chunk, dz_RK: jax.Array) -> jax.Array:
      high_RHK, low_RLK = _one_hots(chunk, idx_RK)
      p_RHL = jnp.einsum('bd,hld->bhl', g_RD.astype(dtype), chunk.rows(w_FD), preferred_element_type=wide)
      p_RHK = jnp.einsum('blk,bhl->bhk', low_RLK.astype(dtype), p_RHL.astype(dtype), preferred_element_type=wide)
      return dz_RK + jnp.sum(jnp.where(high_RHK, p_RHK, 0), axis=1)

    return _over_latents(add_chunk, len(w_FD), jnp.zeros(idx_RK.shape, wide)).astype(g_BD.dtype)

  dz_CRK = jax.lax.map(of_rows, tuple(map(_in_rows, (idx_BK, g_BD))))
  dz_BK = dz_CRK.reshape(-1, k)[: len(idx_BK)]
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


def _over_latents(add_chunk: Callable[[_Chunk, jax.Array], jax.Array], n_latents: int, start: jax.Array) -> jax.Array:
  """Folds add_chunk(chunk, carry) over chunks of whole lanes. The last overlaps the one before it."""
  even = -(-n_latents // -(-n_latents // _CHUNK))
  width = min(-(-even // _LANES), n_latents // _LANES) * _LANES
  count = -(-n_latents // width)
  if count == 1:
    return add_chunk(_Chunk(0, 0, width), start)

  def step(i: jax.Array, carry: jax.Array) -> jax.Array:
    return add_chunk(_Chunk(jnp.minimum(i * width, n_latents - width), i * width, width), carry)

  return jax.lax.fori_loop(0, count, step, start)


def _one_hots(chunk: _Chunk, idx_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Masks [B, H, K] and [B, 128, K] whose product marks each index; empty for an index outside the chunk.

  Slots come last: the TPU's compiler estimates the product of such masks at up to a tenth of that of the others.
  """
  local_B1K = jnp.where(idx_BK >= chunk.done, idx_BK - chunk.first, -1)[:, None]
  high_BHK = local_B1K // _LANES == jnp.arange(chunk.width // _LANES)[None, :, None]
  low_BLK = local_B1K % _LANES == jnp.arange(_LANES)[None, :, None]
  return high_BHK, low_BLK


def _codes(chunk: _Chunk, idx_BK: jax.Array, z_BK: jax.Array, dtype: DTypeLike) -> jax.Array:
  high_BHK, low_BLK = _one_hots(chunk, idx_BK)
  z_BLK = jnp.where(low_BLK, z_BK[:, None], 0).astype(dtype)
  return jnp.einsum('bhk,blk->bhl', high_BHK.astype(dtype), z_BLK, preferred_element_type=dtype)


def _in_rows(a_BK: jax.Array) -> jax.Array:
  """[C, R, K]: tokens in chunks for which _CHUNK latents fit in the scratch, the last filled up with zeros."""
  count = -(-len(a_BK) * _CHUNK // _SCRATCH)
  rows = -(-len(a_BK) // count)
  return jnp.pad(a_BK, ((0, count * rows - len(a_BK)), (0, 0))).reshape(count, rows, -1)


def _add_product(dw_FD: jax.Array, idx_BK: jax.Array, z_BK: jax.Array, x_BD: jax.Array) -> jax.Array:
  dtype, wide = _operand(dw_FD), sum_dtype(dw_FD)

  def add_rows(dw_FD: jax.Array, rows: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
    idx_RK, z_RK, x_RD = rows

    def add_chunk(chunk: _Chunk, dw_FD: jax.Array) -> jax.Array:
      codes_RHL = _codes(chunk, idx_RK, z_RK, dtype)
      dw_HLD = jnp.einsum('bhl,bd->hld', codes_RHL, x_RD.astype(dtype), preferred_element_type=wide)
      old_WD = jax.lax.dynamic_slice_in_dim(dw_FD, chunk.first, chunk.width)
      new_WD = (old_WD.astype(wide) + dw_HLD.reshape(old_WD.shape)).astype(old_WD.dtype)
      return jax.lax.dynamic_update_slice_in_dim(dw_FD, new_WD, chunk.first, axis=0)

    return _over_latents(add_chunk, len(dw_FD), dw_FD), None

  added_FD, _ = jax.lax.scan(add_rows, _padded(dw_FD), tuple(map(_in_rows, (idx_BK, z_BK, x_BD))))
  return added_FD[: len(dw_FD)]


def _padded(w_FD: jax.Array) -> jax.Array:
  """At least one lane's worth of latents; no index names the added ones."""
  return jnp.pad(w_FD, ((0, max(0, _LANES - w_FD.shape[0])), (0, 0)))


def _operand(w: jax.Array) -> jnp.dtype:
  """What the matrix unit is fed: bfloat16, its own default for float32, unless `jax_default_matmul_precision` is set."""
  if jax.config.jax_default_matmul_precision in (None, 'default', 'fastest', 'bfloat16'):
    return jnp.dtype(jnp.bfloat16)
  return w.dtype
