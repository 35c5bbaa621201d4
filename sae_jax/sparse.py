"""Products with k-sparse codes: the decoder's forward pass and every gradient, by the path that suits the platform.

The platform is that of the compiled program, not of the process, so that a step compiled ahead of time on a laptop
takes the path of the chip it is for: Triton kernels on an NVIDIA GPU, dense matmuls on a TPU, and on a CPU loops, or kernels
in C++ with the bits of these loops. All sum in float32 or wider.

`slots` bounds the work where codes are shorter than the array (AuxK with few dead latents): slots from there on must hold
value 0. It may be traced.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.errors import UserError
from sae_jax.kernels import dense, loops, native, products, rows, triton
from sae_jax.kernels.loops import Slots

PATHS = ('loops', 'kernels', 'dense')
_Saved = tuple[jax.Array, jax.Array, jax.Array, Slots]  # the arguments of `decode`

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar('forced', default=None)


@contextlib.contextmanager
def forced(path: str) -> Iterator[None]:
  """Has the sparse products take one of `PATHS`, whatever the platform is.

  It holds for what is traced inside. As a decorator it holds whenever the function is traced, and wherever.
  'auto' changes nothing: an outer `forced` still holds, and without one the platform decides. 'kernels' compiles for CUDA
  only; see `check`.
  """
  if path not in ('auto', *PATHS):
    raise ValueError(f'path {path!r} is none of {PATHS}')
  token = _forced.set(_forced.get() if path == 'auto' else path)
  try:
    yield
  finally:
    _forced.reset(token)


def check(path: str, platform: str, batch: int, n_latents: int, d_model: int) -> None:
  """Raises `UserError` when `mesh.products=path` cannot be had for one shard's tokens and latents on this platform."""
  if path != 'kernels':
    return
  if platform not in ('gpu', 'cuda'):
    raise UserError(f"mesh.products='kernels' needs a CUDA device and this one is a {platform}; use 'auto'")
  if not triton.fits(batch, n_latents, d_model):
    raise UserError(
      f"mesh.products='kernels' cannot address {max(batch, n_latents)} x {d_model} numbers on a device; "
      "use 'auto', or a larger mesh"
    )


def describe(platform: str, batch: int, n_latents: int, d_model: int, k: int) -> str:
  """The path of the products in words, for one shard's tokens and latents on a device's platform ('gpu', 'tpu', …)."""
  path, reason = _path('cuda' if platform == 'gpu' else platform, batch, n_latents, d_model, k)
  in_cpp = platform == 'cpu' and not _forced.get() and min(batch, k) > 1 and native.available()
  words = {
    'loops': 'loops over slots and rows' + ' in C++' * in_cpp,
    'kernels': 'Triton kernels',
    'dense': 'dense matmuls',
  }
  return f'sparse products: {words[path]}, {reason}'


@jax.custom_vjp
def decode(z_BK: jax.Array, idx_BK: jax.Array, w_FD: jax.Array, slots: Slots = None) -> jax.Array:
  """sum_k z[b, k] w[idx[b, k]]: reconstruction [B, D] in the type of w, differentiable in z and w."""
  by_path = (loops.decode, triton.decode, dense.decode)
  cpu = products.decode if _native(idx_BK, z_BK, w_FD) else loops.decode
  return _product(by_path, (z_BK, idx_BK, w_FD), slots, (len(idx_BK), *w_FD.shape, idx_BK.shape[1]), cpu)


