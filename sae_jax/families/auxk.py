"""AuxK (Gao et al. 2024, section 2.3 and appendix A.2): dead latents reconstruct the residual e = x - x_hat.

b_pre is in neither target nor prediction (adding it to only one is a known bug elsewhere), and the residual is a
constant: no gradient reaches the main reconstruction.

Which latents are dead is known only after the batch. In chunks of rows the product is gone by then. So each chunk lists
candidates among the latents that are dead unless they fire in this batch, and those that did are passed over afterwards.
"""

import math
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
_SPARE = 64  # listed candidates a token that may fire
_CACHED_ROWS = 64  # that a selection on a CPU keeps in the cache


class Gradients(NamedTuple):
  """What AuxK adds to the gradients of this shard's latents, before any reduction over tokens."""

  w_enc_FD: jax.Array
  w_dec_FD: jax.Array  # not projected
  b_enc_F: jax.Array
  along_F: jax.Array  # <gradient of w_dec, w_dec>, the part that the projection removes
  loss: jax.Array  # AuxK before its coefficient, over all tokens


class Listed(NamedTuple):
  """The largest pre-activations of this shard among latents that may be dead, descending along a row."""

  v_BM: jax.Array
  idx_BM: jax.Array  # local


Lister = Callable[[jax.Array], Listed]


