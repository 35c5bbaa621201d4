"""Whether an accelerator computes what a CPU does: sparse products by path, a step of every family, and selection.

What is judged starts from small multiples of a power of two. So pre-activations are exact in any order of sums: they tie
often, and no selection may differ. Gradients and updates differ by rounding. At a lower precision selections do differ, and
errors are reported without a verdict.
"""

import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bench import families
from bench.parts import Measured, Row, Skipped
from sae_jax import config, sharding, sparse, topk
from sae_jax.families.family import family
from sae_jax.kernels import triton
from sae_jax.step import abstract_state, make_step

TOLERANCE = 1e-5  # of float32 sums in another order, relative to the largest number of an output
EXACT = 'float32, highest'  # the precision that is judged; of others the errors are reported
PRECISIONS = (EXACT, 'float32, default', 'bfloat16')
_K_AUX = 8
_DEAD = 3 / 8  # share of the latents: more than AuxK takes without a selection

Shape = tuple[int, ...]  # d, n, B, k


@contextlib.contextmanager
def interpreted(yes: bool) -> Iterator[None]:
  """Has the Triton kernels interpreted, which a CPU can do."""
  names = ('decode', 'code_gradient', 'add_weight_gradients', 'add_at') if yes else ()
  with contextlib.ExitStack() as stack:
    for name in names:
      stack.enter_context(mock.patch.object(triton, name, functools.partial(getattr(triton, name), interpret=True)))
    yield


