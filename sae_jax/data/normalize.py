"""The input normalisation: a rule for each token (section 1 of the paper), one scalar for all of them, or none."""

from typing import Any

import numpy as np

from sae_jax.errors import UserError

KINDS = ('center_unit', 'scale', 'none')


def normalize(x: Any, kind: str, scale: float | None = None, *, correct: bool = True) -> tuple[Any, Any, Any]:
  """Normalised activations [..., D], and the mean and norm [..., 1] that undo it: x = out * norm + mean.

  Arrays of numpy are computed in float64 and returned in their own type. Those of jax are computed in their own type:
  inside jit there may be no float64.

  Args:
    x: raw activations.
    kind: 'center_unit' subtracts a token's mean over D and divides by its Euclidean norm. A constant token has norm 0
      and becomes 0, not NaN. Normalising twice changes nothing beyond rounding. 'scale' multiplies every token by
      `scale`. 'none' changes nothing.
    scale: of 'scale' alone, above 0. It is recorded with the store and with every autoencoder.
    correct: of jax alone: the mean of what is left corrects the mean.

  Raises `UserError` for another kind, and for 'scale' without its number: to guess 1 would give plausible rows.
  """
  if kind not in KINDS:
    raise UserError(f'normalize={kind!r} is not known; use one of {", ".join(KINDS)}')
  xp, on_host = x.__array_namespace__(), isinstance(x, np.ndarray)
  if kind == 'none':
    return x, xp.zeros_like(x[..., :1]), xp.ones_like(x[..., :1])
  if kind == 'scale':
    if scale is None or not 0 < scale < np.inf:
      raise UserError(f"normalize='scale' with scale={scale}; give the number that the store or sae.json records")
    # In float64: a scale beyond 1e38 is no float32, and the rows it belongs to are.
    out = (x * np.float64(scale)).astype(x.dtype) if on_host else x * scale
    return out, xp.zeros_like(x[..., :1]), xp.full_like(x[..., :1], 1 / scale)
  mean = x.mean(axis=-1, keepdims=True, dtype=np.float64 if on_host else None)
  if correct and not on_host:
    mean = mean + (x - mean).mean(axis=-1, keepdims=True)
  centred = x - mean
  norm = xp.linalg.norm(centred, axis=-1, keepdims=True)
  out = centred / xp.where(norm > 0, norm, 1)
  return out.astype(x.dtype), mean.astype(x.dtype), norm.astype(x.dtype)
