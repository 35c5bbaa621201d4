"""The figure of a law over two variables: one along the axis, a curve for every value of the other."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import style
from analysis.fit_result import Fit, fits_of

_BAND = 3.0  # how far below and above points and curves a band may reach in the figure


def joint(fit: Fit) -> Figure:
  """Loss against n for every k, or against L0 for every n, with the joint law.

  A column `paper_fit` is drawn underneath as published.
  """
  (fit,) = fits_of([fit], 2)
  fig, (ax,) = style.axes()
  x, second = style.sides(fit)
  values = np.sort(fit.table[second].unique())
  handles = []
  for i, value in enumerate(values):
    color, marker = style.look(i, len(values))
    rows = fit.table[fit.table[second] == value].sort_values(x)
    if 'paper_fit' in rows:
      ax.plot(rows[x], rows['paper_fit'], color='0.86', lw=6, zorder=0)
    style.points(ax, rows[x], rows[fit.y], color, marker)
    style.law(ax, fit, {second: value}, color, beyond=4)
    handles.append(Line2D([], [], color=color, marker=marker, label=f'${style.symbol(second)}$ = {value:g}'))
  # A band that explodes at one end would flatten everything else.
  drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
  low, high = ax.get_ylim()
  ax.set_ylim(max(low, drawn.min() / _BAND), min(high, drawn.max() * _BAND))
  if 'paper_fit' in fit.table:
    handles.append(Line2D([], [], color='0.86', lw=6, label='as published'))
  handles.append(Line2D([], [], ls='', label='\n' + style.constants(fit)))
  return style.finish(fig, ax, x, [fit], style.equation(fit), handles)