def lister(at_risk_F: jax.Array, b_enc_F: jax.Array, k_aux: int, axes: Axes) -> Lister:
  """A function from the product [R, F] of some rows, without the bias, to their candidates.

  A token's k_aux best lie on all shards. A shard lists no more than twice its share of them, and a few to spare.
  With so few latents at risk that all of them are used, it lists nothing.

  Args:
    at_risk_F: which latents are dead unless they fire in this batch.
    b_enc_F: their bias.
    k_aux: how many dead latents reconstruct a token's e.
    axes: where this runs.
  """
  m = min(len(at_risk_F), min(k_aux, 2 * -(-k_aux // total(1, axes.latent))) + _SPARE)
  bias_F = jnp.where(at_risk_F, b_enc_F, -jnp.inf)
  many = total(jnp.sum(at_risk_F, dtype=jnp.int32), axes.latent) > k_aux

  def listed(product_RF: jax.Array) -> Listed:
    nothing_RM = jnp.zeros((len(product_RF), m), product_RF.dtype)
    return jax.lax.cond(
      many,
      lambda: Listed(*topk.top_k(product_RF, bias_F, m)),
      lambda: Listed(nothing_RM, nothing_RM.astype(jnp.int32)),
    )

  return listed


def _left(listed: Listed, dead_F: jax.Array, k_aux: int, axes: Axes) -> tuple[jax.Array, jax.Array]:
  """The candidates' values, 0 where they fired or are negative, and whether a better one may be missing on some shard.

  No latent that a shard did not list exceeds the last one that it did. Where k_aux candidates exceed the last ones of all
  shards, none is missing.
  """
  left_BM = jnp.where(dead_F[listed.idx_BM], jax.nn.relu(listed.v_BM), 0)
  missing = jnp.zeros((), bool)
  if listed.v_BM.shape[1] < len(dead_F):
    last_B1 = largest(jax.nn.relu(listed.v_BM[:, -1:]), axes.latent)
    above_B1 = total(jnp.sum(left_BM > last_B1, axis=1, keepdims=True, dtype=jnp.int32), axes.latent)
    missing_B1 = (last_B1 > 0) & (above_B1 < k_aux)
    missing = largest(jnp.any(missing_B1).astype(jnp.int32), axes.data) > 0
  return left_BM, missing


def gradients(
  params: dict[str, jax.Array],
  dead_F: jax.Array,
  n_dead: jax.Array,
  error_BD: jax.Array,
  xc_BD: jax.Array,
  product_BF: jax.Array | None,
  select: Select,
  listed: Listed | None,
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
  When that is wider than `room`, `listed` candidates are selected from.
  Without those, or where one may be missing among them, `select` searches the pre-activations of all latents.

  A conditional chooses between these. No [F, D] array goes into it: each branch makes its own accumulators, and the main
  loops add to them afterwards.

  Args:
    params: this shard's latents.
    dead_F: which of them are dead.
    n_dead: how many are, of all shards.
    error_BD: this shard's e.
    xc_BD: this shard's x - b_pre.
    product_BF: their product with the encoder, without the bias, where it was kept.
    select: the selection among all latents.
    listed: candidates of a pass over chunks of rows.
    k_aux: how many dead latents reconstruct a token's e.
    coefficient: of AuxK in the loss.
    batch: tokens of all shards.
    shard: where this runs.
    room: most columns that a dense product over gathered dead latents may have.
  """
  given = dict(coefficient=coefficient, batch=batch, axes=shard.axes)

  def of_few(width: int) -> Callable[[], Gradients]:
    return lambda: _of_few(
      params, dead_F, error_BD, xc_BD, product_BF, width=width, k_aux=k_aux, dtype=shard.dtype, **given
    )

  def of_all() -> Gradients:
    # -inf, not 0: with fewer than k_aux positive dead latents a 0 would select live ones.
    return _of_many(params, select(jnp.where(dead_F, params['b_enc_F'], -jnp.inf)), error_BD, xc_BD, **given)

  def of_listed() -> Gradients:
    z_BK, at_BK = jax.lax.top_k(left_BM, min(k_aux, left_BM.shape[1]))  # closes the gaps
    idx_BK = jnp.take_along_axis(listed.idx_BM, at_BK, axis=1)
    won_BK = topk.select(z_BK, k_aux, z_BK.shape[1], shard.axes.latent, shard.exchange)
    return _of_many(params, Sparse(jnp.where(won_BK, z_BK, 0), idx_BK), error_BD, xc_BD, **given)

  widths = [min(k_aux, len(dead_F)), *(w for w in (4 * k_aux, 16 * k_aux) if w <= room)]
  here = largest(jnp.sum(dead_F, dtype=jnp.int32), shard.axes.latent)
  exceeded = [n_dead > 0, n_dead > k_aux, *(here > w for w in widths[1:])]
  branches = [lambda: none(params), *map(of_few, widths), of_all]
  if listed is not None:
    left_BM, missing = jax.lax.cond(
      n_dead > k_aux,
      lambda: _left(listed, dead_F, k_aux, shard.axes),
      lambda: (listed.v_BM, jnp.zeros((), bool)),
    )
    exceeded.append(missing)
    branches.insert(-1, of_listed)
  return jax.lax.switch(sum(e.astype(jnp.int32) for e in exceeded), branches)


def none(params: dict[str, jax.Array]) -> Gradients:
  """Those of a step without AuxK."""
  zeros_FD, zeros_F = jnp.zeros_like(params['w_dec_FD']), jnp.zeros_like(params['b_enc_F'])
  return Gradients(zeros_FD, zeros_FD, zeros_F, zeros_F, jnp.zeros((), zeros_FD.dtype))


def _of_many(
  params: dict[str, jax.Array],
  codes: Sparse,
  error_BD: jax.Array,
  xc_BD: jax.Array,
  *,
  coefficient: float,
  batch: int,
  axes: Axes,
) -> Gradients:
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
  product_BF: jax.Array | None,
  *,
  width: int,
  k_aux: int,
  coefficient: float,
  batch: int,
  axes: Axes,
  dtype: DTypeLike | None,
) -> Gradients:
  """By dense products with the rows of at most `width` dead latents, gathered.

  For a few dead latents selection and loops of `_of_many` would take a large part of a step on a CPU.
  """
  n_latents = len(dead_F)
  (dead_W,) = jnp.nonzero(dead_F, size=width, fill_value=n_latents)
  # Columns beyond the dead latents get indices outside, which read as 0 and are not written to. Each its own, so that
  # the writes below are of unique rows: no order of sums, the same bits on every backend.
  dead_W = jnp.where(dead_W < n_latents, dead_W, n_latents + jnp.arange(width))

  def rows(a: jax.Array) -> jax.Array:
    return a.at[dead_W].get(mode='fill', fill_value=0)

  w_dec_WD, b_enc_W = rows(params['w_dec_FD']), rows(params['b_enc_F'])
  if product_BF is None:  # and then no width exceeds k_aux
    args = (a.astype(dtype or xc_BD.dtype) for a in (xc_BD, rows(params['w_enc_FD'])))
    y_BW = jax.nn.relu(jnp.einsum('bd,wd->bw', *args, preferred_element_type=xc_BD.dtype) + b_enc_W[None])
  else:

    def columns(product_RF: jax.Array) -> jax.Array:
      y_RW = jax.nn.relu(product_RF.at[:, dead_W].get(mode='fill', fill_value=0) + b_enc_W[None])
      return _leading(y_RW, k_aux, axes) if width > k_aux else y_RW

    def in_parts(product_BF: jax.Array) -> jax.Array:
      rows = math.gcd(len(product_BF), _CACHED_ROWS)
      return jax.lax.map(columns, product_BF.reshape(-1, rows, n_latents)).reshape(-1, width)

    # In a loop shards cannot agree.
    cpu = columns if axes.latent else in_parts
    y_BW = jax.lax.platform_dependent(product_BF, cpu=cpu, default=columns)
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
  crowded = largest(jnp.max(positive_B), axes.data if axes.latent else None) > k
  k_B = jnp.minimum(k, positive_B)
  return jax.lax.cond(crowded, lambda: jnp.where(topk.counted(y_BW, k_B, axes.latent), y_BW, 0), lambda: y_BW)


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
