"""Kernels in C++: built once a machine, the bits of XLA's own loops, and what is done without them."""

import functools
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_jax import sharding, sparse, topk
from sae_jax import step as stepping
from sae_jax.data.source import open_source
from sae_jax.kernels import loops, native, products, rows
from tests import cells

needs_compiler = pytest.mark.skipif(not shutil.which('c++'), reason='no C++ compiler')
B, D, F, K = 35, 77, 43, 70  # blocks of tokens, latents and slots that are not full


@needs_compiler
def test_it_is_built_where_the_cache_is_and_found_there_again(monkeypatch, tmp_path):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setattr(jax.ffi, 'register_ffi_target', lambda *args, **kwargs: None)  # it is registered already
  assert native.available.__wrapped__()
  (built,) = (tmp_path / 'sae_jax').iterdir()
  when = built.stat().st_mtime_ns
  assert native.available.__wrapped__()
  assert [path.stat().st_mtime_ns for path in (tmp_path / 'sae_jax').iterdir()] == [when]


def test_a_kernel_that_another_process_built_meanwhile_stays(monkeypatch, tmp_path):
  path = tmp_path / 'kernel.so'

  def compiled(command: list[str], **kwargs: object):
    pathlib.Path(command[-1]).write_text('ours')
    path.write_text('theirs')

  monkeypatch.setattr(native.subprocess, 'run', compiled)
  monkeypatch.setattr(native.ctypes, 'CDLL', lambda name: pathlib.Path(name).read_text())
  assert native._built({}, ['c++'], path) == 'theirs' and list(tmp_path.iterdir()) == [path]


