"""Figures of fits: one function each, from fits (and curves) to a matplotlib Figure, without global state.

Colours run from dark to light with the ordered variable and markers differ, so that they survive colour blindness
and grey print. Legends stand outside the axes; warnings of a fit are printed under it.
"""

import textwrap
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import frontier as frontiers
from analysis.fit import Fit, warning_lines
from analysis.laws import SYMBOLS
from sae_jax.errors import UserError

_MARKERS = 'osD^vP*X<>'
_COMPUTE = ('flops_useful', 'flops_dense')
_LABELS = {
  'n_latents': 'latents n',
  'k': 'active latents k',
  'tokens': 'training tokens T',
  'flops_useful': 'training compute C (FLOPs of the sparse algorithm)',
  'flops_dense': 'training compute C (FLOPs of a dense implementation)',
  'nmse': 'normalised MSE (1 = predicting the mean)',
  'normalized_mse': 'normalised MSE (1 = predicting the mean)',
}


def frontier(fits: Fit | Sequence[Fit], curves: pd.DataFrame | None = None) -> Figure:
  """Loss against compute: every run thin, the envelope as points, the law with its band, dashed beyond the data.

  Args:
    fits: from `frontier.fit_frontier`: one, or one a k.
    curves: as from `load_curves`; without them only the points of the fit are drawn.

  A fit of another law is shown as its cells against the compute they took.
  """
  fits = [fits] if isinstance(fits, Fit) else list(fits)
  fig, ax = _axes()
  if fits[0].x[0] not in _COMPUTE:
    return _cells_against_compute(fig, ax, fits[0])
  x, y = fits[0].x[0], fits[0].y
  handles = []
  reach = [fit.table[y] for fit in fits]
  for i, fit in enumerate(fits):
    color, marker = _look(i, len(fits))
    if curves is not None:
      mine = curves
      for key, value in fit.where.items():
        mine = mine[mine[key] == value]
      for _, run in mine[np.isfinite(mine[y])].groupby('id'):
        ax.plot(run[x], run[y], color=color, lw=0.6, alpha=0.4)
      envelope = frontiers.envelope(mine, x, y)
      alone = envelope[~envelope['used']]
      ax.plot(alone[x], alone[y], marker, ms=4.5, mfc='none', mec=color, mew=0.9)
      reach.append(envelope[y])
    ax.plot(fit.table[x], fit.table[y], marker, ms=4.5, color=color, mec='white', mew=0.4, zorder=4)
    _draw_law(ax, fit, {}, color, beyond=10)
    handles.append(Line2D([], [], color=color, marker=marker, label=_constants(fit)))
  if curves is not None:
    handles.append(Line2D([], [], color='0.4', lw=0.6, label='one run'))
    handles.append(
      Line2D([], [], ls='', marker='o', mfc='none', mec='0.4', label='only one size there: not fitted')
    )
  # The first steps of large runs lie far above; they would squeeze the envelope into the bottom of the figure.
  ax.set_ylim(0.8 * min(r.min() for r in reach), 1.2 * max(r.max() for r in reach))
  return _finish(fig, ax, fits, x, y, _equation(fits[0]), handles)


def joint(fit: Fit) -> Figure:
  """Loss against n for every k, with the joint law; a column `paper_fit` is drawn underneath as published."""
  if len(fit.x) != 2:
    raise UserError(f'a joint figure needs a law over two variables, not {fit.law.name}; use plots.power')
  fig, ax = _axes()
  x, second = fit.x
  values = np.sort(fit.table[second].unique())
  handles = []
  for i, value in enumerate(values):
    color, marker = _look(i, len(values))
    points = fit.table[fit.table[second] == value].sort_values(x)
    if 'paper_fit' in points:
      ax.plot(points[x], points['paper_fit'], color='0.75', lw=4, zorder=0)
    ax.plot(points[x], points[fit.y], marker, ms=5, color=color, mec='white', mew=0.4, zorder=4)
    _draw_law(ax, fit, {second: value}, color, beyond=4)
    handles.append(Line2D([], [], color=color, marker=marker, label=f'${_symbol(second)}$ = {value:g}'))
  if 'paper_fit' in fit.table:
    handles.append(Line2D([], [], color='0.75', lw=4, label='as published'))
  handles.append(Line2D([], [], ls='', label='\n' + _constants(fit)))
  return _finish(fig, ax, [fit], x, fit.y, _equation(fit), handles)


