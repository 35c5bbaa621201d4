"""The figure of what a law leaves over."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.figures import style
from analysis.fit_result import Fit, fits_of


def residuals(fit: Fit) -> Figure:
  """Residuals of the fit in per cent of the loss, against the variable along the axis; the grey band is one rms."""
  (fit,) = fits_of([fit])
  fig, (ax,) = style.axes()
  x, other = style.sides(fit)
  percent = 100 * fit.residuals()
  rms = 100 * fit.diagnostics['rms_log_residual']
  ax.axhspan(-rms, rms, color='0.93', zorder=0)
  ax.axhline(0, color='0.4', lw=0.8)
  second = fit.table[other] if other else pd.Series(0, fit.table.index)
  values = np.sort(second.unique())
  handles = []
  for i, value in enumerate(values):
    color, marker = style.look(i, len(values))
    mine = (second == value).to_numpy()
    order = np.argsort(fit.table[x].to_numpy()[mine], kind='stable')
    ax.plot(fit.table[x].to_numpy()[mine][order], percent[mine][order], color=color, marker=marker, ms=5, lw=0.8)
    if other:
      handles.append(Line2D([], [], color=color, marker=marker, label=f'${style.symbol(other)}$ = {value:g}'))
  handles.append(Line2D([], [], color='0.9', lw=6, label=f'rms {rms:.2g} %'))
  style.finish(fig, ax, x, [fit], style.equation(fit), handles)
  style.linear(ax)
  ax.set_ylabel('ln predicted \N{MINUS SIGN} ln observed, in %')
  return fig