@needs_compiler
def test_a_kernel_that_is_not_whole_is_built_again_and_never_loaded(tmp_path):
  path, source = tmp_path / 'kernel.so', {'one.cc': b'extern "C" int one() { return 1; }'}
  compiler = ['env', 'c++']  # with an argument
  native._built(source, compiler, path)
  whole = path.read_bytes()
  # What a full disk, a loss of power, and a version without a digest leave. To load one may end the process.
  for left in (b'', whole[:64], whole[: len(whole) // 4], whole[:-1], whole[:-200] + bytes(200), whole[:-32]):
    other = tmp_path / f'{len(left)}-{left[-1:].hex()}.so'
    other.write_bytes(left)
    assert native._built(source, compiler, other).one() == 1
    assert native._is_whole(other.read_bytes())


@needs_compiler
def test_a_kernel_that_cannot_be_loaded_is_not_built_at_every_start(monkeypatch, tmp_path):
  library = b'of another machine'
  (tmp_path / 'kernel.so').write_bytes(library + native.hashlib.sha256(library).digest())
  monkeypatch.setattr(native.subprocess, 'run', None)
  with pytest.raises(OSError):
    native._built({}, ['c++'], tmp_path / 'kernel.so')


@needs_compiler
@pytest.mark.parametrize('cxx', ['c++ "', 'c++ -include /dev/null'])
def test_a_compiler_that_is_none_or_makes_something_else_is_none(monkeypatch, tmp_path, cxx):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setenv('CXX', cxx)
  monkeypatch.setattr(native, '_SYMBOLS', ('no_such_kernel',))
  monkeypatch.setattr(native, '_SOURCES', ('blocks.h',))  # without a unit: the linker has nothing to do
  assert not native.available.__wrapped__()


@needs_compiler
def test_without_a_home_there_is_none(monkeypatch):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(native.os.path, 'expanduser', lambda path: path)  # as for a user whom the system does not know
  assert not native.available.__wrapped__()


def test_a_blank_cxx_is_none(monkeypatch):
  asked = []
  monkeypatch.setenv('CXX', ' ')
  monkeypatch.setattr(native.shutil, 'which', asked.append)
  assert not native.available.__wrapped__() and asked == ['c++']


@pytest.mark.parametrize('compiler', ['no-such-compiler', 'false'])
def test_without_a_compiler_that_works_xla_selects_and_multiplies(monkeypatch, tmp_path, compiler: str):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  monkeypatch.setenv('CXX', compiler)
  assert not native.available.__wrapped__()
  assert not list(tmp_path.rglob('*.so'))
  monkeypatch.setattr(native, 'available', lambda: False)
  assert 'no C++ compiler' in topk.describe('cpu', 600) and not topk.describe('tpu', 600)
  product_BF = np.random.default_rng(0).standard_normal((2, 600)).astype(np.float32)
  found = topk.top_k(jnp.asarray(product_BF), jnp.zeros(600), 5)[1]
  np.testing.assert_array_equal(found, np.argsort(-product_BF, axis=1, kind='stable')[:, :5])


@functools.cache
def program(kernel: bool, order: str):
  """Decode and weight gradients of one order of sums, by the kernels or by XLA."""
  slots_given = order != 'rows first'
  added = rows.add_weight_gradients if order == 'blocks of slots' else loops.add_weight_gradients
  decode = loops.decode
  if kernel:
    together = {'rows first': K, 'slots first': 1, 'blocks of slots': rows.BLOCK}[order]
    decode, added = products.decode, functools.partial(products.add_weight_gradients, together=together)

  @jax.jit
  def run(enc_FD, dec_FD, idx_BK, dz_BK, x_BD, z_BK, g_BD, slots):
    used = slots if slots_given else None
    return decode(z_BK, idx_BK, dec_FD, used), *added(enc_FD, dec_FD, idx_BK, dz_BK, x_BD, z_BK, g_BD, used)

  return run


@needs_compiler
@settings(max_examples=15, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  slots=st.sampled_from([0, 1, 32, 33, K]),
  active=st.sampled_from([0.0, 0.1, 1.0]),
  large=st.booleans(),
  astray=st.booleans(),
)
@pytest.mark.parametrize('order', ['rows first', 'slots first', 'blocks of slots'])
def test_products_are_those_of_xla_bit_for_bit(
  order: str, seed: int, slots: int, active: float, large: bool, astray: bool
):
  """Latents that a token has twice, latents without a token, tokens without a code, sums that overflow, and indices that
  count from the end or are none."""
  assert native.available()
  rng = np.random.default_rng(seed)
  of = rng.integers(0, F // 2, (B, K)).astype(np.int32)
  if astray:
    strange = rng.random(of.shape) < 0.01
    of[strange] = rng.choice([-1, -F, -F - 1, F, 2**31 - 1, -(2**31)], strange.sum())
  scale = np.float32(1e37 if large else 1)
  enc_FD, dec_FD = rng.standard_normal((2, F, D)).astype(np.float32) * scale
  x_BD, g_BD = rng.standard_normal((2, B, D)).astype(np.float32)
  z_BK = np.where(rng.random((B, K)) < active, rng.random((B, K)) * 9, 0).astype(np.float32)
  dz_BK = np.where(z_BK > 0, rng.standard_normal((B, K)), 0).astype(np.float32)
  z_BK[:, slots:], dz_BK[:, slots:] = 0, 0
  args = (enc_FD, dec_FD, of, dz_BK, x_BD, z_BK, g_BD, np.int32(slots))
  for by_kernel, by_xla in zip(program(True, order)(*args), program(False, order)(*args), strict=True):
    assert np.asarray(by_kernel).tobytes() == np.asarray(by_xla).tobytes()


@needs_compiler
@pytest.mark.parametrize(('tokens', 'k'), [(1, 6), (6, 1), (2, 2)])
def test_a_loop_of_one_pass_has_the_bits_of_xla_too(tokens: int, k: int):
  """XLA undoes it, and fuses what is in it with what stands around."""
  rng = np.random.default_rng(tokens)
  w_FD, x_BD = (rng.standard_normal((rows, 64)).astype(np.float32) for rows in (9, tokens))
  args = w_FD, rng.integers(0, 9, (tokens, k)).astype(np.int32), rng.random((tokens, k)).astype(np.float32), x_BD

  def run(w_FD, idx_BK, z_BK, x_BD, slots):
    given = (idx_BK, z_BK, x_BD, z_BK, x_BD)
    grads = [sparse.add_weight_gradients(w_FD * 1.5, w_FD * 1.5, *given, used) for used in (None, slots)]
    return sparse.decode(z_BK, idx_BK, w_FD), grads

  found = jax.jit(run)(*args, np.int32(k))
  with sparse.forced('loops'):
    expected = jax.jit(lambda *args: run(*args))(*args, np.int32(k))
  for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# Which of them it is depends on whether XLA runs a program at once or hands it to a thread.
ENDED = (ValueError, jax.errors.JaxRuntimeError)


@needs_compiler
def test_arrays_that_do_not_fit_together_end_the_program():
  assert native.available()
  of, some, w_FD, x_BD = np.zeros((2, 3), np.int32), *(np.ones(shape, np.float32) for shape in ((2, 3), (5, 4), (2, 4)))
  with pytest.raises(ENDED, match=r'z \[B, K\] and x'):
    jax.block_until_ready(products.decode(some[:, :2], of, w_FD))
  with pytest.raises(ENDED, match='both gradients'):
    jax.block_until_ready(products.add_weight_gradients(w_FD, w_FD, of, some, x_BD[:1], some, x_BD, together=3))
  with pytest.raises(ENDED, match='one or more together'):
    jax.block_until_ready(products.add_weight_gradients(w_FD, w_FD, of, some, x_BD, some, x_BD, together=0))


@needs_compiler
def test_training_ends_with_the_same_bits_without_the_kernels(monkeypatch):
  """Sparse families as one group over all devices, with dead latents; XLA's selection among so few columns is the same."""
  group = [
    cells.cell(**{'mesh.data': 2, 'mesh.latent': 4, 'loss.dead_tokens': 40, 'sae.activation': name})
    for name in ('topk', 'batchtopk', 'multitopk', 'matryoshka')
  ]
  mesh, source, params = sharding.make_mesh(group[0].mesh), open_source(group[0]), {}
  size = group[0].train.batch_tokens
  first = jnp.asarray(source.rows(0, stepping.SAMPLE))
  inits = [stepping.make_step(one, mesh)[0] for one in group]
  fresh = tuple(init(jnp.zeros(one.sae.d_model), jnp.float32(1), first) for init, one in zip(inits, group, strict=True))
  for kernels in (True, False):
    if not kernels:
      monkeypatch.setattr(native, 'available', lambda: False)
    stepping._programs.cache_clear()
    step = stepping.make_group_step(group, mesh)
    states = jax.tree.map(jnp.copy, fresh)  # a step takes over the memory of what it is given
    for i in range(6):
      x_BD = sharding.place_rows(
        mesh, (size, source.d_model), lambda a, b, i=i: source.rows(i * size + a, i * size + b)
      )
      states, _ = step(states, x_BD)
    assert all(int(state.aux_steps) > 0 for state in states)
    params[kernels] = [np.asarray(a).tobytes() for state in states for a in jax.tree.leaves(state.params)]
  stepping._programs.cache_clear()
  assert params[True] == params[False]
