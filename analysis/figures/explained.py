"""Figures of explained latents: each latent of two autoencoders, means of families, and how they move with n and L0."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from analysis.explained_cells import F1, PRECISION, RECALL, Explained, Place, scores
from analysis.figures import equal_l0, style
from analysis.law import Array

_HALF = 0.5
_NAMES = {RECALL: 'recall', PRECISION: 'precision', F1: 'F1'}


class _Curve(NamedTuple):
  label: str
  look: tuple[str, str]
  x: list[float]
  places: list[Place]


def drawn(found: Explained, ledger: str) -> dict[str, Figure]:
  """The figures that the cells allow, by name."""
  made = {'latents': latents(found, [(title, *scores(ledger, row['id'])) for title, row in found.shown])}
  mine = [place for place in found.places if place.family == found.families[0]]
  sizes, l0s = (sorted({getattr(place, name) for place in mine}) for name in ('n', 'l0'))
  if len(sizes) > 1:
    of_l0 = [[place for place in mine if place.l0 == l0] for l0 in l0s]
    lines = [
      _Curve(f'L0 = {l0:g}', style.look(i, len(l0s)), [place.n for place in some], some)
      for i, (l0, some) in enumerate(zip(l0s, of_l0, strict=True))
    ]
    made['by_n'] = _moves(found, lines, 'n_latents', sizes, style.plain(found.families[0]))
  looks = equal_l0.looks(found.families)
  of_n = {n: [place for place in found.places if place.n == n] for n in sorted({place.n for place in found.places})}
  n = max(of_n, key=lambda n: (len({place.family for place in of_n[n]}), n))
  if len({place.l0 for place in of_n[n]}) > 1:
    of_family = {name: [place for place in of_n[n] if place.family == name] for name in looks}
    lines = [
      _Curve(style.plain(name), looks[name], [p.reached for p in some], some) for name, some in of_family.items()
    ]
    made['by_l0'] = _moves(found, lines, 'l0', sorted({p.l0 for p in of_n[n]}), f'n = {n:,.0f}')
  return made


def latents(found: Explained, panels: Sequence[tuple[str, Array, Array]]) -> Figure:
  """Recall against precision of every latent of some autoencoders, and beside them the means of all that are alike.

  Args:
    found: where the means are.
    panels: title, precision and recall of the latents, NaN where undefined.
  """
  fig, axes = style.axes(len(panels) + 1)
  fig.set_size_inches(11.2, 3.9)
  for ax, (title, precision_E, recall_E) in zip(axes, panels, strict=False):
    known_E = np.isfinite(precision_E)
    ax.set(xscale='linear', yscale='linear', xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), box_aspect=1)
    ax.add_patch(Rectangle((_HALF, 0), _HALF, _HALF, color=style.WARNING, alpha=0.1, lw=0, zorder=1))
    alpha = min(0.5, 8 / np.sqrt(len(known_E) + 1))
    style.points(ax, recall_E, precision_E, '#0072b2', 'o', ms=4, mew=0, alpha=alpha)
    if known_E.any():
      ax.plot(np.nanmean(recall_E), np.nanmean(precision_E), 'P', color='black', mec='white', ms=9, zorder=5)
    illusory = float(((recall_E > _HALF) & (precision_E < _HALF)).mean())
    box = {'facecolor': 'white', 'alpha': 0.7, 'lw': 0, 'pad': 1.5}
    said = f'high recall,\nlow precision:\n{100 * illusory:.2g} %'
    ax.text(0.75, 0.25, said, color=style.WARNING, ha='center', va='center', fontsize=8.5, zorder=6, bbox=box)
    ax.set_title(f'{title}\n{known_E.sum():,} of {len(known_E):,} latents are ever predicted', fontsize=9)
    ax.set_xlabel('recall')
    ax.set_ylabel('precision' if ax is axes[0] else '')
  _means(axes[-1], found)
  handles = [
    Line2D([], [], ls='', marker='o', color='#0072b2', alpha=0.5, label='an explained latent'),
    Line2D([], [], ls='', marker='P', color='black', mec='white', ms=9, label='mean of these latents'),
    Line2D([], [], ls='', marker='o', color='0.3', label='mean precision'),
    Line2D([], [], ls='', marker='o', color='0.3', mfc='white', label='mean recall'),
    Line2D([], [], ls='', label='bars: ± one standard error'),
  ]
  style.legend(fig, handles)
  return fig


def _means(ax: Axes, found: Explained) -> None:
  """A row a family where the two drawn are, or of one family a row an L0."""
  row = found.shown[0][1]
  near = [place for place in found.places if place.n == row['n_latents']]
  if len(found.families) > 1:
    l0 = min((place.l0 for place in near), key=lambda l0: abs(np.log(l0 / row['l0'])))
    near = [place for place in near if place.l0 == l0]
    ax.set_title(f'at n = {near[0].n:,.0f}, L0 = {l0:g}', fontsize=9)
    looks = equal_l0.looks(found.families)
    rows = [(style.plain(place.family), looks[place.family][0], place) for place in near]
  else:
    ax.set_title(f'{style.plain(near[0].family)}, n = {near[0].n:,.0f}', fontsize=9)
    rows = [(f'L0 = {place.l0:g}', style.look(i, len(near))[0], place) for i, place in enumerate(near)]
  ax.set(
    xscale='linear',
    yscale='linear',
    xlim=(-0.03, 1.03),
    ylim=(len(rows) - 0.5, -0.5),
    xlabel='mean over latents',
    box_aspect=1,
  )
  for y, (_, color, place) in enumerate(rows):
    for column in (PRECISION, RECALL):
      value, se = found.value(place, column)
      style.bars(ax, [value], [y], [value - se], [value + se], color, along='x')
      style.points(ax, [value], [y], color, 'o', hollow=column == RECALL, ms=7)
  ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
  ax.grid(axis='y', visible=False)


def _moves(found: Explained, curves: Sequence[_Curve], x: str, marks: Sequence[float], title: str) -> Figure:
  """Mean recall, precision and F1, a panel each; `marks` are labelled along x."""
  fig, axes = style.axes(len(_NAMES))
  for ax, (column, name) in zip(axes, _NAMES.items(), strict=True):
    top = 0.0
    for curve in curves:
      value_P, se_P = np.array([found.value(place, column) for place in curve.places]).T
      color, marker = curve.look
      ax.plot(curve.x, value_P, color=color, lw=0.9, zorder=3)
      style.bars(ax, curve.x, value_P, value_P - se_P, value_P + se_P, color)
      style.points(ax, curve.x, value_P, color, marker)
      top = np.nanmax([top, *value_P, *(value_P + se_P)])
    style.label(ax, x, '')
    ax.set_title(name, fontsize=10)
    style.ticks(ax, 'k', marks, narrow=True)
    style.linear(ax)
    ax.set_ylim(0, min(1.03, 1.08 * top) if top > 0 else 1)
  axes[0].set_ylabel('mean over explained latents')
  handles = [Line2D([], [], color=curve.look[0], marker=curve.look[1], label=curve.label) for curve in curves]
  style.legend(fig, [*handles, Line2D([], [], ls='', label='bars: ± one standard error')])
  fig.suptitle(title, fontsize=11)
  return fig
