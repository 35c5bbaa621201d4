"""When a run has converged: another doubling of its tokens gained too little, at the same L0."""

import itertools
import math
from collections.abc import Sequence

_LEAST_STEPS = 100  # before, a flat stretch is as likely the start of learning as its end
SAME_L0 = 0.05  # largest difference of logarithms


def has_converged(curve: Sequence[Sequence[float]], least_gain: float) -> bool:
  """Whether the NMSE at the last step of a curve is less than this share below that at half the steps, at the same L0.

  `curve` has steps, NMSE and L0 of each evaluation. Between two of them both are interpolated in the logarithm of the
  steps. While a penalty still changes L0 the NMSE may rise, and what is learnt does not show: such a run goes on. A
  `least_gain` of 0 asks for nothing, so that no curve has converged.
  """
  if not least_gain or not curve or curve[-1][0] < _LEAST_STEPS or curve[0][0] > curve[-1][0] / 2:
    return False
  at, *last = curve[-1]
  half = math.log(at / 2)
  for (left, *before), (right, *after) in itertools.pairwise(curve):
    if math.log(left) <= half <= math.log(right):
      share = (half - math.log(left)) / (math.log(right) - math.log(left))
      nmse, *l0 = (b + share * (a - b) for b, a in zip(before, after, strict=False))
      # A checkpoint of an older version has no L0.
      still = l0 and last[1] and l0[0] and abs(math.log(last[1] / l0[0])) < SAME_L0
      return bool(still) and 1 - last[0] / nmse < least_gain
  return False
