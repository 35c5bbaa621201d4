"""The kernel that selects on a CPU: the columns of jax.lax.top_k, bit for bit."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from sae_jax import sharding, topk
from sae_jax.config import MeshConfig
from sae_jax.kernels import native

needs_compiler = pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
ROWS, WIDTH, K = 50, 1003, 37  # several blocks of rows, and columns beyond the last whole group


@jax.jit
def by_kernel(product_BF: jax.Array, bias_F: jax.Array) -> tuple[jax.Array, jax.Array]:
  return topk.top_k(product_BF, bias_F, K)


@jax.jit
def by_xla(product_BF: jax.Array, bias_F: jax.Array) -> list[jax.Array]:
  return jax.lax.top_k(product_BF + bias_F[None], K)


def same(product_BF: np.ndarray, bias_F: np.ndarray) -> bool:
  pairs = zip(by_kernel(product_BF, bias_F), by_xla(product_BF, bias_F), strict=True)
  return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@needs_compiler
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), levels=st.sampled_from([0, 1, 2, 5, 50]), odd=st.booleans())
def test_the_kernel_selects_what_xla_selects_bit_for_bit(seed: int, levels: int, odd: bool):
  """Values of a few levels tie within and across groups of columns; odd ones are infinities, NaNs and zeros of both signs."""
  assert native.available()
  rng = np.random.default_rng(seed)
  product_BF = rng.standard_normal((ROWS, WIDTH)).astype(np.float32)
  if levels:
    product_BF = np.round(product_BF * levels) / np.float32(levels)
  bias_F = np.zeros(WIDTH, np.float32) if levels else rng.standard_normal(WIDTH).astype(np.float32)
  if odd:
    odd_ones = np.array([np.inf, -np.inf, np.nan, -np.nan, -0.0, 0.0], np.float32)
    at = rng.random(product_BF.shape) < 0.4
    product_BF[at], bias_F[:] = rng.choice(odd_ones, at.sum()), -0.0
  assert same(product_BF, bias_F)


@needs_compiler
@pytest.mark.parametrize('k', [1, 511, 512])
def test_any_k_up_to_all_columns(k: int):
  product_BF = np.random.default_rng(k).standard_normal((3, 512)).astype(np.float32)
  found = topk.top_k(jnp.asarray(product_BF), jnp.zeros(512), k)[1]
  np.testing.assert_array_equal(found, np.argsort(-product_BF, axis=1, kind='stable')[:, :k])


@needs_compiler
@pytest.mark.parametrize('sign', [1, -1])
def test_sums_of_two_nans_still_give_columns(sign: int):
  """After a divergence all may be NaN; which of two NaNs a sum is, is up to the compiler."""
  product_BF = np.full((ROWS, WIDTH), np.copysign(np.nan, sign), np.float32)
  bias_F = np.full(WIDTH, np.copysign(np.nan, -sign), np.float32)
  _, idx_BK = by_kernel(product_BF, bias_F)
  assert all(len(set(row)) == K and set(row) <= set(range(WIDTH)) for row in np.asarray(idx_BK).tolist())


@needs_compiler
def test_gradients_reach_product_and_bias():
  product_BF = jnp.asarray(np.random.default_rng(0).standard_normal((ROWS, WIDTH)), jnp.float32)
  bias_F = jnp.linspace(0, 1, WIDTH)
  found, expected = (
    jax.grad(lambda p, b, f=f: jnp.sum(f(p, b)[0] ** 2), (0, 1))(product_BF, bias_F) for f in (by_kernel, by_xla)
  )
  for a, b in zip(found, expected, strict=True):  # sums in another order
    np.testing.assert_allclose(a, b, rtol=1e-6)


@needs_compiler
def test_shards_that_run_at_once_each_select_their_own():
  """Several devices of one process share the threads that rows are dealt out to."""
  mesh = sharding.make_mesh(MeshConfig(data=1, latent=4))
  product_BF = np.random.default_rng(1).integers(0, 50, (ROWS, 4 * 600)).astype(np.float32)

  @jax.jit
  @functools.partial(
    jax.shard_map, mesh=mesh, in_specs=(P(None, 'latent'), P('latent')), out_specs=P(None, 'latent'), check_vma=False
  )
  def on_shards(product_BF: jax.Array, bias_F: jax.Array) -> jax.Array:
    return topk.top_k(product_BF, bias_F, 20)[1]

  found_BSk = np.asarray(on_shards(product_BF, np.zeros(4 * 600, np.float32))).reshape(ROWS, 4, 20)
  expected_BSk = np.argsort(-product_BF.reshape(ROWS, 4, 600), axis=2, kind='stable')[:, :, :20]
  np.testing.assert_array_equal(found_BSk, expected_BSk)