def power(fits: Fit | Sequence[Fit]) -> Figure:
  """Loss against one variable with a power law; several fits (one a k) in one figure."""
  fits = [fits] if isinstance(fits, Fit) else list(fits)
  fig, ax = _axes()
  x, y = fits[0].x[0], fits[0].y
  handles = []
  for i, fit in enumerate(fits):
    color, marker = _look(i, len(fits))
    ax.plot(fit.table[x], fit.table[y], marker, ms=5, color=color, mec='white', mew=0.4, zorder=4)
    _draw_law(ax, fit, {}, color, beyond=4)
    handles.append(Line2D([], [], color=color, marker=marker, label=_constants(fit)))
  # By the points: a band that explodes at one end would flatten everything else.
  losses = pd.concat([fit.table[y] for fit in fits])
  ax.set_ylim(0.8 * losses.min(), 1.2 * losses.max())
  return _finish(fig, ax, fits, x, y, _equation(fits[0]), handles)


def residuals(fit: Fit) -> Figure:
  """Residuals of the fit in per cent of the loss, against its first variable; the grey band is one rms."""
  fig, ax = _axes()
  x = fit.x[0]
  percent = 100 * fit.residuals()
  rms = 100 * fit.diagnostics['rms_log_residual']
  ax.axhspan(-rms, rms, color='0.9', zorder=0)
  ax.axhline(0, color='0.4', lw=0.8)
  second = fit.table[fit.x[1]] if len(fit.x) == 2 else pd.Series(0, fit.table.index)
  values = np.sort(second.unique())
  handles = []
  for i, value in enumerate(values):
    color, marker = _look(i, len(values))
    mine = (second == value).to_numpy()
    order = np.argsort(fit.table[x].to_numpy()[mine], kind='stable')
    ax.plot(
      fit.table[x].to_numpy()[mine][order], percent[mine][order], color=color, marker=marker, ms=5, lw=0.8
    )
    if len(fit.x) == 2:
      handles.append(Line2D([], [], color=color, marker=marker, label=f'${_symbol(fit.x[1])}$ = {value:g}'))
  handles.append(Line2D([], [], color='0.9', lw=6, label=f'rms {rms:.2g} %'))
  _finish(fig, ax, [fit], x, fit.y, _equation(fit), handles)
  ax.set_yscale('linear')
  ax.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=[1, 2, 5, 10]))
  ax.yaxis.set_major_formatter(
    ticker.FuncFormatter(lambda value, _: f'{value:g}'.replace('-', '\N{MINUS SIGN}'))
  )
  ax.set_ylabel('ln predicted \N{MINUS SIGN} ln observed, in %')
  return fig


def _cells_against_compute(fig: Figure, ax: Axes, fit: Fit) -> Figure:
  x = _COMPUTE[0]
  if x not in fit.table:
    raise UserError(
      f'a frontier needs the column {x}, which the points of this fit lack; use plots.joint or plots.power'
    )
  points = fit.table.sort_values(x)
  values = np.sort(points['k'].unique()) if 'k' in points else np.array([np.nan])
  handles = []
  for i, value in enumerate(values):
    color, marker = _look(i, len(values))
    mine = points[points['k'] == value] if 'k' in points else points
    ax.plot(mine[x], mine[fit.y], marker, ms=5, color=color)
    ax.plot(mine[x], np.minimum.accumulate(mine[fit.y]), color=color, lw=1, drawstyle='steps-post')
    label = f'$k$ = {value:g}' if 'k' in points else 'cells'
    handles.append(Line2D([], [], color=color, marker=marker, label=label))
  return _finish(fig, ax, [fit], x, fit.y, 'finished cells and the best loss so far', handles)


def _axes() -> tuple[Figure, Axes]:
  fig = Figure(figsize=(8.4, 4.9), dpi=160, layout='constrained')
  ax = fig.add_subplot()
  ax.set_xscale('log')
  ax.set_yscale('log')
  ax.grid(which='major', color='0.92', lw=0.8)
  ax.set_axisbelow(True)
  ax.spines[['top', 'right']].set_visible(False)
  return fig, ax


def _look(i: int, count: int) -> tuple[str, str]:
  """Colour and marker of the i-th of `count` ordered values; the light end of the map would vanish on white."""
  rgba = matplotlib.colormaps['viridis'](0.82 * i / max(1, count - 1))
  return matplotlib.colors.to_hex(rgba), _MARKERS[i % len(_MARKERS)]


