"""Figures of families at equal L0: their frontiers at every size, and how each scales with n."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import sparsity
from analysis.equal_l0 import Compared
from analysis.figures import style

_MOST = 6  # panels
# Of kinds without an order, which must differ at a glance and for the colour-blind (Okabe and Ito); black is the reference.
_COLORS = ('#d55e00', '#0072b2', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#882255', '#999933', '#7f7f7f', '#6a3d9a')


def frontiers(found: Compared) -> Figure:
  """Loss against measured L0, a panel a size and a line a family; dotted where they are compared first of all."""
  sizes = [n for n in found.sizes if sparsity.at(found.curves, {'n_latents': n})['activation'].nunique() > 1]
  if len(sizes) > _MOST:
    sizes = [sizes[i] for i in np.linspace(0, len(sizes) - 1, _MOST).round().astype(int)]
  fig, axes = style.axes(len(sizes), share=True)
  looks = of_families(found)
  for ax, n in zip(axes, sizes, strict=True):
    for name, (color, marker) in looks.items():
      place = {'n_latents': n, 'activation': name}
      cells, curve = sparsity.at(found.cells, place), sparsity.at(found.curves, place)
      ax.plot(curve['l0'], curve['nmse'], color=color, lw=1.2, zorder=3)
      style.points(ax, cells['l0'], cells['nmse'], color, marker)
    ax.axvline(found.main, color='0.6', lw=0.8, ls=':')
    ax.set_title(f'n = {n:,.0f}', fontsize=10.5)
  for i, ax in enumerate(axes):
    bottom, left = i + 3 >= len(axes), i % 3 == 0  # of its column and row
    style.label(ax, 'l0' if bottom else '', 'nmse' if left else '')
    style.ticks(ax, 'l0', narrow=True)
    ax.tick_params(labelbottom=bottom, labelleft=left)
  handles = [Line2D([], [], color=c, marker=m, label=style.plain(name)) for name, (c, m) in looks.items()]
  handles.append(Line2D([], [], color='0.6', lw=0.8, ls=':', label=f'L0 = {found.main:g}'))
  style.legend(fig, handles)
  return fig


def drawn(found: Compared) -> dict[str, Figure]:
  """The figures of families by name; against n only where there are points at two sizes."""
  sizes = sparsity.at(found.points(), {'l0': found.main})['n_latents'].nunique()
  return {'frontiers': frontiers(found)} | ({'scaling': scaling(found)} if sizes > 1 else {})


def scaling(found: Compared) -> Figure:
  """At equal L0, loss against n with each family's power law, and beside it the loss over that of the reference."""
  fig, (left, right) = style.axes(2)
  looks, laws = of_families(found), {fit.where['activation']: fit for fit in found.laws}
  points = sparsity.at(found.points(), {'l0': found.main})
  handles, span = [], found.sizes[-1] / found.sizes[0]
  right.axhline(0, color=looks[found.reference][0], lw=1.2)
  for i, (name, (color, marker)) in enumerate(looks.items()):
    rows, text = points[points['activation'] == name], style.plain(name)
    style.bars(left, rows['n_latents'], rows['nmse'], rows['low'], rows['high'], color)
    style.points(left, rows['n_latents'], rows['nmse'], color, marker)
    if name not in laws:
      left.plot(rows['n_latents'], rows['nmse'], color=color, lw=0.8)
    else:
      fit = laws[name]
      style.law(left, fit, {}, color, beyond=1, band=False)
      text += ': exponent ' + style.estimate(*(fit.params['b'][key] for key in ('estimate', 'low', 'high')))
    handles.append(Line2D([], [], color=color, marker=marker, label=text))
    ratios = [(n, found.ratio(name, found.reference, n, found.main)) for n in found.sizes]
    shown = [(n * span ** (0.01 * (i - len(looks) / 2)), *(100 * (r - 1) for r in ratio)) for n, ratio in ratios]
    x, middle, low, high = np.array([row for row in shown if np.isfinite(row[1])] or np.empty((0, 4))).T
    if name != found.reference:
      right.plot(x, middle, color=color, lw=0.8)
      style.bars(right, x, middle, low, high, color)
      style.points(right, x, middle, color, marker)
  style.label(left, 'n_latents', 'nmse')
  style.label(right, 'n_latents', f'NMSE above that of {found.reference}, in %')
  for ax in (left, right):
    style.ticks(ax, 'n_latents', points['n_latents'].to_numpy(), narrow=True)
  style.linear(right)
  known = 'bars: 90 % intervals' if np.isfinite(found.scatter) else 'one seed and few cells: no intervals'
  fig.suptitle(f'at L0 = {found.main:g}; {known}', fontsize=11)
  style.legend(fig, handles)
  return fig


def of_families(found: Compared) -> dict[str, tuple[str, str]]:
  """Colour and marker of every family, the reference first."""
  return looks([found.reference, *(name for name in found.ranked if name != found.reference)])


def looks(families: Sequence[str]) -> dict[str, tuple[str, str]]:
  """Colour and marker of families, of which the first is black."""
  colors = ['#000000', *(_COLORS[i % len(_COLORS)] for i in range(len(families) - 1))]
  return {name: (colors[i], style.look(i, len(families))[1]) for i, name in enumerate(families)}
