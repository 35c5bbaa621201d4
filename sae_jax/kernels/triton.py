"""Sparse products as Pallas kernels in Triton, for NVIDIA GPUs.

No atomics: a weight gradient sorts the B K pairs (token, latent) by latent, and each latent's sum is taken by one
program in a fixed order, so that the same step gives the same bits. Sums are float32 or wider whatever the inputs
are. Slots of value 0 read no weights.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from sae_jax.kernels.loops import Slots, sum_dtype

_MAX_ELEMENTS = 2**31  # Pallas computes a Triton pointer's offset in int32
_RUN = 256  # values that one program of `add_at` sums at a time
_FEW = 32  # slots that are sorted alone when no others are in use

_Sums = tuple[jax.Array, jax.Array]  # of a block of columns, for the encoder and the decoder


def fits(batch: int, n_latents: int, d_model: int) -> bool:
  """Whether the kernels can address weights and activations of these shapes."""
  return max(batch, n_latents) * d_model < _MAX_ELEMENTS


@functools.partial(jax.jit, static_argnames='interpret')
def decode(
  z_BK: jax.Array, idx_BK: jax.Array, w_FD: jax.Array, slots: Slots = None, *, interpret: bool = False
) -> jax.Array:
  """sum_k z[b, k] w[idx[b, k]] over the first `slots`: one program a row and block of columns."""
  (rows, _), width = z_BK.shape, w_FD.shape[1]
  block = _block(width)

  def kernel(slots_ref: jax.Ref, z_ref: jax.Ref, idx_ref: jax.Ref, w_ref: jax.Ref, x_ref: jax.Ref) -> None:
    row, cols = pl.program_id(0), pl.program_id(1) * block + jnp.arange(block, dtype=jnp.int32)
    inside = cols < width

    def add_slot(j: jax.Array, total: jax.Array) -> jax.Array:
      z = z_ref[row, j]
      w = plt.load(w_ref.at[idx_ref[row, j], cols], mask=inside & (z != 0), other=0)
      return total + z.astype(total.dtype) * w.astype(total.dtype)

    total = jax.lax.fori_loop(0, slots_ref[0], add_slot, jnp.zeros(block, sum_dtype(w_FD)))
    plt.store(x_ref.at[row, cols], total.astype(w_FD.dtype), mask=inside)

  return pl.pallas_call(
    kernel,
    grid=(rows, pl.cdiv(width, block)),
    out_shape=jax.ShapeDtypeStruct((rows, width), w_FD.dtype),
    compiler_params=_warps(block),
    interpret=interpret,
    name='sparse_decode',
  )(_count(idx_BK, slots), z_BK, idx_BK, w_FD)


@functools.partial(jax.jit, static_argnames='interpret')
def code_gradient(
  idx_BK: jax.Array, w_FD: jax.Array, g_BD: jax.Array, slots: Slots = None, *, interpret: bool = False
) -> jax.Array:
  """<w[idx[b, k]], g[b]> for the first `slots`, 0 after them: one program a row."""
  (rows, k), width = idx_BK.shape, w_FD.shape[1]
  block = _block(width)

  def kernel(slots_ref: jax.Ref, idx_ref: jax.Ref, w_ref: jax.Ref, g_ref: jax.Ref, dz_ref: jax.Ref) -> None:
    row = pl.program_id(0)

    def slot(j: jax.Array, _: None) -> None:
      total = jnp.zeros(block, sum_dtype(w_FD))
      for first in range(0, width, block):
        cols = first + jnp.arange(block, dtype=jnp.int32)
        w = plt.load(w_ref.at[idx_ref[row, j], cols], mask=cols < width, other=0)
        g = plt.load(g_ref.at[row, cols], mask=cols < width, other=0)
        total += w.astype(total.dtype) * g.astype(total.dtype)
      dz_ref[row, j] = jnp.sum(total).astype(g_BD.dtype)

    def nothing(j: jax.Array, _: None) -> None:
      dz_ref[row, j] = jnp.zeros((), g_BD.dtype)

    jax.lax.fori_loop(0, slots_ref[0], slot, None)
    jax.lax.fori_loop(slots_ref[0], k, nothing, None)

  return pl.pallas_call(
    kernel,
    grid=(rows,),
    out_shape=jax.ShapeDtypeStruct((rows, k), g_BD.dtype),
    compiler_params=_warps(block),
    interpret=interpret,
    name='sparse_code_gradient',
  )(_count(idx_BK, slots), idx_BK, w_FD, g_BD)


@functools.partial(jax.jit, static_argnames=('interpret', 'run'))
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
  interpret: bool = False,
  run: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Adds sum_b dz[b, k] x[b] to row idx[b, k] of the first and sum_b z[b, k] g[b] to that of the second.

  A latent that fires on every token would be one long serial sum. So a program sums at most `run` pairs, about
  sqrt(B): runs beyond a latent's first go to B K / run rows of partial sums, and the latent's own program adds those
  in order.
  """
  run = run or max(16, 1 << (int(idx_BK.shape[0] ** 0.5) - 1).bit_length())

  def add(n_slots: int) -> tuple[jax.Array, jax.Array]:
    codes = (a[:, :n_slots] for a in (idx_BK, dz_BK, z_BK))
    return _add_pairs(dw_enc_FD, dw_dec_FD, *codes, x_BD, g_BD, run, interpret)

  k = idx_BK.shape[1]
  if slots is None or k <= _FEW:
    return add(k)
  return jax.lax.cond(slots <= _FEW, lambda: add(_FEW), lambda: add(k))