def code_gradient(
  idx_BK: jax.Array, w_FD: jax.Array, g_BD: jax.Array, slots: Slots = None, *, uneven: bool = False
) -> jax.Array:
  """<w[idx[b, k]], g[b]>: gradient [B, K] of the codes for reconstruction gradient g; of no use from `slots` on.

  `uneven` says that rows use far fewer slots than there are.
  """
  by_path = (loops.code_gradient, triton.code_gradient, dense.code_gradient)
  cpu = rows.code_gradient if uneven else loops.code_gradient
  return _product(by_path, (idx_BK, w_FD, g_BD), slots, (len(idx_BK), *w_FD.shape, idx_BK.shape[1]), cpu)


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
  uneven: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Adds sum_b dz[b, k] x[b] to row idx[b, k] of the first and sum_b z[b, k] g[b] to that of the second."""
  by_path = (
    loops.add_weight_gradients,
    triton.add_weight_gradients,
    dense.add_weight_gradients,
  )
  args = (dw_enc_FD, dw_dec_FD, idx_BK, dz_BK, x_BD, z_BK, g_BD)
  cpu = rows.add_weight_gradients if uneven else loops.add_weight_gradients
  if _native(idx_BK, dw_enc_FD, dw_dec_FD, dz_BK, x_BD, z_BK, g_BD):
    together = rows.BLOCK if uneven else idx_BK.shape[1] if slots is None else 1
    cpu = functools.partial(products.add_weight_gradients, together=together)
  return _product(by_path, args, slots, (len(idx_BK), *dw_dec_FD.shape, idx_BK.shape[1]), cpu)


def add_at(total_F: jax.Array, idx_BK: jax.Array, values_BK: jax.Array) -> jax.Array:
  """Adds values [B, K] to the entries of total [F] that their indices name."""
  by_path = (loops.add_at, triton.add_at, dense.add_at)
  args = (total_F, idx_BK, values_BK)
  if path := _forced.get():
    return by_path[PATHS.index(path)](*args)
  by_loops, by_triton, by_matmuls = by_path
  tpu = by_matmuls if dense.adds_densely(total_F.size) else by_loops
  return jax.lax.platform_dependent(*args, cuda=by_triton, tpu=tpu, default=by_loops)


def packed(z_BK: jax.Array, idx_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
  """These codes with their zeros last. The index of a zero means nothing. The other values of a row must already descend."""

  # A sort of each row took longer than the products with the codes.
  def by_place(z_BK: jax.Array, idx_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    used_BK = z_BK > 0
    place_BK = jnp.where(used_BK, jnp.cumsum(used_BK, axis=1) - 1, z_BK.shape[1])
    row_B1 = jnp.arange(len(z_BK))[:, None]
    z_BK, idx_BK = (jnp.zeros_like(a_BK).at[row_B1, place_BK].set(a_BK, mode='drop') for a_BK in (z_BK, idx_BK))
    return z_BK, idx_BK

  def by_sort(z_BK: jax.Array, idx_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    order_BK = jnp.argsort(-z_BK, axis=1)
    z_BK, idx_BK = (jnp.take_along_axis(a_BK, order_BK, axis=1) for a_BK in (z_BK, idx_BK))
    return z_BK, idx_BK

  if _forced.get():
    return by_sort(z_BK, idx_BK)
  return jax.lax.platform_dependent(z_BK, idx_BK, cpu=by_place, default=by_sort)


def used_slots(z_BK: jax.Array) -> jax.Array:
  """How many leading slots hold a positive value in some row; values descend along a row."""
  return jnp.max(jnp.sum(z_BK > 0, axis=1))


def _native(idx_BK: jax.Array, *floats: jax.Array) -> bool:
  """Whether products of these codes and arrays are the kernels' in C++."""
  # Beside an accelerator a CPU computes little, and the kernels are not worth building.
  typed = idx_BK.dtype == jnp.int32 and all(a.dtype == jnp.float32 for a in floats)
  wanted = typed and jax.default_backend() == 'cpu'
  # XLA undoes a loop of one pass, over one slot or one token, and then rounds a product and its sum once.
  return wanted and min(idx_BK.shape) > 1 and native.available()


def _path(platform: str, batch: int, n_latents: int, d_model: int, k: int) -> tuple[str, str]:
  if path := _forced.get():
    return path, 'as forced'
  if platform == 'cuda':
    if triton.fits(batch, n_latents, d_model):
      return 'kernels', 'without atomics'
    size = f'{max(batch, n_latents)} x {d_model}'
    return 'loops', f'as {size} numbers are too many for Triton; sums by atomics, not bit-exact'
  if platform == 'tpu':
    enough = dense.dense_from(n_latents, d_model, k)
    if k >= enough:
      return 'dense', f'counted to win from {enough} slots a token on (k={k})'
    return 'loops', f'as dense matmuls are counted to win from {enough} slots a token on (k={k})'
  return 'loops', f'as always on {platform}'


def _product(
  by_path: tuple[Callable, Callable, Callable], args: tuple, slots: Slots, sizes: tuple[int, ...], cpu: Callable
) -> Any:
  if path := _forced.get():
    return by_path[PATHS.index(path)](*args, slots)
  by_loops, by_triton, by_matmuls = by_path
  _, n_latents, d_model, k = sizes

  def over_slots(*args: Any) -> Any:
    # Off the CPU k large gathers and scatters, not B small ones.
    return by_loops(*args[:-1], k if args[-1] is None else args[-1])

  def dense_if_worth_it(*args: Any) -> Any:
    enough = dense.dense_from(n_latents, d_model, k)
    return by_matmuls(*args) if slots is None else jax.lax.cond(args[-1] < enough, over_slots, by_matmuls, *args)

  off_cpu = {'loops': over_slots, 'kernels': by_triton, 'dense': dense_if_worth_it}
  cuda, tpu = (off_cpu[_path(platform, *sizes)[0]] for platform in ('cuda', 'tpu'))
  return jax.lax.platform_dependent(*args, slots, cuda=cuda, tpu=tpu, cpu=cpu, default=by_loops)


def _decode_forward(z_BK: jax.Array, idx_BK: jax.Array, w_FD: jax.Array, slots: Slots) -> tuple[jax.Array, _Saved]:
  return decode(z_BK, idx_BK, w_FD, slots), (z_BK, idx_BK, w_FD, slots)


def _decode_backward(saved: _Saved, g_BD: jax.Array) -> tuple[jax.Array, None, jax.Array, None]:
  z_BK, idx_BK, w_FD, slots = saved
  zeros_FD, zeros_BK = jnp.zeros_like(w_FD), jnp.zeros_like(z_BK)
  dz_BK = code_gradient(idx_BK, w_FD, g_BD, slots).astype(z_BK.dtype)
  # There is no encoder here, and a kernel passes over codes of 0.
  _, dw_FD = add_weight_gradients(zeros_FD, zeros_FD, idx_BK, zeros_BK, g_BD, z_BK, g_BD, slots)
  return dz_BK, None, dw_FD, None


decode.defvjp(_decode_forward, _decode_backward)
