"""When a run has converged: another doubling of its tokens gained too little."""

import itertools
import math
from collections.abc import Sequence

_LEAST_STEPS = 100  # before, a flat stretch is as likely the start of learning as its end


def has_converged(curve: Sequence[Sequence[float]], least_gain: float) -> bool:
  """Whether the NMSE at the last step of a curve is less than this share below that at half the steps.

  `curve` has pairs of steps and NMSE. Between two of them the NMSE is interpolated in the logarithm of the steps. 0 asks
  for nothing, so that no curve has converged.
  """
  if not least_gain or not curve or curve[-1][0] < _LEAST_STEPS or curve[0][0] > curve[-1][0] / 2:
    return False
  at, last = curve[-1]
  half = math.log(at / 2)
  for (left, before), (right, after) in itertools.pairwise(curve):
    if math.log(left) <= half <= math.log(right):
      share = (half - math.log(left)) / (math.log(right) - math.log(left))
      return 1 - last / (before + share * (after - before)) < least_gain
  return False
