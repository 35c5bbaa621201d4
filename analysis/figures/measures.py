"""The figure of a value that was measured: against n, against the active latents, and against the NMSE with its law."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import sparsity
from analysis.figures import equal_l0, style
from analysis.measure_laws import OneValue
from analysis.measured import SE

_AGAINST_N, _AGAINST_SPARSITY, _AGAINST_NMSE = range(3)
_WIDE = 3.0  # ratio of values from which an axis is logarithmic


class _Curve(NamedTuple):
  panel: int
  label: str
  color: str
  marker: str
  points: pd.DataFrame  # x, y, se


def value(one: OneValue) -> Figure:
  """A line a target and a line a size or, where families are compared, a line a family. Bars are standard errors."""
  fig, axes = style.axes(3)
  curves = [*(_families(one) if one.at_l0 else _targets(one))]
  handles: dict[str, Line2D] = {}
  for panel, label, color, marker, points in curves:
    ax, middle = axes[panel], points.groupby('x', as_index=False)['y'].mean()  # of seeds
    if panel != _AGAINST_NMSE:
      ax.plot(middle['x'], middle['y'], color=color, lw=0.9, zorder=3)
    style.bars(ax, points['x'], points['y'], points['y'] - points['se'], points['y'] + points['se'], color)
    style.points(ax, points['x'], points['y'], color, marker)
    handles.setdefault(label, Line2D([], [], color=color, marker=marker, label=label))
  if one.law:
    looks = equal_l0.of_families(one.at_l0.of) if one.apart and one.at_l0 else {'': ('0.35', '')}
    for name, (color, _) in looks.items():
      if name and name not in one.families:
        continue
      # A family is e in its own column and 1 in those of the others.
      family = {x: np.e if x == f'activation={name}' else 1.0 for x in one.law.x[1:]}
      style.law(axes[_AGAINST_NMSE], one.law, family, color, beyond=1.2, band=not one.apart)
    text = 'power law of the NMSE' + (',\none exponent for all' if one.apart else '')
    handles['law'] = Line2D([], [], color='0.35', lw=1.4, label=f'{text};\ndashed: beyond the cells')
  drawn = pd.concat([curve.points for curve in curves])
  ends = [float(np.min(line.get_ydata())) for line in axes[_AGAINST_NMSE].lines if one.law]
  reach = drawn['se'].fillna(0)
  low, high = min([float((drawn['y'] - reach).min()), *ends]), float((drawn['y'] + reach).max())
  steep = low > 0 and (high > _WIDE * low or one.law is not None)
  sparse = 'l0' if one.at_l0 or _missed(one.cells) else 'k'
  for ax, x in zip(axes, ('n_latents', sparse, 'nmse'), strict=True):
    style.label(ax, 'normalised MSE' if x == 'nmse' else x, one.column if ax is axes[0] else '')
    if steep:
      ax.set_ylim(low / 1.1, high * 1.1)
    style.ticks(ax, x, one.cells[x].to_numpy(float), narrow=True)
    if not steep:
      style.linear(ax)
      ax.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    ax.tick_params(labelleft=ax is axes[0])
  if one.at_l0:
    axes[_AGAINST_N].set_title(f'at L0 = {one.at_l0.of.main:g}', fontsize=10)
    axes[_AGAINST_SPARSITY].set_title(f'at n = {_largest(one):,.0f}', fontsize=10)
  if one.column not in style.LABELS:
    axes[0].set_ylabel(f'{one.column} ({one.units})'[:80], parse_math=False)
  style.legend(fig, [*handles.values(), Line2D([], [], ls='', label='bars: ± one standard error')])
  fig.suptitle(_title(one), fontsize=11)
  style.warn(fig, style.codes([one.law]) if one.law else [])
  return fig


def _targets(one: OneValue) -> Iterator[_Curve]:
  """Of one family: against n a line a target, against the active latents a line a size."""
  cells = one.cells
  targets, sizes = sparsity.targets(cells), np.sort(cells['n_latents'].unique())
  for i, target in enumerate(targets):
    rows = sparsity.at(cells, target)
    label = ', '.join(style.where(target))
    for panel, x in ((_AGAINST_N, 'n_latents'), (_AGAINST_NMSE, 'nmse')):
      yield _Curve(panel, label, *style.look(i, len(targets)), _points(one, rows, x))
  for i, n in enumerate(sizes):
    grey = str(round(0.75 - 0.65 * i / max(1, len(sizes) - 1), 3))  # of another kind than the colours of targets
    rows = cells[cells['n_latents'] == n]
    marker = style.look(i, len(sizes))[1]
    yield _Curve(
      _AGAINST_SPARSITY, f'$n$ = {n:,.0f}', grey, marker, _points(one, rows, 'l0' if _missed(cells) else 'k')
    )


def _families(one: OneValue) -> Iterator[_Curve]:
  """Against n at one L0, against L0 at the largest size that most families have, and against the NMSE everywhere."""
  found = one.at_l0
  assert found is not None
  for name, look in equal_l0.of_families(found.of).items():
    rows = sparsity.at(one.cells, {'activation': name})
    read = [(n, *found.value(name, n)) for n in found.of.sizes]
    at_n = pd.DataFrame([row for row in read if np.isfinite(row[1])], columns=pd.Index(['x', 'y', 'se']), dtype=float)
    at_size = _points(one, rows[rows['n_latents'] == _largest(one)], 'l0')
    for panel, points in enumerate((at_n, at_size, _points(one, rows, 'nmse'))):
      yield _Curve(panel, style.plain(name), *look, points)


def _largest(one: OneValue) -> float:
  """The largest size that most families have."""
  count = one.cells.groupby('n_latents')['activation'].nunique()
  return float(count[count == count.max()].index.max())


def _points(one: OneValue, rows: pd.DataFrame, x: str) -> pd.DataFrame:
  return pd.DataFrame({'x': rows[x], 'y': rows[one.column], 'se': rows[one.column + SE]}).sort_values('x')


def _missed(cells: pd.DataFrame) -> bool:
  """Whether what was asked for is not what came of it."""
  return bool((cells['k'].isna() | (cells['l0'] > sparsity.ALIKE * cells['k'])).any())


def _title(one: OneValue) -> str:
  name = style.plain(one.column)
  if not one.law:
    alike = one.alike[0]
    known = f'rank correlation with the NMSE {style.number(alike)}' if np.isfinite(alike) else 'the same everywhere'
    return f'{name}: {known}, {len(one.cells)} cells'
  p = one.law.params['p']
  grows = 'grows' if p['estimate'] > 0 else 'falls'
  power = style.estimate(p['estimate'], p['low'], p['high']).partition(' ')
  within = 100 * one.law.diagnostics['rms_log_residual']
  return rf'{name} {grows} as $\mathrm{{NMSE}}^{{{power[0]}}}$ {power[2]}: {len(one.cells)} cells within {within:.2g} %'
