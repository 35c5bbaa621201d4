"""What rows must be like before anything is trained on them: they vary, their norms are near 1, their dtype holds them.

Each of these, when it fails, gives numbers that look like those of a bad learning rate.
"""

from typing import Any

import numpy as np

from sae_jax.errors import UserError

# Rounding may cost this share of the variance, which is what it adds to every NMSE. float16 costs about 1e-7 on rows
# whose norm is near 1.
LOST = 1e-3
# Below this share of the mean square, a variance is the rounding of rows that are all alike.
_VARIANCE = 1e-12
# The learning rate, Adam's epsilon and the threshold of a firing latent are for norms of about 1.
_NORMS = (0.1, 10.0)
HEAVY = 0.5  # more of all squares than this in a hundredth of the rows is worth a word
_SLICE = 2**20  # numbers that are looked at once


def check_varies(rows: str, variance: float, mean_square: float, remedy: str) -> None:
  """Raises `UserError` when `rows`, e.g. 'the 100 held-out rows', are all alike or not finite.

  `variance` is about their mean and summed over components, as `mean_square` is.
  """
  if not (np.isfinite(variance) and np.isfinite(mean_square)):
    raise UserError(f'{rows} have variance {variance}; activations must be finite: {remedy}')
  if not variance > _VARIANCE * mean_square:
    raise UserError(
      f'{rows} have variance {max(variance, 0.0):.3g} about their mean, at a mean square of {mean_square:.3g}; they '
      f'must vary, for the NMSE divides by it: {remedy}'
    )


def norm_warning(mean_norm: float) -> str | None:
  """One line when rows are so large or small that the recipe's hyperparameters do not fit them."""
  least, most = _NORMS
  if least <= mean_norm <= most:
    return None
  return (
    f'warning: the mean norm of the rows is {mean_norm:.3g}, outside [{least:g}, {most:g}], and learning rates and '
    'thresholds are for norms of about 1; import the activations with --normalize=scale (or center_unit)'
  )


def row_warnings(provenance: dict[str, Any]) -> list[str]:
  """A line for everything that was found in the rows of a store when they were imported."""
  found = []
  if repeated := provenance.get('held_out_in_training'):
    found.append(
      f'warning: {repeated} held-out rows occur in training, too, and the NMSE will be too low; import without copies, '
      'padding (--mask) and the first token of every text (--drop_first=1)'
    )
  if share := provenance.get('heaviest_share'):
    found.append(
      f'warning: the largest 1 % of the training rows hold {share:.0%} of all squares, and the NMSE will be about '
      'those alone; import without the first token of every text (--drop_first=1), or with --normalize=center_unit'
    )
  return found


def lost_squares(x_BD: np.ndarray, stored_BD: np.ndarray) -> tuple[float, float]:
  """Sum of squares of what rounding `x_BD` to `stored_BD` lost, and of `x_BD`: both 0, or in a unit of their own.

  The unit is the largest number, because squares of float64 numbers may be 0 or infinite.
  """
  largest = float(max(x_BD.max(initial=0.0), -x_BD.min(initial=0.0)))
  if not (0 < largest < np.inf):
    return 0.0, 0.0
  lost, squares = 0.0, 0.0
  step = max(1, _SLICE // x_BD.shape[1])
  for i in range(0, len(x_BD), step):
    exact_BD = x_BD[i : i + step].astype(np.float64) / largest
    lost += float(np.square(exact_BD - stored_BD[i : i + step].astype(np.float64) / largest).sum())
    squares += float(np.square(exact_BD).sum())
  return lost, squares


def check_rounding(where: str, lost: float, squares: float, dtype: str, remedy: str) -> None:
  """Raises `UserError` when rounding to `dtype` lost more than the share `LOST` of `squares`."""
  if lost > LOST * squares:
    share = f'{lost / squares:.2g}' if squares > 0 else 'all'
    raise UserError(f'{where}: {dtype} loses a share of {share} of the variance, more than {LOST:g}; {remedy}')