def _add_pairs(
  dw_enc_FD: jax.Array,
  dw_dec_FD: jax.Array,
  idx_BK: jax.Array,
  dz_BK: jax.Array,
  z_BK: jax.Array,
  x_BD: jax.Array,
  g_BD: jax.Array,
  run: int,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  (rows, k), (n_latents, width) = idx_BK.shape, dw_dec_FD.shape
  n_more = max(1, rows * k // run)
  block, wide = _block(width), sum_dtype(dw_dec_FD)
  start_F, order = _segments(idx_BK, n_latents)
  row, dz, z = order // k, dz_BK.reshape(-1)[order], z_BK.reshape(-1)[order]
  # Latent f has one run of its own and more[f + 1] - more[f] further ones.
  more_F = jnp.cumulative_sum((jnp.maximum(jnp.diff(start_F), 1) - 1) // run, include_initial=True, dtype=jnp.int32)
  item = jnp.arange(n_more, dtype=jnp.int32)
  owner = jnp.searchsorted(more_F, item, side='right', method='scan_unrolled').astype(jnp.int32) - 1
  first = start_F[owner] + run * (item - more_F[owner] + 1)
  # Items past the last further run have owner F, whose start is the end: an empty run.
  last = jnp.minimum(first + run, start_F[jnp.minimum(owner + 1, n_latents)])

  def pairs(
    row_ref: jax.Ref,
    dz_ref: jax.Ref,
    z_ref: jax.Ref,
    x_ref: jax.Ref,
    g_ref: jax.Ref,
    cols: jax.Array,
    inside: jax.Array,
  ) -> Callable[[jax.Array, _Sums], _Sums]:
    def add_pair(p: jax.Array, totals: _Sums) -> _Sums:
      dz, z, b = dz_ref[p], z_ref[p], row_ref[p]
      x = plt.load(x_ref.at[b, cols], mask=inside & (dz != 0), other=0)
      g = plt.load(g_ref.at[b, cols], mask=inside & (z != 0), other=0)
      return totals[0] + dz.astype(wide) * x.astype(wide), totals[1] + z.astype(wide) * g.astype(wide)

    return add_pair

  def further_runs(
    first_ref: jax.Ref,
    last_ref: jax.Ref,
    row_ref: jax.Ref,
    dz_ref: jax.Ref,
    z_ref: jax.Ref,
    x_ref: jax.Ref,
    g_ref: jax.Ref,
    enc_ref: jax.Ref,
    dec_ref: jax.Ref,
  ) -> None:
    i, cols = pl.program_id(0), pl.program_id(1) * block + jnp.arange(block, dtype=jnp.int32)
    inside = cols < width

    @pl.when(first_ref[i] < last_ref[i])
    def _() -> None:
      enc, dec = jax.lax.fori_loop(
        first_ref[i],
        last_ref[i],
        pairs(row_ref, dz_ref, z_ref, x_ref, g_ref, cols, inside),
        (jnp.zeros(block, wide), jnp.zeros(block, wide)),
      )
      plt.store(enc_ref.at[i, cols], enc, mask=inside)
      plt.store(dec_ref.at[i, cols], dec, mask=inside)

  def latents(
    start_ref: jax.Ref,
    more_ref: jax.Ref,
    row_ref: jax.Ref,
    dz_ref: jax.Ref,
    z_ref: jax.Ref,
    x_ref: jax.Ref,
    g_ref: jax.Ref,
    enc_more_ref: jax.Ref,
    dec_more_ref: jax.Ref,
    _: jax.Ref,
    __: jax.Ref,
    enc_ref: jax.Ref,
    dec_ref: jax.Ref,
  ) -> None:
    f, cols = pl.program_id(0), pl.program_id(1) * block + jnp.arange(block, dtype=jnp.int32)
    inside = cols < width
    start, end = start_ref[f], start_ref[f + 1]

    def add_run(i: jax.Array, totals: _Sums) -> _Sums:
      enc = plt.load(enc_more_ref.at[i, cols], mask=inside, other=0)
      dec = plt.load(dec_more_ref.at[i, cols], mask=inside, other=0)
      return totals[0] + enc, totals[1] + dec

    @pl.when(start < end)
    def _() -> None:
      zeros = jnp.zeros(block, wide)
      add_pair = pairs(row_ref, dz_ref, z_ref, x_ref, g_ref, cols, inside)
      totals = jax.lax.fori_loop(start, jnp.minimum(start + run, end), add_pair, (zeros, zeros))
      enc, dec = jax.lax.fori_loop(more_ref[f], more_ref[f + 1], add_run, totals)
      for ref, total in ((enc_ref, enc), (dec_ref, dec)):
        old = plt.load(ref.at[f, cols], mask=inside, other=0)
        plt.store(ref.at[f, cols], (old.astype(wide) + total).astype(old.dtype), mask=inside)

  codes = (row, dz, z, x_BD, g_BD)
  partial = jax.ShapeDtypeStruct((n_more, width), wide)
  partials = pl.pallas_call(
    further_runs,
    grid=(n_more, pl.cdiv(width, block)),
    out_shape=(partial, partial),
    compiler_params=_warps(block),
    interpret=interpret,
    name='sparse_gradient_further_runs',
  )(first, last, *codes)
  enc, dec = pl.pallas_call(
    latents,
    grid=(n_latents, pl.cdiv(width, block)),
    out_shape=tuple(jax.ShapeDtypeStruct(w.shape, w.dtype) for w in (dw_enc_FD, dw_dec_FD)),
    input_output_aliases={9: 0, 10: 1},  # rows of latents without a pair are never touched
    compiler_params=_warps(block),
    interpret=interpret,
    name='sparse_gradient_latents',
  )(start_F, more_F, *codes, *partials, dw_enc_FD, dw_dec_FD)
  return enc, dec


@functools.partial(jax.jit, static_argnames='interpret')
def add_at(total_F: jax.Array, idx_BK: jax.Array, values_BK: jax.Array, *, interpret: bool = False) -> jax.Array:
  """Adds values to the entries their indices name: one program a latent. `total.at[idx].add` would use atomics."""
  wide = sum_dtype(total_F)
  start_F, order = _segments(idx_BK, total_F.size)
  values = values_BK.reshape(-1)[order]

  def kernel(start_ref: jax.Ref, values_ref: jax.Ref, _: jax.Ref, total_ref: jax.Ref) -> None:
    f = pl.program_id(0)
    start, end = start_ref[f], start_ref[f + 1]

    def add_run(i: jax.Array, sums: jax.Array) -> jax.Array:
      at = start + i * _RUN + jnp.arange(_RUN, dtype=jnp.int32)
      return sums + plt.load(values_ref.at[at], mask=at < end, other=0).astype(wide)

    @pl.when(start < end)
    def _() -> None:
      sums = jax.lax.fori_loop(0, (end - start + _RUN - 1) // _RUN, add_run, jnp.zeros(_RUN, wide))
      old = total_ref[f]
      total_ref[f] = (old.astype(wide) + jnp.sum(sums)).astype(old.dtype)

  return pl.pallas_call(
    kernel,
    grid=(total_F.size,),
    out_shape=jax.ShapeDtypeStruct(total_F.shape, total_F.dtype),
    input_output_aliases={2: 0},
    compiler_params=plt.CompilerParams(num_warps=1),
    interpret=interpret,
    name='sparse_add_at',
  )(start_F, values, total_F)


def _segments(idx_BK: jax.Array, n_latents: int) -> tuple[jax.Array, jax.Array]:
  """Pairs ordered by latent, then by position: start [F + 1] of each latent's, and the order [B K].

  The same expression in every caller, so that XLA sorts once for all that share their indices.
  """
  position = jnp.arange(idx_BK.size, dtype=jnp.int32)
  latent, order = jax.lax.sort((idx_BK.reshape(-1).astype(jnp.int32), position), num_keys=1, is_stable=True)
  edges = jnp.arange(n_latents + 1, dtype=jnp.int32)
  start_F = jnp.searchsorted(latent, edges, method='scan_unrolled').astype(jnp.int32)
  return start_F, order


def _block(width: int) -> int:
  """Columns of one program: the power of two up to 1,024 that pads `width` least, the larger of equals."""
  sizes = [16 << i for i in range(7)]
  return min(sizes, key=lambda size: (-(-width // size) * size, -size))


def _warps(block: int) -> plt.CompilerParams:
  # Four numbers a thread, one 16-byte read. Not tuned: no GPU was at hand.
  return plt.CompilerParams(num_warps=max(1, block // 128))


def _count(codes_BK: jax.Array, slots: Slots) -> jax.Array:
  return jnp.full(1, codes_BK.shape[1] if slots is None else slots, jnp.int32)
