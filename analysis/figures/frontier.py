"""The figure of a frontier: every run against compute, their envelope and its law."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import frames, sparsity
from analysis import frontier as frontiers
from analysis.figures import style
from analysis.fit_result import Fit, fits_of
from sae_jax.errors import UserError

_COMPUTE = ('flops_useful', 'flops_dense')


def frontier(fits: Fit | Sequence[Fit], curves: pd.DataFrame | None = None) -> Figure:
  """Loss against compute: every run thin, the envelope as points, the law with its band, dashed beyond the data.

  Args:
    fits: from `frontier.fit_frontier`: one, or one a target.
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
      mine = sparsity.at(drawn, fit.where)
      for _, run in mine.groupby('id'):
        ax.plot(run[x], run[y], color=color, lw=0.6, alpha=0.4)
      envelope = frontiers.envelope(mine, x, y)
      alone = envelope[~envelope['used']]
      style.points(ax, alone[x], alone[y], color, marker, hollow=True, ms=size)
      reach.append(envelope[y])
    style.points(ax, fit.table[x], fit.table[y], color, marker, ms=size)
    style.law(ax, fit, {}, color, beyond=10)
    handles.append(Line2D([], [], color=color, marker=marker, label=style.constants(fit, fits)))
  # The first steps of large runs lie far above; they would squeeze the envelope into the bottom of the figure.
  top = 1.2 * max(r.max() for r in reach)
  ends = [float(line.get_ydata()[-1]) for line in ax.lines if line.get_linestyle() == '--']
  ax.set_ylim(min(0.9 * min(r.min() for r in reach), 0.97 * min(ends)), top)
  if len(drawn):
    handles.append(Line2D([], [], color='0.4', lw=0.6, label='one run'))
    handles.append(Line2D([], [], ls='', marker='o', mfc='none', mec='0.4', label='only one size there: not fitted'))
    last = max(float(line.get_xdata()[-1]) for line in ax.lines if line.get_linestyle() == '--')
    ax.set_xlim(drawn.loc[drawn[y] <= top, x].min() / 1.3, 1.3 * last)
  return style.finish(fig, ax, x, fits, style.equation(fits[0]), handles)


def _drawn(curves: pd.DataFrame, x: str, y: str, where: Sequence[str]) -> pd.DataFrame:
  """The measurements that a figure of logs can show. Raises `UserError` when there are none."""
  frames.frame('curves', curves, ('id', 'n_latents', x, y, *where))
  seen = curves[(frames.measured(curves, y) > 0) & (frames.measured(curves, x) > 0)]
  if seen.empty:
    raise UserError(f'the curves have no row with both {x} and {y}; leave them out to draw the fit alone')
  return seen


def _cells_against_compute(fig: Figure, ax: Axes, fit: Fit) -> Figure:
  x = _COMPUTE[0]
  if x not in fit.table:
    raise UserError(
      f'a frontier needs the column {x}, which the points of this fit lack; use plots.joint or plots.power'
    )
  rows = fit.table.sort_values(x)
  targets = sparsity.targets(rows) or [{}]
  handles = []
  for i, target in enumerate(targets):
    color, marker = style.look(i, len(targets))
    mine = sparsity.at(rows, target)
    ax.plot(mine[x], mine[fit.y], marker, ms=5, color=color)
    ax.plot(mine[x], np.minimum.accumulate(mine[fit.y]), color=color, lw=1, drawstyle='steps-post')
    text = ', '.join(style.where(target)) or 'cells'
    handles.append(Line2D([], [], color=color, marker=marker, label=text))
  return style.finish(fig, ax, x, [fit], 'finished cells and the best loss so far', handles)