def _draw_law(ax: Axes, fit: Fit, fixed: dict[str, float], color: str, beyond: float) -> None:
  """The law over the data and, dashed, `beyond` times further; its band over both."""
  points = fit.table
  for key, value in fixed.items():
    points = points[points[key] == value]
  x = fit.x[0]
  low, high = float(points[x].min()), float(points[x].max())
  for start, stop, style in ((low, high, '-'), (high, high * beyond, '--')):
    at = {x: np.geomspace(start, stop, 80)} | {key: np.full(80, value) for key, value in fixed.items()}
    ax.plot(at[x], fit.predict(at), style, color=color, lw=1.3, zorder=3)
    below, above = fit.band(at)
    ax.fill_between(at[x], below, above, color=color, alpha=0.18, lw=0, zorder=2)


def _finish(
  fig: Figure, ax: Axes, fits: Sequence[Fit], x: str, y: str, title: str, handles: list[Line2D]
) -> Figure:
  ax.set_xlabel(_LABELS.get(x, x), parse_math=False)
  ax.set_ylabel(_LABELS.get(y, y), parse_math=False)
  ax.set_title(title, fontsize=11, pad=10)
  _log_ticks(ax, x, np.concatenate([f.table[x].to_numpy(float) for f in fits if x in f.table]))
  legend = fig.legend(
    handles=handles, loc='outside right upper', frameon=False, fontsize=8.5, labelspacing=0.7
  )
  for text in legend.get_texts():
    text.set_linespacing(1.35)
  notes = warning_lines(fits)
  if notes:
    lines = [line for note in notes for line in textwrap.wrap(note, 150, max_lines=2, placeholder=' …')]
    shown = lines[:6] + (['… more in the report'] if len(lines) > 6 else [])
    fig.supxlabel(
      '\n'.join(shown), fontsize=7, style='italic', color='0.3', x=0.01, ha='left', parse_math=False
    )
  return fig


def _log_ticks(ax: Axes, x: str, values_N: np.ndarray) -> None:
  """Sizes that were trained as they are, powers of ten for the rest; round losses."""
  sizes = np.unique(values_N)
  low, high = ax.get_xlim()
  if x in ('n_latents', 'k') and len(sizes) <= 24:
    every = -(-len(sizes) // 7)
    ax.xaxis.set_major_locator(ticker.FixedLocator(sizes[::-1][::every][::-1].tolist()))
    ax.xaxis.set_minor_locator(ticker.FixedLocator(sizes.tolist()))
    ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:.10g}'))
  elif high / low < 50:
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(ticker.LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(9, 9)))
  ax.xaxis.set_minor_formatter(ticker.NullFormatter())
  low, high = ax.get_ylim()
  if high / low > 1.5:
    fine, middle, coarse = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5)
    subs = fine if high / low < 3 else middle if high / low < 12 else coarse
    ax.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
  else:
    ax.yaxis.set_major_locator(ticker.MaxNLocator(6))
  ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:g}'))
  ax.yaxis.set_minor_locator(ticker.NullLocator())


def _symbol(column: str) -> str:
  return SYMBOLS.get(column, 'x')


def _equation(fit: Fit) -> str:
  symbols: Iterable[str] = [
    SYMBOLS.get(c, f'x_{i + 1}' if len(fit.x) > 1 else 'x') for i, c in enumerate(fit.x)
  ]
  text = fit.law.latex
  for i, symbol in enumerate(symbols):
    text = text.replace(f'<{i}>', symbol)
  return f'$L({", ".join(symbols)}) = {text}$'


def _constants(fit: Fit) -> str:
  """Every constant with its 90 % interval, one a line, and the held-out error."""
  lines = [f'${_symbol(key)}$ = {value:g}' for key, value in fit.where.items()]
  for name, p in fit.params.items():
    stem, _, index = name.partition('_')
    letter = (f'\\{stem}' if len(stem) > 1 else stem) + (f'_{index}' if index else '')
    interval = (
      f' [{_number(p["low"])}, {_number(p["high"])}]' if np.isfinite([p['low'], p['high']]).all() else ''
    )
    lines.append(f'${letter}$ = {_number(p["estimate"])}{interval}')
  if fit.holdout:
    lines.append(f'held out: {100 * fit.holdout["mean_rel_err"]:.2g} % mean error')
  return '\n'.join(lines)


def _number(value: float) -> str:
  """Three digits in mathtext, so that minus signs and powers of ten look right."""
  if abs(value) < 1e-6:
    return '$0$'
  if 1e-3 <= abs(value) < 1e3:
    return f'${value:.3g}$'
  mantissa, exponent = f'{value:.1e}'.split('e')
  return f'${mantissa}{{\\times}}10^{{{int(exponent)}}}$'
