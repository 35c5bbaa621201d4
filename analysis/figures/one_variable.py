"""Figures of laws over one variable: several fits in one."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import style
from analysis.fit_result import Fit, fits_of
from sae_jax import checks


def power(fits: Fit | Sequence[Fit]) -> Figure:
  """Loss against one variable with a power law; several fits (one a target) in one figure."""
  return _one_variable(fits_of(fits, 1), ())


def growth(fits: Fit | Sequence[Fit], refused: Sequence[float] = ()) -> Figure:
  """Any quantity against one variable with its law: tokens to convergence, best sizes, downstream loss over NMSE.

  Points with columns `low` and `high` get bars. `refused` are values of the variable that gave no point: they are
  marked at the bottom, so that a reader sees what the law does not rest on.
  """
  return _one_variable(fits_of(fits, 1), checks.numbers('refused', refused, 'give values of the variable, each once'))


def _one_variable(fits: list[Fit], refused: Sequence[float]) -> Figure:
  fig, (ax,) = style.axes()
  x, y = fits[0].x[0], fits[0].y
  handles = []
  for i, fit in enumerate(fits):
    color, marker = style.look(i, len(fits))
    rows = fit.table
    style.points(ax, rows[x], rows[y], color, marker)
    if {'low', 'high'} <= set(rows.columns):
      style.bars(ax, rows[x], rows[y], rows['low'], rows['high'], color)
    style.law(ax, fit, {}, color, beyond=4)
    handles.append(Line2D([], [], color=color, marker=marker, label=style.constants(fit, fits)))
  # By the points: a band that explodes at one end would flatten everything else.
  seen = pd.concat([fit.table[y] for fit in fits])
  ends = [float(line.get_ydata()[-1]) for line in ax.lines if line.get_linestyle() == '--']
  ax.set_ylim(0.85 * min(seen.min(), *ends), 1.18 * max(seen.max(), *ends))
  if len(refused):
    style.refused(ax, refused)
    handles.append(Line2D([], [], ls='', marker='x', color='0.4', label='no point there: refused'))
  return style.finish(fig, ax, x, fits, style.equation(fits[0]), handles)
