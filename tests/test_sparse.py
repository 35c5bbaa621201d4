"""Every path of the sparse products against one slow reference, and which path a platform gets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import sparse
from sae_jax.kernels import dense, rows, triton

RUN = 2  # pairs that one program sums, so that tiny cases have latents with several runs


@pytest.fixture(params=sparse.PATHS)
def path(request, monkeypatch, x64):
  """One path for all products in float64, kernels interpreted, dense products in several small chunks."""
  for name in ('decode', 'code_gradient', 'add_at'):
    monkeypatch.setattr(triton, name, functools.partial(getattr(triton, name), interpret=True))
  gradients = functools.partial(triton.add_weight_gradients, interpret=True, run=RUN)
  monkeypatch.setattr(triton, 'add_weight_gradients', gradients)
  monkeypatch.setattr(dense, '_CHUNK', 128)
  monkeypatch.setattr(dense, '_SCRATCH', 512)
  with jax.default_matmul_precision('highest'), sparse.forced(request.param):
    yield request.param


def case(seed: int, rows: int, width: int, n_latents: int, k: int, dtype=np.float64) -> dict[str, np.ndarray]:
  """Codes with a latent that fires everywhere, an index twice in a row, and a row without values."""
  rng = np.random.default_rng(seed)
  idx_BK = rng.integers(0, n_latents, (rows, k))
  idx_BK[:, 0] = n_latents - 1
  z_BK, dz_BK = rng.standard_normal((2, rows, k))
  z_BK[:, -1] *= rng.random(rows) < 0.5
  dz_BK[z_BK == 0] = 0
  idx_BK[z_BK == 0] = 0  # as slots that another shard won
  z_BK[rows // 2], dz_BK[rows // 2] = 0, 0
  if k > 2:
    idx_BK[:, 1] = idx_BK[:, 2]
  floats = {
    'z': z_BK,
    'dz': dz_BK,
    'x': rng.standard_normal((rows, width)),
    'g': rng.standard_normal((rows, width)),
    'w': rng.standard_normal((n_latents, width)),
    'enc': rng.standard_normal((n_latents, width)),
    'dec': rng.standard_normal((n_latents, width)),
    'total': rng.standard_normal(n_latents),
  }
  return {'idx': idx_BK.astype(np.int32)} | {name: a.astype(dtype) for name, a in floats.items()}


def reference(c: dict[str, np.ndarray], slots: int | None = None) -> dict[str, np.ndarray]:
  """Pair by pair in float64."""
  (rows, k), c = c['idx'].shape, {name: a.astype(np.float64) for name, a in c.items()}
  out = {
    'decode': np.zeros_like(c['x']),
    'code_gradient': np.zeros((rows, k)),
    'enc': c['enc'].copy(),
    'dec': c['dec'].copy(),
    'total': c['total'].copy(),
  }
  for b in range(rows):
    for j in range(k if slots is None else slots):
      f = int(c['idx'][b, j])
      out['decode'][b] += c['z'][b, j] * c['w'][f]
      out['code_gradient'][b, j] = c['w'][f] @ c['g'][b]
      out['enc'][f] += c['dz'][b, j] * c['x'][b]
      out['dec'][f] += c['z'][b, j] * c['g'][b]
      out['total'][f] += c['z'][b, j]
  return out


@pytest.mark.parametrize('n_rows', [1, 16, 23])  # of which several at once have their codes' gradients made
@pytest.mark.parametrize(('k', 'slots'), [(5, None), (70, 33), (70, 0), (100, None), (100, 3)])
def test_loops_over_blocks_of_slots_agree_with_the_reference(n_rows, k, slots, x64):
  c = case(3, n_rows, 7, 90, k)
  if slots is not None:
    c['z'][:, slots:], c['dz'][:, slots:] = 0, 0
  expected, traced = reference(c, slots), None if slots is None else jnp.int32(slots)
  dz_BK = jax.jit(rows.code_gradient)(c['idx'], c['w'], c['g'], traced)
  np.testing.assert_allclose(dz_BK[:, :slots], expected['code_gradient'][:, :slots], rtol=1e-12)
  args = (c[name] for name in ('enc', 'dec', 'idx', 'dz', 'x', 'z', 'g'))
  for name, found in zip(('enc', 'dec'), jax.jit(rows.add_weight_gradients)(*args, traced), strict=True):
    np.testing.assert_allclose(found, expected[name], rtol=1e-12, atol=1e-14)


def test_codes_are_packed_alike_by_place_and_by_sort():
  rng = np.random.default_rng(5)
  z_BK = -np.sort(-np.round(rng.random((6, 40)), 1), axis=1)  # with ties
  z_BK = np.where(rng.random(z_BK.shape) < np.linspace(0, 1, 6)[:, None], z_BK, 0).astype(np.float32)
  idx_BK = rng.integers(0, 90, z_BK.shape).astype(np.int32)
  z_BK[5] = 1  # so that rows use from none to all of their slots
  by_place = jax.jit(sparse.packed)(z_BK, idx_BK)
  with sparse.forced('loops'):
    by_sort = jax.jit(lambda *codes: sparse.packed(*codes))(z_BK, idx_BK)
  for b, used in enumerate((z_BK > 0).sum(1)):
    for codes in (by_place, by_sort):
      np.testing.assert_array_equal(codes[0][b], [*z_BK[b][z_BK[b] > 0], *[0] * (40 - used)])
      np.testing.assert_array_equal(codes[1][b, :used], idx_BK[b][z_BK[b] > 0])


def products(c: dict[str, np.ndarray], slots: int | None = None) -> dict[str, jax.Array]:
  """All products in one program, with `slots` traced."""

  def run(c, slots):
    enc, dec = sparse.add_weight_gradients(c['enc'], c['dec'], c['idx'], c['dz'], c['x'], c['z'], c['g'], slots)
    return {
      'decode': sparse.decode(c['z'], c['idx'], c['w'], slots),
      'code_gradient': sparse.code_gradient(c['idx'], c['w'], c['g'], slots),
      'enc': enc,
      'dec': dec,
      'total': sparse.add_at(c['total'], c['idx'], c['z']),
    }

  # A compile a shape: unoptimised code is the faster test.
  return jax.jit(run, compiler_options={'xla_backend_optimization_level': 0})(c, slots)


def assert_close(got, expected, tolerance: float):
  for name in expected:
    np.testing.assert_allclose(got[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


# Few shapes, since each is a compilation: the smallest, sizes that divide nothing, one latent, many latents.
SHAPES = [(1, 1, 1, 1), (5, 3, 1, 1), (7, 17, 129, 1), (9, 19, 300, 4), (2, 5, 31, 3)]


@pytest.mark.parametrize('shape', SHAPES)
def test_products_equal_the_reference_on_any_shape(path, shape):
  c = case(sum(shape), *shape)
  assert_close(products(c), reference(c), 1e-9)


@pytest.mark.parametrize('slots', [3, 35])
def test_products_stop_at_the_slots_in_use(path, slots):
  c = case(2, rows=5, width=7, n_latents=23, k=37)  # more than the kernels sort at once where few are in use
  c['z'][:, slots:], c['dz'][:, slots:] = 0, 0
  assert_close(products(c, slots), reference(c, slots), 1e-9)


def test_decode_has_the_reference_gradients(path):
  c = case(3, rows=5, width=7, n_latents=23, k=3)

  def loss(z_BK, w_FD):
    return jnp.sum(sparse.decode(z_BK, jnp.asarray(c['idx']), w_FD) * c['g'])

  dz_BK, dw_FD = jax.jit(jax.grad(loss, (0, 1)))(c['z'], c['w'])
  expected = reference(c)
  np.testing.assert_allclose(dz_BK, expected['code_gradient'], rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(dw_FD, expected['dec'] - c['dec'], rtol=1e-9, atol=1e-9)


def test_a_batch_of_decodes_is_the_decodes_of_a_batch(path):
  cases = [case(seed, rows=5, width=7, n_latents=23, k=3) for seed in (4, 5)]
  z, idx, w = (np.stack([c[name] for c in cases]) for name in ('z', 'idx', 'w'))
  got = jax.jit(jax.vmap(sparse.decode))(z, idx, w)
  np.testing.assert_allclose(got, [reference(c)['decode'] for c in cases], rtol=1e-9, atol=1e-9)


def test_ties_keep_the_selected_latents_only(path):
  """All pre-activations equal: a mask of those at or above the k-th would keep every latent."""
  n_latents, k = 131, 3
  v_BK, idx_BK = jax.lax.top_k(jnp.ones((2, n_latents)), k)
  x_BD = sparse.decode(v_BK, idx_BK, jnp.eye(n_latents))
  np.testing.assert_array_equal(x_BD, np.tile(np.arange(n_latents) < k, (2, 1)))


def test_bfloat16_sums_do_not_stall(path):
  """One at a time onto bfloat16 would stop at 256; 600 and 1,200 are bfloat16 numbers."""
  shapes = {'z': (2, 600), 'dz': (2, 600), 'x': (2, 600), 'g': (2, 600), 'w': (3, 600)}
  c = {name: jnp.ones(shape, jnp.bfloat16) for name, shape in shapes.items()}
  zeros = jnp.zeros((3, 600), jnp.bfloat16)
  c |= {'idx': jnp.ones((2, 600), jnp.int32), 'enc': zeros, 'dec': zeros, 'total': zeros[:, 0]}
  got = products(c)
  assert {a.dtype for a in got.values()} == {jnp.dtype(jnp.bfloat16)}
  np.testing.assert_array_equal(got['decode'], np.full((2, 600), 600))
  np.testing.assert_array_equal(got['code_gradient'], np.full((2, 600), 600))
  for name in ('enc', 'dec', 'total'):
    expected = np.zeros(got[name].shape)
    expected[1] = 1200
    np.testing.assert_array_equal(got[name], expected, err_msg=name)


def test_forced_refuses_an_unknown_path():
  with pytest.raises(ValueError, match=r"'fast'.*loops"), sparse.forced('fast'):
    pass
