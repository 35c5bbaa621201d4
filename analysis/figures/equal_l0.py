"""The figure of families at one size: loss against measured L0."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.equal_l0 import EqualL0
from analysis.figures import style


def equal_l0(found: EqualL0) -> Figure:
  """Loss against L0, a line a family, and the L0 at which they are compared."""
  fig, (ax,) = style.axes()
  names = sorted(found.rows['activation'].unique())
  handles = []
  for i, name in enumerate(names):
    color, marker = style.look(i, len(names))
    rows = found.rows[found.rows['activation'] == name].sort_values('l0')
    ax.plot(rows['l0'], rows['nmse'], color=color, lw=1)
    style.points(ax, rows['l0'], rows['nmse'], color, marker)
    handles.append(Line2D([], [], color=color, marker=marker, label=style.plain(name)))
  ax.axvline(found.l0, color='0.6', lw=0.8, ls=':')
  handles.append(Line2D([], [], color='0.6', lw=0.8, ls=':', label=f'compared at L0 = {found.l0:.3g}'))
  ax.set(xscale='log', yscale='log')
  style.label(ax, 'l0', 'nmse')
  ax.set_title(f'n = {found.n_latents:,}')
  style.ticks(ax, 'l0')
  style.legend(fig, handles)
  return fig
