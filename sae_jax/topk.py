"""Top-k: the k largest of each row, ties to the lowest index, on one shard and across shards; all but `approximate` exact.

`jax.lax.top_k` on a sharded axis under jit gathers the whole array and has been wrong on some backends, so the
selection across shards is written out for use inside `shard_map`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from sae_jax.axes import Shard, total
from sae_jax.kernels import native, selection

# Of XLA's two stages on a CPU: wider and narrower groups were slower.
_GROUP = 16
_TWO_STAGE_FROM = 4096
_KERNEL_FROM = 512  # columns; shorter rows are no work
_TPU_GROUP = 128  # as wide as a register: the product is copied once into another layout, and not twice
# About 10 microseconds at 100 GB/s.
_ROUND_BYTES = 1_000_000

_Tree = TypeVar('_Tree')


class Preactivations(NamedTuple):
  """(x - b_pre) W_enc^T + b_enc of one shard, as a selection asks for them."""

  product_BF: jax.Array | None  # without the bias; None where it was not kept
  make: Callable[[jax.Array], jax.Array]  # makes the product of some rows of x - b_pre
  xc_BD: jax.Array  # x - b_pre
  bias_F: jax.Array
  recall_target: float | None = None  # candidates are then those of `approximate`
  found: tuple[jax.Array, jax.Array] | None = None  # candidates of an earlier pass; more than these take another

  def candidates(self, k: int, chunks: int) -> tuple[jax.Array, jax.Array]:
    """This shard's min(k, F) largest of each row, descending: values and indices.

    Where the product was not kept it is made chunk by chunk. That loop is local: shards agree on the winners of all
    rows at once.
    """
    m = min(k, len(self.bias_F))
    if self.found is not None and m <= self.found[0].shape[1]:
      return self.found[0][:, :m], self.found[1][:, :m]
    if self.product_BF is not None:
      return self._largest(self.product_BF, m)
    return self._in_chunks(lambda product_RF: self._largest(product_RF, m), chunks)

  def beside(self, k: int, chunks: int, other: Callable[[jax.Array], _Tree]) -> tuple['Preactivations', _Tree]:
    """These with `candidates` of k, and what `other` makes of the product [R, F] of each chunk of rows, in one pass."""
    m = min(k, len(self.bias_F))
    found, others = self._in_chunks(lambda product_RF: (self._largest(product_RF, m), other(product_RF)), chunks)
    return self._replace(found=found), others

  def _largest(self, product_BF: jax.Array, m: int) -> tuple[jax.Array, jax.Array]:
    if self.recall_target is None:
      return top_k(product_BF, self.bias_F, m)
    return approximate(product_BF, self.bias_F, m, self.recall_target)

  def _in_chunks(self, of: Callable[[jax.Array], _Tree], chunks: int) -> _Tree:
    xc_CRD = self.xc_BD.reshape(chunks, -1, self.xc_BD.shape[1])
    made = jax.lax.map(lambda xc_RD: of(self.make(xc_RD)), xc_CRD)
    return jax.tree.map(lambda a_CRK: a_CRK.reshape(-1, a_CRK.shape[-1]), made)

  def best(self, k: int, shard: Shard) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`candidates`, and which of them are among the k largest of their row over all shards."""
    v_BK, idx_BK = self.candidates(k, shard.chunks)
    return v_BK, idx_BK, select(v_BK, k, len(self.bias_F), shard.axes.latent, shard.exchange)