def products(shape: Shape, precisions: Sequence[str], interpret: bool) -> Iterator[Measured]:
  """Every path at each precision against float64 in numpy, also with fewer slots in use than there are."""
  for path in sparse.PATHS:
    for precision in precisions:
      for slots in (None, shape[3] // 2) if precision == EXACT else (None,):
        about = {'path': path, 'precision': precision, 'slots': slots}
        yield about, functools.partial(_products_row, shape, path, precision, slots, interpret)


def _products_row(shape: Shape, path: str, precision: str, slots: int | None, interpret: bool) -> Row:
  if path == 'kernels' and not interpret and jax.devices()[0].platform != 'gpu':
    raise Skipped('Triton kernels need an NVIDIA GPU')
  c = _codes(shape, slots)
  given = {
    name: a.astype(jnp.bfloat16 if precision == 'bfloat16' and a.dtype == np.float32 else a.dtype)
    for name, a in c.items()
  }

  def all_products(c: dict[str, jax.Array], slots: jax.Array | None) -> dict[str, jax.Array]:
    enc_FD, dec_FD = sparse.add_weight_gradients(c['w'], c['w'], c['idx'], c['dz'], c['x'], c['z'], c['g'], slots)
    return {
      'decode': sparse.decode(c['z'], c['idx'], c['w'], slots),
      'code_gradient': sparse.code_gradient(c['idx'], c['w'], c['g'], slots)[:, : shape[3] // 2],
      'encoder_gradient': enc_FD,
      'decoder_gradient': dec_FD,
      'add_at': sparse.add_at(c['w'][:, 0], c['idx'], c['z']),
    }

  with interpreted(interpret), sparse.forced(path), _at(precision):
    found = jax.jit(all_products)(given, None if slots is None else jnp.int32(slots))
  return _judged(found, _expected(c), precision)


def _codes(shape: Shape, slots: int | None) -> dict[str, np.ndarray]:
  """Codes with a latent that fires on every token, one that fires twice on a token, and tokens without any."""
  d, n, batch, k = shape
  rng = np.random.default_rng(0)
  idx_BK = rng.integers(0, n, (batch, k), dtype=np.int32)
  idx_BK[:, 0], idx_BK[:, -1] = n - 1, idx_BK[:, -2]
  z_BK, dz_BK = rng.standard_normal((2, batch, k), np.float32)
  z_BK[:: batch // 4], dz_BK[:: batch // 4] = 0, 0
  z_BK[:, slots or k :], dz_BK[:, slots or k :] = 0, 0
  made = {name: rng.standard_normal((rows, d), np.float32) for name, rows in (('x', batch), ('g', batch), ('w', n))}
  return made | {'idx': idx_BK, 'z': z_BK, 'dz': dz_BK}


def _expected(c: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The products in float64, by dense codes."""
  idx_BK = c['idx']
  z, dz, x, g, w = (c[name].astype(np.float64) for name in ('z', 'dz', 'x', 'g', 'w'))
  z_BF, dz_BF = np.zeros((2, len(x), len(w)))
  for dense_BF, values_BK in ((z_BF, z), (dz_BF, dz)):
    np.add.at(dense_BF, (np.arange(len(x))[:, None], idx_BK), values_BK)
  return {
    'decode': z_BF @ w,
    'code_gradient': np.take_along_axis(g @ w.T, idx_BK, axis=1)[:, : idx_BK.shape[1] // 2],
    'encoder_gradient': w + dz_BF.T @ x,
    'decoder_gradient': w + z_BF.T @ g,
    'add_at': w[:, 0] + z_BF.sum(0),
  }


def steps(shape: Shape, names: Sequence[str], precisions: Sequence[str]) -> Iterator[Measured]:
  """All that a step of a family gives, on the first device against the CPU of the same process; AuxK has dead latents.

  Most of it is compilation, which several threads share.
  """
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
    rows = [(name, precision) for precision in precisions for name in names]
    started = [pool.submit(_step_row, shape, *row) for row in rows]
    for (name, precision), row in zip(rows, started, strict=True):
      yield {'family': name, 'precision': precision}, row.result


def _step_row(shape: Shape, name: str, precision: str) -> Row:
  where, round_ = ((jax.devices('cpu')[0], EXACT), (jax.devices()[0], precision)), precision == EXACT
  expected, found = (_stepped(step_cell(name, shape, at), device, at, round_) for device, at in where)
  return _judged(found, expected, precision)


def step_cell(name: str, shape: Shape, precision: str) -> config.Cell:
  """A family at a size, with an Adam whose update is smooth where a gradient is 0: else rounding would turn its sign."""
  flat = families.cell(name, shape).flat() | {
    'optim.eps': 1e-3,
    'optim.learning_rate': 1e-3,
    'loss.dead_tokens': shape[2],
    'sae.k_aux': _K_AUX if family(name).auxk else 0,
    'train.compute_dtype': 'bfloat16' if precision == 'bfloat16' else 'float32',
  }
  return config.resolve_flat(flat)


def _stepped(cell: config.Cell, device: jax.Device, precision: str, round_: bool) -> dict[str, np.ndarray]:
  """State and metrics after one step, by name; from numbers whose sums are exact if `round_`, else from any."""
  mesh = sharding.make_mesh(cell.mesh, [device])
  init, step = make_step(cell, mesh)
  rng = np.random.default_rng(0)

  def some(*shape: int) -> np.ndarray:
    """Odd multiples of 1/32, so that none is 0; or numbers of their size."""
    made = (2 * rng.integers(-4, 4, shape) + 1) / 32 if round_ else rng.standard_normal(shape) / 7
    return made.astype(np.float32)

  d, n, batch = cell.sae.d_model, cell.sae.n_latents, cell.train.batch_tokens
  with _at(precision):
    shapes = abstract_state(init, mesh, cell)
    start = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    dead_F = np.arange(n) < _DEAD * n
    params = {key: some(*leaf.shape) for key, leaf in shapes.params.items()}
    params['b_enc_F'] -= np.where(dead_F, 0.5, 0).astype(np.float32)
    start = start.replace(params=params, idle_F=np.where(dead_F, 99, 0).astype(np.int32), scale=np.float32(1))
    # Copies: a donated array must own its memory.
    state = jax.tree.map(lambda a, leaf: jnp.array(a, copy=True, device=leaf.sharding), start, shapes)
    given = jax.device_put(some(batch, d), jax.NamedSharding(mesh, sharding.BATCH))
    done = jax.device_get(step(state, given))
  leaves, _ = jax.tree.flatten_with_path(done)
  return {jax.tree_util.keystr(path[1:], simple=True, separator='.'): np.asarray(leaf) for path, leaf in leaves}


def selection(sizes: Sequence[Shape]) -> Iterator[Measured]:
  """The indices of each way to select, at rows, columns and k of each size, against a stable sort in numpy."""
  for rows, width, k in sizes:
    rng = np.random.default_rng(0)
    product_BF = rng.integers(-64, 64, (rows, width)).astype(np.float32) / 8
    product_BF[0], product_BF[1, k // 2 :] = 1, -np.inf  # all tie; fewer than k are finite
    bias_F = rng.integers(-64, 64, width).astype(np.float32) / 64
    best_BK = np.argsort(-(product_BF + bias_F[None]), axis=1, kind='stable')[:, :k]
    for way in WAYS:
      yield {'way': way, 'shape': [rows, width, k]}, functools.partial(_selection_row, way, product_BF, bias_F, best_BK)


# From product, bias and k: indices, or a mask.
WAYS = {
  'lax.top_k': lambda product_BF, bias_F, k: jax.lax.top_k(product_BF + bias_F[None], k)[1],
  'two_stage': lambda product_BF, bias_F, k: topk.two_stage(product_BF, bias_F, k, 16)[1],
  'counted': lambda product_BF, bias_F, k: topk.counted(product_BF + bias_F[None], k, None),
  'approximate': lambda product_BF, bias_F, k: topk.approximate(product_BF, bias_F, k, 0.95)[1],
}


def _selection_row(way: str, product_BF: np.ndarray, bias_F: np.ndarray, best_BK: np.ndarray) -> Row:
  k = best_BK.shape[1]
  found = np.asarray(jax.jit(WAYS[way], static_argnums=2)(product_BF, bias_F, k))
  if way == 'approximate':  # ties in any order, so by values
    pre_BF = product_BF + bias_F[None]
    found_BK, true_BK = (np.take_along_axis(pre_BF, idx_BK, axis=1) for idx_BK in (found, best_BK))
    return {'recall': float(np.mean(found_BK >= true_BK[:, -1:]))}
  if found.dtype == bool:
    selected = np.take_along_axis(found, best_BK, axis=1)
    wrong_B = ~selected.all(1) | (found.sum(1) != k)
  else:
    wrong_B = (found != best_BK).any(1)
  if not wrong_B.any():
    return {'wrong_rows': 0}
  return {
    'wrong_rows': int(wrong_B.sum()),
    'status': 'failed',
    'error': f'{way} selects others in {wrong_B.sum()} rows',
  }


def _at(precision: str) -> Any:
  return jax.default_matmul_precision('highest' if precision == EXACT else 'default')


def _judged(found: dict[str, Any], expected: dict[str, np.ndarray], precision: str) -> Row:
  """The largest error of each output over its largest number, and whether all are small enough."""
  errors = {
    name: _error(np.asarray(found[name]).astype(np.float64), a.astype(np.float64)) for name, a in expected.items()
  }
  worst = max(errors, key=lambda name: errors[name])
  # JSON knows no infinity.
  row: Row = {'errors': {name: error if np.isfinite(error) else None for name, error in errors.items()}}
  if precision != EXACT:
    return row
  row['tolerance'] = TOLERANCE
  if errors[worst] > TOLERANCE:
    row |= {'status': 'failed', 'error': f'{worst} is off by {errors[worst]:.1e} of its largest, more than {TOLERANCE}'}
  return row


def _error(found: np.ndarray, expected: np.ndarray) -> float:
  """Infinite where something is no number."""
  error = np.abs(found - expected).max() / (np.abs(expected).max() or 1)
  return float(error) if np.isfinite(error) else np.inf
