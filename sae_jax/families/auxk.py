"""AuxK (Gao et al. 2024, section 2.3 and appendix A.2): dead latents reconstruct the residual e = x - x_hat.

b_pre is in neither target nor prediction (adding it to only one is a known bug elsewhere), and the residual is a
constant: no gradient reaches the main reconstruction.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sae_jax import losses, sparse, topk
from sae_jax.axes import Axes, Shard, largest, total
from sae_jax.codes import Sparse

# Selects among the pre-activations with this bias [F]: values not negative and descending.
Select = Callable[[jax.Array], Sparse]


class Gradients(NamedTuple):
  """What AuxK adds to the gradients of this shard's latents, before any reduction over tokens."""

  w_enc_FD: jax.Array
  w_dec_FD: jax.Array  # not projected
  b_enc_F: jax.Array
  along_F: jax.Array  # <gradient of w_dec, w_dec>, the part that the projection removes
  loss: jax.Array  # AuxK before its coefficient, over all tokens


def gradients(
  params: dict[str, jax.Array],
  dead_F: jax.Array,
  n_dead: jax.Array,
  error_BD: jax.Array,
  xc_BD: jax.Array,
  select: Select,
  *,
  k_aux: int,
  coefficient: float,
  batch: int,
  shard: Shard,
  room: int,
) -> Gradients:
  """Gradients of coefficient * mean (e_hat - e)^2 / variance of e. They are zero when no latent is dead.

  How they are computed depends on the number of dead latents:
  Up to k_aux, all of them are used. Nothing needs selecting.
  Above that they are gathered into the narrowest of a few widths that holds them, and selected there.
  When that is wider than `room`, `select` searches the pre-activations of all latents.

  A conditional chooses between these. No [F, D] array goes into it: each branch makes its own accumulators, and the main
  loops add to them afterwards.

  Args:
    params: this shard's latents.
    dead_F: which of them are dead.
    n_dead: how many are, of all shards.
    error_BD: this shard's e.
    xc_BD: this shard's x - b_pre.
    select: the selection among all latents.
    k_aux: how many dead latents reconstruct a token's e.
    coefficient: of AuxK in the loss.
    batch: tokens of all shards.
    shard: where this runs.
    room: most columns that a dense product over gathered dead latents may have.
  """
  args = (params, dead_F, error_BD, xc_BD)
  given = dict(coefficient=coefficient, batch=batch, axes=shard.axes)

  def of_few(width: int) -> Callable[[], Gradients]:
    return lambda: _of_few(*args, width=width, k_aux=k_aux, dtype=shard.dtype, **given)

  widths = [min(k_aux, len(dead_F)), *(w for w in (4 * k_aux, 16 * k_aux) if w <= room)]
  here = largest(jnp.sum(dead_F, dtype=jnp.int32), shard.axes.latent)
  exceeded = [n_dead > 0, n_dead > k_aux, *(here > w for w in widths[1:])]
  branches = [lambda: none(params), *map(of_few, widths), lambda: _of_many(*args, select=select, **given)]
  return jax.lax.switch(sum(e.astype(jnp.int32) for e in exceeded), branches)


def none(params: dict[str, jax.Array]) -> Gradients:
  """Those of a step without AuxK."""
  zeros_FD, zeros_F = jnp.zeros_like(params['w_dec_FD']), jnp.zeros_like(params['b_enc_F'])
  return Gradients(zeros_FD, zeros_FD, zeros_F, zeros_F, jnp.zeros((), zeros_FD.dtype))


def _of_many(
  params: dict[str, jax.Array],
  dead_F: jax.Array,
  error_BD: jax.Array,
  xc_BD: jax.Array,
  *,
  select: Select,
  coefficient: float,
  batch: int,
  axes: Axes,
) -> Gradients:
  # -inf, not 0: with fewer than k_aux positive dead latents a 0 would select live ones.
  codes = select(jnp.where(dead_F, params['b_enc_F'], -jnp.inf))
  slots = sparse.used_slots(codes.z_BK)  # a handful of dead latents must not cost k_aux passes
  h_BD, loss = _loss(codes.decode(params['w_dec_FD'], slots), error_BD, coefficient, batch, axes)
  dy_BK = codes.gradient(params['w_dec_FD'], h_BD, slots)
  zero = none(params)
  dw_enc_FD, dw_dec_FD = codes.add_weight_gradients(zero.w_enc_FD, zero.w_dec_FD, dy_BK, xc_BD, h_BD, slots)
  return Gradients(
    dw_enc_FD,
    dw_dec_FD,
    codes.add_at(zero.b_enc_F, dy_BK),
    codes.add_at(zero.along_F, codes.z_BK * dy_BK),
    loss,
  )


