"""Differences between two autoencoders on the same units. Most of what varies between windows is common to both, so the
error of a difference is far below what the two errors alone would give.
"""

import dataclasses
from typing import Any

import numpy as np

from sae_jax.measures.measure import Measure, Unit


def differences(measure: Measure, a: list[dict[str, Any]], b: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Value of a minus value of b by name, with the standard error of the difference over paired units.

  By the jackknife over samples: the lists in records hold a number for each window. Values without an error have none.

  Args:
    measure: what was measured.
    a, b: the records of all units of the two, in order, without arrays.
  """
  whole = [measure.values([Unit(record) for record in records]) for records in (a, b)]
  names = [name for name, value in whole[0].items() if value.se is not None and name in whole[1]]
  dropped: dict[str, list[float]] = {name: [] for name in names}
  for unit in range(len(a)):
    for sample in range(_samples(a[unit])):
      left = [measure.values([Unit(r) for r in _without(records, unit, sample)]) for records in (a, b)]
      for name in names:
        dropped[name].append(left[0][name].value - left[1][name].value)
  found = {}
  for name in names:
    values, n = np.array(dropped[name]), len(dropped[name])
    se = float(np.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum())) if n > 1 else None
    value = dataclasses.replace(whole[0][name], value=whole[0][name].value - whole[1][name].value, se=se)
    found[name] = dataclasses.asdict(value)
  return found


def _samples(record: dict[str, Any]) -> int:
  """How many samples a unit has: the length of its lists, or one."""
  lengths = {len(value) for value in record.values() if isinstance(value, list)}
  return lengths.pop() if len(lengths) == 1 else 1


def _without(records: list[dict[str, Any]], unit: int, sample: int) -> list[dict[str, Any]]:
  if _samples(records[unit]) == 1:
    return records[:unit] + records[unit + 1 :]
  kept = {
    name: value[:sample] + value[sample + 1 :] if isinstance(value, list) else value
    for name, value in records[unit].items()
  }
  return [*records[:unit], kept, *records[unit + 1 :]]
