"""Estimates with standard errors, over units of sampling such as windows or tasks. Tokens of a window are no such units:
they resemble each other.
"""

import math
from typing import Any

import numpy as np

from sae_jax.measures.measure import Value


def mean(values_U: Any, units: str) -> Value:
  """The mean, and its standard error; none from a single unit."""
  values_U = np.asarray(values_U, np.float64)
  n = len(values_U)
  return Value(float(values_U.mean()), float(values_U.std(ddof=1) / math.sqrt(n)) if n > 1 else None, units)


def ratio(over_U: Any, under_U: Any, units: str) -> Value:
  """Sum over sum, and its standard error to first order (Cochran 1977, section 2.11)."""
  over_U, under_U = np.asarray(over_U, np.float64), np.asarray(under_U, np.float64)
  n, total = len(over_U), under_U.sum()
  value = over_U.sum() / total
  rest_U = over_U - value * under_U
  se = math.sqrt(n / (n - 1) * float(rest_U @ rest_U)) / abs(total) if n > 1 else None
  return Value(float(value), se, units)


def column(records: list[dict[str, Any]], name: str) -> np.ndarray:
  """A list of numbers that every record has, joined."""
  return np.concatenate([np.asarray(record[name], np.float64).reshape(-1) for record in records])