def top_k(product_BF: jax.Array, bias_F: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k largest entries of each row of product + bias, descending: values [B, k] and int32 indices [B, k].

  Equals `jax.lax.top_k(product + bias)`, ties included. None of the ways to find them writes the sum for long rows: a second
  [B, F] array would cost more than the search.
  """
  # Beside an accelerator a CPU selects little, and the kernel is not worth building.
  wanted = product_BF.dtype == jnp.float32 and len(bias_F) >= _KERNEL_FROM and jax.default_backend() == 'cpu'
  if not wanted or not native.available():
    return _by_xla(product_BF, bias_F, k)

  def by_kernel(product_BF: jax.Array, bias_F: jax.Array) -> tuple[jax.Array, jax.Array]:
    idx_BK = selection.columns(product_BF, bias_F, k)
    return jnp.take_along_axis(product_BF, idx_BK, axis=1) + bias_F[idx_BK], idx_BK

  by_xla = functools.partial(_by_xla, k=k)
  return jax.lax.platform_dependent(product_BF, bias_F, cpu=by_kernel, default=by_xla)


def describe(platform: str, width: int) -> str:
  """What slows `top_k` and the sparse products down on this platform, in words to add to those of `sparse.describe`."""
  if platform != 'cpu' or width < _KERNEL_FROM or native.available():
    return ''
  return '; they and top-k by XLA alone, which is slower: no C++ compiler (CXX, or c++) could build kernels in the cache folder'


def _by_xla(product_BF: jax.Array, bias_F: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  width = product_BF.shape[-1]
  if width < _TWO_STAGE_FROM or width % _GROUP or 4 * k * _GROUP > width:
    v_BK, idx_BK = jax.lax.top_k(product_BF + bias_F[None], k)
    return v_BK, idx_BK
  # Wide groups leave more candidates: they are taken where these are no more than there would be narrow groups.
  wide = width % _TPU_GROUP == 0 and k * _TPU_GROUP <= width // _GROUP
  of_group = functools.partial(two_stage, k=k, group=_GROUP)
  tpu = functools.partial(two_stage, k=k, group=_TPU_GROUP) if wide else of_group
  return jax.lax.platform_dependent(product_BF, bias_F, tpu=tpu, default=of_group)


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


def approximate(product_BF: jax.Array, bias_F: jax.Array, k: int, recall_target: float) -> tuple[jax.Array, jax.Array]:
  """As `top_k`, but some of the k largest may be missed; values [B, k] descending, ties in any order.

  On a TPU the columns are dealt into bins and only the largest of each bin is looked at (Chern et al. 2022, "TPU-KNN"),
  with as many bins as make `recall_target` the expected share of the k largest that is found, if they lie at random
  columns. XLA on a CPU or GPU sorts instead: recall is 1 there, at the price of a sort.
  """
  v_BK, idx_BK = jax.lax.approx_max_k(product_BF + bias_F[None], k, recall_target=recall_target)
  return v_BK, idx_BK


def exchange(k: int, shards: int, width: int, rows: int) -> str:
  """How `select` finds the k-th value of each row over all shards: 'gather' or 'count'. Both are exact.

  'gather' sends every shard's min(k, width) candidates to every other: 4 rows min(k, width) (shards - 1) bytes received.
  'count' finds the k-th value by bisection: 32 all-reduces of one count a row, one after another, and one more, then one
  gather of tie counts: 4 rows (66 + shards) bytes. Each of these also waits for the slowest link, taken as the time of
  `_ROUND_BYTES`. The smaller sum wins: k=32 on 4 shards is gathered up to 300,000 rows, k=256 on 128 shards (4.3 GB
  for 32,768 rows) is counted from 260 rows.
  """
  gathered = 4 * rows * min(k, width) * (shards - 1)
  counted = 4 * rows * (66 + shards) + 34 * _ROUND_BYTES
  return 'gather' if gathered <= counted else 'count'


def select(v_Bm: jax.Array, k: int, width: int, latent_axis: str | None, method: str = 'auto') -> jax.Array:
  """Which of this shard's candidates are in the global top-k of each row: a mask [B, m].

  Args:
    v_Bm: m = min(k, width) values of each row of this shard, descending: from `top_k` the largest.
    k: latents to keep over all shards.
    width: latents of a shard.
    latent_axis: mesh axis that latents are sharded over, or None on one shard.
    method: 'gather', 'count', or 'auto' for what `exchange` says.

  Returns:
    A mask whose true entries lead each row. Over all shards exactly k a row are kept, the largest of the candidates,
    ties to the lowest global index where each shard's candidates have them so.
  """
  if latent_axis is None:
    return jnp.ones_like(v_Bm, dtype=bool)
  if method == 'auto':
    method = exchange(k, jax.lax.axis_size(latent_axis), width, v_Bm.shape[0])
  return {'gather': _by_gathering, 'count': counted}[method](v_Bm, k, latent_axis)


def found(product_BF: jax.Array, bias_F: jax.Array, k: int, recall_target: float, latent_axis: str | None) -> jax.Array:
  """How many of the exact top k of each row are among the candidates of `approximate`, over all shards: int32 [B]."""
  width = bias_F.shape[0]
  m = min(k, width)

  def winners(v_BK: jax.Array, idx_BK: jax.Array) -> jax.Array:
    return jnp.where(select(v_BK, k, width, latent_axis), idx_BK, -1)

  exact_BK = winners(*top_k(product_BF, bias_F, m))
  approximate_BK = winners(*approximate(product_BF, bias_F, m, recall_target))
  both_BKK = (exact_BK[:, :, None] == approximate_BK[:, None, :]) & (exact_BK[:, :, None] >= 0)
  found_B = jnp.sum(both_BKK, axis=(1, 2), dtype=jnp.int32)
  return total(found_B, latent_axis)


def _by_gathering(v_Bm: jax.Array, k: int, latent_axis: str) -> jax.Array:
  m = v_Bm.shape[-1]
  # Only values cross the wire. Candidates sit in shard order and within a shard in (value, index) order, so among
  # equal values their position orders them by global index.
  all_BC = jax.lax.all_gather(v_Bm, latent_axis, axis=1, tiled=True)
  # The least of them, not the last: where only the last is used XLA compiles a full sort on a CPU.
  kth_B1 = jnp.min(jax.lax.top_k(all_BC, k)[0], axis=1, keepdims=True)
  tied_BC = all_BC == kth_B1
  vacancies_B1 = k - jnp.sum(all_BC > kth_B1, axis=1, keepdims=True)
  wins_BC = (all_BC > kth_B1) | (tied_BC & (jnp.cumsum(tied_BC, axis=1) <= vacancies_B1))
  start = jax.lax.axis_index(latent_axis) * m
  return jax.lax.dynamic_slice_in_dim(wins_BC, start, m, axis=1)


def counted(v_BC: jax.Array, k: int | jax.Array, latent_axis: str | tuple[str, ...] | None) -> jax.Array:
  """Which entries of each row are in its top k over all shards, ties to the lowest global index: a mask [B, C].

  The k-th largest key is the largest t with at least k keys >= t, found bit by bit from the top. Rows of fewer than k
  keep all they have. k may be traced, and one for each row, and the rows may lie on several axes. On one shard the search
  ends as soon as every row has k. At B=2,048, C=1,024, k=256 on two CPU cores ten times as fast as `jax.lax.top_k`.
  """
  key_BC = _ordered_bits(v_BC)
  bits = 8 * key_BC.dtype.itemsize

  def round_(i: jax.Array, so_far: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    kth_B, held_B = so_far
    trial_B = kth_B | (jnp.ones((), key_BC.dtype) << (bits - 1 - i).astype(key_BC.dtype))
    count_B = total(jnp.sum(key_BC >= trial_B[:, None], axis=1, dtype=jnp.int32), latent_axis)
    return jnp.where(count_B >= k, trial_B, kth_B), jnp.where(count_B >= k, count_B, held_B)

  start = jnp.zeros(v_BC.shape[0], key_BC.dtype), jnp.full(v_BC.shape[0], v_BC.shape[1], jnp.int32)
  if latent_axis is None:
    _, (kth_B, _) = jax.lax.while_loop(
      lambda at: (at[0] < bits) & jnp.any(at[1][1] != k), lambda at: (at[0] + 1, round_(*at)), (0, start)
    )
  else:
    kth_B, _ = jax.lax.fori_loop(0, bits, round_, start)
  above_BC, tied_BC = key_BC > kth_B[:, None], key_BC == kth_B[:, None]
  vacancies_B = k - total(jnp.sum(above_BC, axis=1, dtype=jnp.int32), latent_axis)
  if latent_axis is not None:
    # Ties of earlier shards have lower global indices and fill the vacancies first.
    ties_SB = jax.lax.all_gather(jnp.sum(tied_BC, axis=1, dtype=jnp.int32), latent_axis)
    earlier_S1 = (jnp.arange(ties_SB.shape[0]) < jax.lax.axis_index(latent_axis))[:, None]
    vacancies_B = vacancies_B - jnp.sum(jnp.where(earlier_S1, ties_SB, 0), axis=0)

  def lowest_BC() -> jax.Array:
    return tied_BC & (jnp.cumsum(tied_BC, axis=1, dtype=jnp.int32) <= vacancies_B[:, None])

  # The running count takes two thirds of the time where it is needed, and ties that do not all fit in are rare.
  scarce = jnp.any(jnp.sum(tied_BC, axis=1, dtype=jnp.int32) > vacancies_B)
  return above_BC | jax.lax.cond(scarce, lowest_BC, lambda: tied_BC)


def _ordered_bits(v: jax.Array) -> jax.Array:
  """Unsigned integers in the order of the floats; -0 and 0 are one."""
  unsigned = jnp.uint64 if v.dtype.itemsize == 8 else jnp.uint32
  bits = jax.lax.bitcast_convert_type(jnp.where(v == 0, 0, v), unsigned)
  top = jnp.ones((), unsigned) << (8 * bits.dtype.itemsize - 1)
  return jnp.where(bits & top != 0, ~bits, bits | top)
