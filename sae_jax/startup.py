"""What the first tokens decide before training: the pre-bias and the constant of the loss (Gao et al., sections 1, 3)."""

import sys

import numpy as np

from sae_jax.cell import SAMPLE_TOKENS
from sae_jax.data import soundness
from sae_jax.data.source import Source
from sae_jax.errors import UserError
from sae_jax.sae import SAMPLE

_LEAST_VARIANCE = 1e-30  # of a component
_ROWS = 256  # at once, so that differences stay in the cache


def start_up_sample(source: Source, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """b_pre [D], the geometric median of the first tokens, the loss scale 1 / mean (x - mean x)^2, and `SAMPLE` rows; float32.

  `tokens` is what the run may read; at most 32,768 are. Raises `UserError` when they do not vary or are not finite,
  and warns on stderr when their norms are far from 1.
  """
  x_TD = source.rows(0, min(SAMPLE_TOKENS, tokens)).astype(np.float64)
  variance = float(np.mean((x_TD - x_TD.mean(axis=0)) ** 2))
  soundness.check_varies(
    f'the first {len(x_TD)} training rows', variance, float(np.mean(x_TD**2)), 'train on other rows'
  )
  if not _LEAST_VARIANCE < variance < 1 / _LEAST_VARIANCE:
    raise UserError(
      f'the first {len(x_TD)} training rows have variance {variance:.3g}, and float32 squares of such numbers vanish or '
      'overflow; import the activations with --normalize=scale (or center_unit)'
    )
  if warning := soundness.norm_warning(float(np.mean(np.linalg.norm(x_TD, axis=1)))):
    print(warning, file=sys.stderr, flush=True)
  rows_BD = np.resize(x_TD, (SAMPLE, x_TD.shape[1])).astype(np.float32)  # repeated where there are fewer
  return geometric_median(x_TD).astype(np.float32), np.float32(1 / variance), rows_BD


def geometric_median(x_TD: np.ndarray, iterations: int = 50) -> np.ndarray:
  """The point [D] with the least sum of Euclidean distances to the rows, by Weiszfeld's iteration."""
  point_D = x_TD.mean(axis=0)
  distance_T = np.empty(len(x_TD))
  for _ in range(iterations):
    for start in range(0, len(x_TD), _ROWS):
      rows = slice(start, start + _ROWS)
      distance_T[rows] = np.linalg.norm(x_TD[rows] - point_D, axis=1)
    weight_T = 1 / np.maximum(distance_T, 1e-12)
    moved_D = weight_T @ x_TD / weight_T.sum()
    if np.linalg.norm(moved_D - point_D) <= 1e-7 * np.linalg.norm(moved_D):
      return moved_D
    point_D = moved_D
  return point_D
