"""The input normalisation, per token: subtract the mean over D, divide by the Euclidean norm (section 1)."""

import numpy as np


def normalize(x_BD: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Normalised activations [B, D], and the mean [B, 1] and norm [B, 1] that undo it: x = out * norm + mean.

  `kind` is 'center_unit', or 'none' for identity. A constant token has norm 0 and becomes 0, not NaN. Normalising
  twice changes nothing beyond rounding.
  """
  if kind == 'none':
    return x_BD, np.zeros_like(x_BD[:, :1]), np.ones_like(x_BD[:, :1])
  mean_B1 = x_BD.mean(axis=-1, keepdims=True, dtype=np.float64)
  centred_BD = x_BD - mean_B1
  norm_B1 = np.linalg.norm(centred_BD, axis=-1, keepdims=True)
  out_BD = centred_BD / np.where(norm_B1 > 0, norm_B1, 1)
  return out_BD.astype(x_BD.dtype), mean_B1.astype(x_BD.dtype), norm_B1.astype(x_BD.dtype)