def _of_few(
  params: dict[str, jax.Array],
  dead_F: jax.Array,
  error_BD: jax.Array,
  xc_BD: jax.Array,
  *,
  width: int,
  k_aux: int,
  coefficient: float,
  batch: int,
  axes: Axes,
  dtype: DTypeLike | None,
) -> Gradients:
  """By dense products with the rows of at most `width` dead latents, gathered.

  At (d, n, B, k) = (512, 8192, 2048, 32) on two CPU cores selection and loops of `_of_many` took 51 of 124 ms for eight
  dead latents.
  """
  n_latents = len(dead_F)
  (dead_W,) = jnp.nonzero(dead_F, size=width, fill_value=n_latents)
  # Columns beyond the dead latents get indices outside, which read as 0 and are not written to. Each its own, so that
  # the writes below are of unique rows: no order of sums, the same bits on every backend.
  dead_W = jnp.where(dead_W < n_latents, dead_W, n_latents + jnp.arange(width))

  def rows(a: jax.Array) -> jax.Array:
    return a.at[dead_W].get(mode='fill', fill_value=0)

  w_enc_WD, w_dec_WD, b_enc_W = rows(params['w_enc_FD']), rows(params['w_dec_FD']), rows(params['b_enc_F'])
  dtype = dtype or xc_BD.dtype
  product_BW = jnp.einsum('bd,wd->bw', xc_BD.astype(dtype), w_enc_WD.astype(dtype), preferred_element_type=xc_BD.dtype)
  y_BW = jax.nn.relu(product_BW + b_enc_W[None])
  if width > k_aux:
    y_BW = _leading(y_BW, k_aux, axes)
  h_BD, loss = _loss(y_BW @ w_dec_WD, error_BD, coefficient, batch, axes)
  dy_BW = jnp.where(y_BW > 0, h_BD @ w_dec_WD.T, 0)

  def spread(like: jax.Array, values: jax.Array) -> jax.Array:
    zeros = jnp.zeros_like(like)
    return zeros.at[dead_W].set(values, mode='drop', unique_indices=True, indices_are_sorted=True)

  return Gradients(
    spread(params['w_enc_FD'], dy_BW.T @ xc_BD),
    spread(params['w_dec_FD'], y_BW.T @ h_BD),
    spread(params['b_enc_F'], jnp.sum(dy_BW, axis=0)),
    spread(params['b_enc_F'], jnp.sum(y_BW * dy_BW, axis=0)),
    loss,
  )


def _leading(y_BW: jax.Array, k: int, axes: Axes) -> jax.Array:
  """y where it is among the k largest of its row over all shards, 0 elsewhere; y is not negative.

  Most dead latents are below 0 for most tokens: often no row has more than k to choose from.
  """
  positive_B = total(jnp.sum(y_BW > 0, axis=1, dtype=jnp.int32), axes.latent)
  crowded = largest(jnp.max(positive_B), axes.data) > k
  return jax.lax.cond(crowded, lambda: jnp.where(topk.counted(y_BW, k, axes.latent), y_BW, 0), lambda: y_BW)


def _loss(
  decoded_BD: jax.Array, error_BD: jax.Array, coefficient: float, batch: int, axes: Axes
) -> tuple[jax.Array, jax.Array]:
  """Gradient [B, D] of AuxK's reconstruction, and AuxK before its coefficient, from this shard's part of the former."""
  difference_BD = total(decoded_BD, axes.latent) - error_BD
  square_sum, sum_D, difference_square_sum = total(
    (jnp.sum(error_BD**2), jnp.sum(error_BD, axis=0), jnp.sum(difference_BD**2)), axes.data
  )
  variance = losses.residual_variance(square_sum, sum_D, batch)
  h_BD = losses.auxk_gradient(difference_BD, variance, coefficient, batch)
  return h_BD, losses.auxk_loss(difference_square_sum, variance, batch, sum_D.size)
