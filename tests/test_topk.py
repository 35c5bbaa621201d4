"""Exact top-k on one shard and across shards equals `jax.lax.top_k`, ties included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sae_jax import topk


def tied_rows(seed: int, rows: int, width: int, levels: int) -> np.ndarray:
  """Few distinct values, so most rows tie at the k-th; negative ones too."""
  return np.random.default_rng(seed).integers(-levels, levels + 1, (rows, width)).astype(np.float32)


def chosen(v, idx, kept, width):
  """Per row: the sorted (global index, value) pairs kept over all shards; inputs are [shards, B, m]."""
  offset = np.arange(v.shape[0])[:, None, None] * width
  rows = []
  for b in range(v.shape[1]):
    mask = kept[:, b]
    rows.append(sorted(zip((idx + offset)[:, b][mask].tolist(), v[:, b][mask].tolist(), strict=True)))
  return rows


@pytest.mark.parametrize('data,latent', [(1, 8), (2, 4), (8, 1), (4, 2)])
@pytest.mark.parametrize('k', [1, 5, 13, 40])  # width 40 over 8 shards: k > n/shards, and k = n
def test_select_equals_unsharded(data, latent, k):
  mesh = jax.make_mesh((data, latent), ('data', 'latent'), axis_types=(AxisType.Auto,) * 2)
  pre_BF = tied_rows(k, 8, 40, 3)
  pre_BF[1] = -np.abs(pre_BF[1]) - 1  # all negative
  pre_BF[2] = 0.5  # all tied

  def local(pre):
    return tuple(a[None] for a in topk.select(pre, jnp.zeros(pre.shape[1]), k, 'latent'))

  spec = P('latent', 'data')
  got = jax.jit(
    jax.shard_map(local, mesh=mesh, in_specs=P('data', 'latent'), out_specs=(spec,) * 3, check_vma=False)
  )(pre_BF)
  v, idx = jax.lax.top_k(pre_BF, k)
  expected = chosen(np.asarray(v)[None], np.asarray(idx)[None], np.ones((1, 8, k), bool), 40)
  assert chosen(*(np.asarray(a) for a in got), 40 // latent) == expected


@settings(max_examples=25, deadline=None)
@given(
  seed=st.integers(0, 2**31 - 1), groups=st.integers(2, 9), group=st.sampled_from([2, 5, 16]),
  levels=st.sampled_from([1, 4, 10_000]), data=st.data(),
)  # fmt: skip
def test_two_stage_equals_lax(seed, groups, group, levels, data):
  k = data.draw(st.integers(1, groups))
  pre_BF = jnp.asarray(tied_rows(seed, 3, groups * group, levels))
  pre_BF = pre_BF.at[0, : group + 1].set(-jnp.inf)  # masked latents
  bias_F = jnp.asarray(tied_rows(seed + 1, 1, groups * group, 1)[0])
  expected_pair = jax.lax.top_k(pre_BF + bias_F[None], k)
  for got, expected in zip(topk.two_stage(pre_BF, bias_F, k, group), expected_pair, strict=True):
    np.testing.assert_array_equal(got, expected)


def test_top_k_long_rows_take_two_stages_and_agree():
  pre_BF = jnp.asarray(tied_rows(0, 3, 16_384, 50))
  for got, expected in zip(topk.top_k(pre_BF, jnp.zeros(16_384), 11), jax.lax.top_k(pre_BF, 11), strict=True):
    np.testing.assert_array_equal(got, expected)
