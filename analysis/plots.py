"""Figures of fits: one function each, from fits (and their points) to a matplotlib Figure, without global state.

Here are the laws over one or two variables; the figures of valleys and of plans are imported, so that all have one name:
`analysis.plots.frontier(fit)`.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import frames
from analysis import frontier as frontiers
from analysis import plots_style as style
from analysis.fit_result import Fit, fits_of
from analysis.plots_family import family
from analysis.plots_plan import allocation, calibration
from analysis.plots_valleys import isoflop, learning_rates
from sae_jax import checks
from sae_jax.errors import UserError

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

_COMPUTE = ('flops_useful', 'flops_dense')


def frontier(fits: Fit | Sequence[Fit], curves: pd.DataFrame | None = None) -> Figure:
  """Loss against compute: every run thin, the envelope as points, the law with its band, dashed beyond the data.

  Args:
    fits: from `frontier.fit_frontier`: one, or one a k.
    curves: as from `load_curves`; without them only the points of the fit are drawn.

  A fit of another law is shown as its cells against the compute they took.
  """
  fits = fits_of(fits)
  fig, (ax,) = style.axes()
  if fits[0].x[0] not in _COMPUTE:
    return _cells_against_compute(fig, ax, fits[0])
  x, y = fits[0].x[0], fits[0].y
  handles = []
  reach = [fit.table[y] for fit in fits]
  drawn = pd.DataFrame() if curves is None else _drawn(curves, x, y, [key for fit in fits for key in fit.where])
  for i, fit in enumerate(fits):
    color, marker = style.look(i, len(fits))
    size = 4.5 if len(fit.table) <= 30 else 3.0
    if len(drawn):
      mine = drawn
      for key, value in fit.where.items():
        mine = mine[mine[key] == value]
      for _, run in mine.groupby('id'):
        ax.plot(run[x], run[y], color=color, lw=0.6, alpha=0.4)
      envelope = frontiers.envelope(mine, x, y)
      alone = envelope[~envelope['used']]
      style.points(ax, alone[x], alone[y], color, marker, hollow=True, ms=size)
      reach.append(envelope[y])
    style.points(ax, fit.table[x], fit.table[y], color, marker, ms=size)
    style.law(ax, fit, {}, color, beyond=10)
    handles.append(Line2D([], [], color=color, marker=marker, label=style.constants(fit)))
  # The first steps of large runs lie far above; they would squeeze the envelope into the bottom of the figure.
  top = 1.2 * max(r.max() for r in reach)
  ends = [float(line.get_ydata()[-1]) for line in ax.lines if line.get_linestyle() == '--']
  ax.set_ylim(min(0.9 * min(r.min() for r in reach), 0.97 * min(ends)), top)
  if len(drawn):
    handles.append(Line2D([], [], color='0.4', lw=0.6, label='one run'))
    handles.append(Line2D([], [], ls='', marker='o', mfc='none', mec='0.4', label='only one size there: not fitted'))
    last = max(float(line.get_xdata()[-1]) for line in ax.lines if line.get_linestyle() == '--')
    ax.set_xlim(drawn.loc[drawn[y] <= top, x].min() / 1.3, 1.3 * last)
  return _finish(fig, ax, x, fits, style.equation(fits[0]), handles)


def joint(fit: Fit) -> Figure:
  """Loss against n for every k, with the joint law; a column `paper_fit` is drawn underneath as published."""
  (fit,) = fits_of([fit], 2)
  fig, (ax,) = style.axes()
  x, second = fit.x
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
  if 'paper_fit' in fit.table:
    handles.append(Line2D([], [], color='0.86', lw=6, label='as published'))
  handles.append(Line2D([], [], ls='', label='\n' + style.constants(fit)))
  return _finish(fig, ax, x, [fit], style.equation(fit), handles)


def power(fits: Fit | Sequence[Fit]) -> Figure:
  """Loss against one variable with a power law; several fits (one a k) in one figure."""
  return _one_variable(fits_of(fits, 1), ())


def growth(fits: Fit | Sequence[Fit], refused: Sequence[float] = ()) -> Figure:
  """Any quantity against one variable with its law: tokens to convergence, best sizes, downstream loss over NMSE.

  Points with columns `low` and `high` get bars. `refused` are values of the variable that gave no point: they are
  marked at the bottom, so that a reader sees what the law does not rest on.
  """
  return _one_variable(fits_of(fits, 1), checks.numbers('refused', refused, 'give values of the variable, each once'))


def residuals(fit: Fit) -> Figure:
  """Residuals of the fit in per cent of the loss, against its first variable; the grey band is one rms."""
  (fit,) = fits_of([fit])
  fig, (ax,) = style.axes()
  x = fit.x[0]
  percent = 100 * fit.residuals()
  rms = 100 * fit.diagnostics['rms_log_residual']
  ax.axhspan(-rms, rms, color='0.93', zorder=0)
  ax.axhline(0, color='0.4', lw=0.8)
  second = fit.table[fit.x[1]] if len(fit.x) == 2 else pd.Series(0, fit.table.index)
  values = np.sort(second.unique())
  handles = []
  for i, value in enumerate(values):
    color, marker = style.look(i, len(values))
    mine = (second == value).to_numpy()
    order = np.argsort(fit.table[x].to_numpy()[mine], kind='stable')
    ax.plot(fit.table[x].to_numpy()[mine][order], percent[mine][order], color=color, marker=marker, ms=5, lw=0.8)
    if len(fit.x) == 2:
      handles.append(Line2D([], [], color=color, marker=marker, label=f'${style.symbol(fit.x[1])}$ = {value:g}'))
  handles.append(Line2D([], [], color='0.9', lw=6, label=f'rms {rms:.2g} %'))
  _finish(fig, ax, x, [fit], style.equation(fit), handles)
  style.linear(ax)
  ax.set_ylabel('ln predicted \N{MINUS SIGN} ln observed, in %')
  return fig


def _drawn(curves: pd.DataFrame, x: str, y: str, where: Sequence[str]) -> pd.DataFrame:
  """The measurements that a figure of logs can show. Raises `UserError` when there are none."""
  frames.frame('curves', curves, ('id', 'n_latents', x, y, *where))
  seen = curves[(frames.measured(curves, y) > 0) & (frames.measured(curves, x) > 0)]
  if seen.empty:
    raise UserError(f'the curves have no row with both {x} and {y}; leave them out to draw the fit alone')
  return seen


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
    handles.append(Line2D([], [], color=color, marker=marker, label=style.constants(fit)))
  # By the points: a band that explodes at one end would flatten everything else.
  seen = pd.concat([fit.table[y] for fit in fits])
  ends = [float(line.get_ydata()[-1]) for line in ax.lines if line.get_linestyle() == '--']
  ax.set_ylim(0.85 * min(seen.min(), *ends), 1.18 * max(seen.max(), *ends))
  if len(refused):
    style.refused(ax, refused)
    handles.append(Line2D([], [], ls='', marker='x', color='0.4', label='no point there: refused'))
  return _finish(fig, ax, x, fits, style.equation(fits[0]), handles)


def _cells_against_compute(fig: Figure, ax: Axes, fit: Fit) -> Figure:
  x = _COMPUTE[0]
  if x not in fit.table:
    raise UserError(
      f'a frontier needs the column {x}, which the points of this fit lack; use plots.joint or plots.power'
    )
  rows = fit.table.sort_values(x)
  values = np.sort(rows['k'].unique()) if 'k' in rows else np.array([np.nan])
  handles = []
  for i, value in enumerate(values):
    color, marker = style.look(i, len(values))
    mine = rows[rows['k'] == value] if 'k' in rows else rows
    ax.plot(mine[x], mine[fit.y], marker, ms=5, color=color)
    ax.plot(mine[x], np.minimum.accumulate(mine[fit.y]), color=color, lw=1, drawstyle='steps-post')
    text = f'$k$ = {value:g}' if 'k' in rows else 'cells'
    handles.append(Line2D([], [], color=color, marker=marker, label=text))
  return _finish(fig, ax, x, [fit], 'finished cells and the best loss so far', handles)


def _finish(fig: Figure, ax: Axes, x: str, fits: Sequence[Fit], title: str, handles: list[Line2D]) -> Figure:
  style.label(ax, x, fits[0].y)
  ax.set_title(title, fontsize=11, pad=10)
  style.ticks(ax, x, np.concatenate([fit.table[x].to_numpy(float) for fit in fits]))
  style.legend(fig, handles)
  style.warn(fig, style.codes(fits))
  return fig
