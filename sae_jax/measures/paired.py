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
  left = [dropped(measure, records) for records in (a, b)]
  found = {}
  for name, value in whole[0].items():
    if value.se is not None and name in whole[1]:
      less, se = value.value - whole[1][name].value, error(left[0][name] - left[1][name])
      found[name] = dataclasses.asdict(dataclasses.replace(value, value=less, se=se))
  return found


def dropped(measure: Measure, records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  """Every value [J] by name as it is without the first sample, without the second, and so on; empty for one sample.

  Of autoencoders that saw the same samples, `error` of any linear combination is its standard error.
  """
  places = [(unit, sample) for unit, record in enumerate(records) for sample in range(_samples(record))]
  parts = [records] + [_without(records, *place) for place in places if len(places) > 1]
  whole, *left = (measure.values([Unit(record) for record in part]) for part in parts)
  return {name: np.array([values[name].value for values in left]) for name in whole}


def error(values_J: np.ndarray) -> float | None:
  """The standard error of a value by the jackknife, from those of `dropped`; None from a single sample."""
  n = len(values_J)
  return float(np.sqrt((n - 1) / n * ((values_J - values_J.mean()) ** 2).sum())) if n > 1 else None


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
