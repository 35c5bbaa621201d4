"""The input normalisation: a rule for each token (section 1 of the paper), one scalar for all of them, or none."""

import numpy as np

from sae_jax.errors import UserError

KINDS = ('center_unit', 'scale', 'none')


def normalize(x_BD: np.ndarray, kind: str, scale: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Normalised activations [B, D], and the mean [B, 1] and norm [B, 1] that undo it: x = out * norm + mean.

  Args:
    x_BD: raw activations.
    kind: 'center_unit' subtracts a token's mean over D and divides by its Euclidean norm. A constant token has norm 0
      and becomes 0, not NaN. Normalising twice changes nothing beyond rounding. 'scale' multiplies every token by
      `scale`. 'none' changes nothing.
    scale: of 'scale' alone, above 0. It is recorded with the store and with every autoencoder.

  Raises `UserError` for another kind, and for 'scale' without its number: to guess 1 would give plausible rows.
  """
  if kind not in KINDS:
    raise UserError(f'normalize={kind!r} is not known; use one of {", ".join(KINDS)}')
  if kind == 'none':
    return x_BD, np.zeros_like(x_BD[:, :1]), np.ones_like(x_BD[:, :1])
  if kind == 'scale':
    if scale is None or not 0 < scale < np.inf:
      raise UserError(f"normalize='scale' with scale={scale}; give the number that the store or sae.json records")
    # In float64: a scale beyond 1e38 is no float32, and the rows it belongs to are.
    out_BD = (x_BD * np.float64(scale)).astype(x_BD.dtype)
    return out_BD, np.zeros_like(x_BD[:, :1]), np.full_like(x_BD[:, :1], 1 / scale)
  mean_B1 = x_BD.mean(axis=-1, keepdims=True, dtype=np.float64)
  centred_BD = x_BD - mean_B1
  norm_B1 = np.linalg.norm(centred_BD, axis=-1, keepdims=True)
  out_BD = centred_BD / np.where(norm_B1 > 0, norm_B1, 1)
  return out_BD.astype(x_BD.dtype), mean_B1.astype(x_BD.dtype), norm_B1.astype(x_BD.dtype)
