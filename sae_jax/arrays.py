"""Arrays that a caller hands to an autoencoder, checked before they reach XLA.

XLA clamps an index that is out of range, and a reshape folds a foreign width into other rows: both give numbers that
look right. Inside jit there are no values to look at, so only shapes and types are checked there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.checks import shown
from sae_jax.errors import UserError

Array = jax.Array | np.ndarray


def activations(x: Any, d_model: int) -> Array:
  """`x` as float32 [..., D]: numpy, or a tracer inside jit.

  Raises:
    UserError: not floats, another last axis than `d_model`, or a value that float32 has no finite number for.
  """
  found = _floats('x', x, 'activations')
  if found.ndim < 1 or found.shape[-1] != d_model:
    raise UserError(
      f'x has shape {found.shape} and its last axis must be d_model={d_model}; give activations of the site that this '
      'autoencoder was trained on, one row a token'
    )
  return _finite('x', found)


def codes(z: Any, idx: Any, n_latents: int) -> tuple[Array, Array]:
  """Values as float32 and latent indices as int32, both [..., K]: numpy, or tracers inside jit.

  There a value whose index is out of range becomes NaN, which nobody takes for a reconstruction.

  Raises:
    UserError: not floats and integers, different shapes, no axis, a value that is not finite or an index without a
      latent.
  """
  remedy = 'give z and idx as encode returns them'
  given, z, idx = idx, _floats('z', z, 'values'), _array('idx', idx, remedy)
  if not jnp.issubdtype(idx.dtype, np.integer):
    raise UserError(f'{_named("idx", given)} holds {_kind(idx)} and latent indices are integers; {remedy}')
  if z.shape != idx.shape or z.ndim < 1:
    raise UserError(f'z has shape {z.shape} and idx {idx.shape}, and both must be [..., K]; {remedy}')
  z = _finite('z', z)
  if isinstance(idx, np.ndarray):
    outside = (idx < 0) | (idx >= n_latents)
    if outside.any():
      where = tuple(np.argwhere(outside)[0].tolist())
      raise UserError(
        f'idx{list(where)}={idx[where]} is not a latent: there are {n_latents}, from 0 to {n_latents - 1}; {remedy}'
      )
  else:
    z = jnp.where((idx >= 0) & (idx < n_latents), z, jnp.nan)
  return z, idx.astype(np.int32)


def _floats(name: str, value: Any, what: str) -> Array:
  found = _array(name, value, f'give {what} as an array of floats')
  if not jnp.issubdtype(found.dtype, np.floating):
    raise UserError(
      f'{_named(name, value)} holds {_kind(found)} and {what} are floats; give {name}.astype(np.float32) if that is what they mean'
    )
  return found


def _array(name: str, value: Any, remedy: str) -> Array:
  """A numpy array, or the tracer itself."""
  if isinstance(value, jax.core.Tracer):
    return value
  if isinstance(value, np.ma.MaskedArray):  # numpy drops the mask and takes what lies under it
    raise UserError(f'{name}={shown(value)} has a mask, and what lies under it is no value; fill it or drop those rows')
  try:
    return np.asarray(value)
  except (ValueError, TypeError, RuntimeError):
    raise UserError(f'{name}={shown(value)} is not an array (rows of one length); {remedy}') from None


def _finite(name: str, found: Array) -> Array:
  """As float32."""
  if not isinstance(found, np.ndarray):
    return found.astype(np.float32)
  with np.errstate(over='ignore'):
    narrow = found.astype(np.float32)
  bad = ~np.isfinite(narrow)
  if bad.any():
    where = tuple(np.argwhere(bad)[0].tolist())
    raise UserError(f'{name}{list(where)}={found[where]} is not a finite float32; leave that row out or correct it')
  return narrow


def _named(name: str, value: Any) -> str:
  return name if isinstance(value, Array) else f'{name}={shown(value)}'


def _kind(found: Array) -> str:
  return {'U': 'text', 'S': 'bytes', 'O': 'objects'}.get(found.dtype.kind, str(found.dtype))
