"""Is there an irreducible loss? The same points fitted with it and without, by held-out error and by AICc.

AICc asks which law describes these points better for its number of constants; the held-out error asks which predicts
larger ones better. Only when both agree is the answer given.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from analysis.fit_result import Fit, fits_of
from analysis.fitting import uncertainty
from sae_jax.errors import UserError

WITHOUT = {'power': 'power_no_floor', 'joint_nk': 'joint_nk_no_floor'}
_CLEAR = 2.0  # AICc: less difference than this favours neither


@dataclasses.dataclass(frozen=True)
class Comparison:
  """A law with an irreducible loss and the same law without, fitted to the same points and held-out rows."""

  floored: Fit
  plain: Fit

  def __post_init__(self):
    floored, plain = fits_of([self.floored, self.plain])
    if not np.array_equal(floored.table[[*floored.x, floored.y]], plain.table[[*plain.x, plain.y]]):
      raise UserError(
        f'the fits of {floored.law.name} and {plain.law.name} are to different points ({len(floored.table)} and '
        f'{len(plain.table)}), which no criterion compares; fit both to one table'
      )

  @property
  def aicc_gain(self) -> float:
    """AICc without minus with: positive when the irreducible loss pays for its constants. NaN when points are few."""
    pair = [fit.diagnostics['aicc'] for fit in (self.floored, self.plain)]
    return math.nan if None in pair else pair[1] - pair[0]

  @property
  def holdout_errors(self) -> tuple[float, float]:
    """Mean relative errors on the held-out rows, with and without; NaN where none could be held out."""
    first, second = (fit.holdout['mean_rel_err'] if fit.holdout else math.nan for fit in (self.floored, self.plain))
    return first, second

  @property
  def verdict(self) -> str:
    """'supported', 'not supported' or 'undecided', and why."""
    gain, (floored, plain) = self.aicc_gain, self.holdout_errors
    if 'huber' in (self.floored.objective, self.plain.objective):
      return f'undecided: {uncertainty.NO_AICC}'
    if not math.isfinite(gain) or not math.isfinite(floored + plain):
      return 'undecided: too few points for ' + ('AICc' if not math.isfinite(gain) else 'a held-out error')
    if abs(gain) < _CLEAR:
      return f'undecided: AICc differs by {abs(gain):.1f}, less than {_CLEAR:g}'
    if (gain > 0) != (floored < plain):
      described, predicted = ('with', 'without') if gain > 0 else ('without', 'with')
      return (
        f'undecided: the law {described} it describes these points better, {predicted} it predicts larger ones better'
      )
    if gain > 0 and 'asymptote_not_identified' in {w['code'] for w in self.floored.warnings}:
      return 'undecided: the law with it describes and predicts better, but its size is not identified'
    return 'supported' if gain > 0 else 'not supported'

  def to_json(self) -> dict[str, Any]:
    """What an entry of laws.json says under `comparison`, null where a number is unknown."""
    gain, (_, plain) = self.aicc_gain, self.holdout_errors
    return {
      'law': self.plain.law.name,
      'aicc': self.plain.diagnostics['aicc'],
      'aicc_gain': gain if math.isfinite(gain) else None,
      'rms_log_residual': self.plain.diagnostics['rms_log_residual'],
      'holdout': self.plain.to_json()['holdout'],
      'holdout_mean_rel_err': plain if math.isfinite(plain) else None,
      'irreducible_loss': self.verdict,
    }
