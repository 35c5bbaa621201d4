"""Exact top-k: the k largest of each row, ties to the lowest index, on one shard and across shards.

`jax.lax.top_k` on a sharded axis under jit gathers the whole array and has been wrong on some backends, so the
selection across shards is written out for use inside `shard_map`.
"""

import jax
import jax.numpy as jnp

# Measured on 2 AVX-512 cores, B=2,048, n=32,768, k=32: lax.top_k 88 ms, groups of 16 39 ms, of 64 44 ms.
_GROUP = 16
_TWO_STAGE_FROM = 4096


def top_k(product_BF: jax.Array, bias_F: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k largest entries of each row of product + bias, descending: values [B, k] and int32 indices [B, k].

  Equals `jax.lax.top_k(product + bias)`, ties included. Long rows take a two-stage search that never writes the sum:
  a second [B, F] array cost 115 of 560 ms of a step at the shape above, mostly in page faults.
  """
  width = product_BF.shape[-1]
  if width < _TWO_STAGE_FROM or width % _GROUP or 4 * k * _GROUP > width:
    return jax.lax.top_k(product_BF + bias_F[None], k)
  return two_stage(product_BF, bias_F, k, _GROUP)


def two_stage(product_BF: jax.Array, bias_F: jax.Array, k: int, group: int) -> tuple[jax.Array, jax.Array]:
  """Top-k by way of the k groups of columns with the largest maxima, which hold every winner."""
  rows, width = product_BF.shape
  product_BGg, bias_Gg = product_BF.reshape(rows, width // group, group), bias_F.reshape(-1, group)
  _, groups_BK = jax.lax.top_k((product_BGg + bias_Gg[None]).max(-1), k)
  # In ascending order the candidates keep their column order, and so ties go to the lowest column.
  groups_BK = jnp.sort(groups_BK, axis=-1)
  candidates = jnp.take_along_axis(product_BGg, groups_BK[:, :, None], axis=1) + bias_Gg[groups_BK]
  v_BK, j_BK = jax.lax.top_k(candidates.reshape(rows, k * group), k)
  idx_BK = jnp.take_along_axis(groups_BK, j_BK // group, axis=1) * group + j_BK % group
  return v_BK, idx_BK


def select(
  product_BF: jax.Array, bias_F: jax.Array, k: int, latent_axis: str | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """This shard's part of the global top-k of each row.

  Args:
    product_BF, bias_F: pre-activations of this shard's latents, float32, as product + bias.
    k: latents to keep over all shards.
    latent_axis: mesh axis that latents are sharded over, or None on one shard.

  Returns:
    values [B, m] descending, local indices [B, m] and a mask [B, m] of those kept, m = min(k, local width).
    Over all shards exactly k entries a row are kept, ties to the lowest global index.
  """
  m = min(k, product_BF.shape[-1])
  v_Bm, idx_Bm = top_k(product_BF, bias_F, m)
  if latent_axis is None:
    return v_Bm, idx_Bm, jnp.ones_like(idx_Bm, dtype=bool)
  # Only values cross the wire. Candidates sit in shard order and within a shard in (value, index) order, so among
  # equal values their position orders them by global index.
  all_BC = jax.lax.all_gather(v_Bm, latent_axis, axis=1, tiled=True)
  kth_B1 = jax.lax.top_k(all_BC, k)[0][:, -1:]
  tied_BC = all_BC == kth_B1
  vacancies_B1 = k - jnp.sum(all_BC > kth_B1, axis=1, keepdims=True)
  wins_BC = (all_BC > kth_B1) | (tied_BC & (jnp.cumsum(tied_BC, axis=1) <= vacancies_B1))
  start = jax.lax.axis_index(latent_axis) * m
  return v_Bm, idx_Bm, jax.lax.dynamic_slice_in_dim(wins_BC, start, m, axis=1)
