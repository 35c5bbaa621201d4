"""Exact top-k on one shard and across shards equals `jax.lax.top_k`, ties included."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sae_jax import sharding, topk
from sae_jax.config import MeshConfig


def tied_rows(seed: int, rows: int, width: int, levels: int) -> np.ndarray:
  """Few distinct values, so most rows tie at the k-th; negative ones too."""
  return np.random.default_rng(seed).integers(-levels, levels + 1, (rows, width)).astype(np.float32)


@functools.cache
def selector(k: int, mesh: Mesh, method: str):
  """Candidates, indices and winners of every shard of a mesh, compiled: arrays [shards, B, m]."""

  def local(pre):
    width = pre.shape[1]
    v_Bm, idx_Bm = topk.top_k(pre, jnp.zeros(width, pre.dtype), min(k, width))
    return tuple(a[None] for a in (v_Bm, idx_Bm, topk.select(v_Bm, k, width, 'latent', method)))

  spec = P('latent', 'data')
  return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P('data', 'latent'), out_specs=(spec,) * 3, check_vma=False))


def winners(pre_BF: np.ndarray, k: int, data: int, latent: int, method: str) -> list[list[tuple[int, float]]]:
  """Per row: the sorted (global index, value) pairs that the shards keep between them."""
  mesh = sharding.make_mesh(MeshConfig(data, latent))
  v, idx, kept = (np.asarray(a) for a in selector(k, mesh, method)(pre_BF))
  assert (np.diff(kept.astype(int), axis=-1) <= 0).all()  # they lead: loops over slots may stop after them
  idx = idx + np.arange(latent)[:, None, None] * (pre_BF.shape[1] // latent)
  return [
    sorted(zip(idx[:, b][kept[:, b]].tolist(), v[:, b][kept[:, b]].tolist(), strict=True)) for b in range(len(pre_BF))
  ]


def unsharded(pre_BF: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
  v_BK, idx_BK = (np.asarray(a) for a in jax.lax.top_k(pre_BF, k))
  return [sorted(zip(i.tolist(), v.tolist(), strict=True)) for i, v in zip(idx_BK, v_BK, strict=True)]


def hard_rows(seed: int) -> np.ndarray:
  """[8, 40]: ties everywhere, and rows that are all negative, all tied, all masked, or won by one shard alone."""
  pre_BF = tied_rows(seed, 8, 40, 3)
  pre_BF[1] = -np.abs(pre_BF[1]) - 1
  pre_BF[2] = 0.5
  pre_BF[3] = -np.inf
  pre_BF[4, 20:25] = 50 + np.arange(5)  # the winners of k <= 5 sit in one shard of eight
  pre_BF[5] = np.linspace(1e-38, 3e38, 40, dtype=np.float32)[::-1]  # all of them in the first shards
  pre_BF[6, ::2] = -np.inf  # a few live entries, as under a dead mask
  return pre_BF


@pytest.mark.parametrize('method', ['gather', 'count'])
@pytest.mark.parametrize('data,latent', [(1, 8), (2, 4), (8, 1), (4, 2)])
@pytest.mark.parametrize('k', [1, 5, 13, 40])  # width 40 over 8 shards: k > n/shards, and k = n
def test_select_equals_unsharded(data, latent, k, method):
  pre_BF = hard_rows(k)
  assert winners(pre_BF, k, data, latent, method) == unsharded(pre_BF, k)


@settings(max_examples=15, deadline=None)
@given(
  seed=st.integers(0, 2**31 - 1),
  levels=st.sampled_from([1, 2, 10_000]),
  scale=st.sampled_from([1e-30, 1, 1e30]),
)
def test_counting_equals_unsharded(seed, levels, scale):
  pre_BF = tied_rows(seed, 4, 24, levels) * np.float32(scale)
  assert winners(pre_BF, 7, 1, 8, 'count') == unsharded(pre_BF, 7)


@pytest.mark.parametrize('k', [1, 5, 13, 40])
def test_counted_entries_of_one_shard_are_the_top_k(k):
  pre_BF = hard_rows(k)
  kept_BF = topk.counted(jnp.asarray(pre_BF), k, None)
  expected_BF = jax.nn.one_hot(jax.lax.top_k(pre_BF, k)[1], 40).sum(1)
  np.testing.assert_array_equal(kept_BF, expected_BF)
  assert topk.counted(jnp.asarray(pre_BF[:, :3]), 5, None).all()  # fewer than k: all they have


def test_counting_works_in_float64(x64):
  pre_BF = np.random.default_rng(3).standard_normal((4, 24)) + 1e-12 * np.arange(24)
  assert winners(pre_BF, 7, 2, 4, 'count') == unsharded(pre_BF, 7)


def test_exchange_gathers_little_and_counts_much():
  assert topk.exchange(k=32, shards=4, width=8192, rows=2048) == 'gather'
  assert topk.exchange(k=256, shards=128, width=131_072, rows=32_768) == 'count'
  assert topk.exchange(k=256, shards=128, width=131_072, rows=8) == 'gather'  # rounds would cost more than bytes


@functools.cache
def two_stage(k: int, group: int):
  return jax.jit(lambda pre_BF, bias_F: topk.two_stage(pre_BF, bias_F, k, group))


# Few shapes, since each is a compilation; many values.
@pytest.mark.parametrize(('groups', 'group', 'k'), [(2, 5, 1), (3, 2, 3), (9, 16, 4), (7, 5, 7)])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31 - 1), levels=st.sampled_from([1, 4, 10_000]))
def test_two_stage_equals_lax(groups, group, k, seed, levels):
  pre_BF = tied_rows(seed, 3, groups * group, levels)
  pre_BF[0, : group + 1] = -np.inf  # masked latents
  bias_F = tied_rows(seed + 1, 1, groups * group, 1)[0]
  expected_pair = jax.lax.top_k(pre_BF + bias_F[None], k)
  for got, expected in zip(two_stage(k, group)(pre_BF, bias_F), expected_pair, strict=True):
    np.testing.assert_array_equal(got, expected)


def test_top_k_long_rows_take_two_stages_and_agree():
  pre_BF = jnp.asarray(tied_rows(0, 3, 16_384, 50))
  for got, expected in zip(topk.top_k(pre_BF, jnp.zeros(16_384), 11), jax.lax.top_k(pre_BF, 11), strict=True):
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(('width', 'group'), [(65_536, 128), (32_768, 16)])
def test_groups_are_as_wide_as_a_register_where_a_tpu_then_has_no_more_candidates(width, group):
  search = jax.jit(lambda pre_BF, bias_F: topk.top_k(pre_BF, bias_F, 32))
  shapes = jax.ShapeDtypeStruct((8, width), np.float32), jax.ShapeDtypeStruct((width,), np.float32)
  for platform, size in (('tpu', group), ('cuda', 16)):
    text = search.trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    assert f'tensor<8x{width // size}x{size}xf32>' in text, platform


def test_counting_on_one_shard_takes_each_row_its_own_k_and_of_ties_the_lowest_index():
  v_BC = np.random.default_rng(4).integers(0, 6, (9, 33)).astype(np.float32)
  k_B = 4 * np.arange(9)
  place_BC = np.argsort(np.argsort(-v_BC, axis=1, kind='stable'), axis=1)
  got_BC = topk.counted(jnp.asarray(v_BC), jnp.asarray(k_B), None)
  np.testing.assert_array_equal(got_BC, place_BC < k_B[:, None])
