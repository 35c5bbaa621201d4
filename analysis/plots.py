"""Figures of fits: one function each, from fits (and their points) to a matplotlib Figure, without global state.

All have one name, `analysis.plots.frontier(fit)`; how they are drawn is in `analysis/figures/`.
"""

from analysis.figures.allocation import allocation
from analysis.figures.calibration import calibration
from analysis.figures.family import family
from analysis.figures.frontier import frontier
from analysis.figures.joint import joint
from analysis.figures.one_variable import growth, power
from analysis.figures.residuals import residuals
from analysis.figures.valleys import isoflop, learning_rates

__all__ = [
  'allocation',
  'calibration',
  'family',
  'frontier',
  'growth',
  'isoflop',
  'joint',
  'learning_rates',
  'power',
  'residuals',
]
