"""What all figures share: axes, looks, ticks, the drawing of a law, legends and warnings.

Colours run from dark to light with the ordered variable and markers differ, so that they survive colour blindness
and grey print. Legends stand outside the axes; codes of the warnings stand in the lower left corner of the figure.
"""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.fit_result import Fit
from analysis.law import Array
from analysis.laws import SYMBOLS
from analysis.sparsity import MEASURED, at, gathered
from sae_jax import checks

LABELS = {
  'n_latents': 'latents n',
  'k': 'active latents k',
  'l0': 'measured L0 (active latents a token)',
  'sparsity': 'coefficient of the penalty λ (in units of the NMSE)',
  'tokens': 'training tokens T',
  'converged_tokens': 'tokens to convergence T',
  'flops_useful': 'training compute C (FLOPs of the sparse algorithm)',
  'flops_dense': 'training compute C (FLOPs of a dense implementation)',
  'budget': 'training compute C (FLOPs of the sparse algorithm)',
  'learning_rate': 'learning rate η (of Adam, without unit)',
  'nmse': 'normalised MSE (1 = predicting the mean)',
  'normalized_mse': 'normalised MSE (1 = predicting the mean)',
  'downstream/kl': 'KL from the undisturbed model (nats a token)',
  'downstream/delta_ce': 'what the splice adds to the loss, ΔCE (nats a token)',
  'downstream/recovered_zero': 'loss recovered against zero ablation (share)',
  'downstream/recovered_mean': 'loss recovered against mean ablation (share)',
}
WARNING = '#a34f00'
_MINUS = '\N{MINUS SIGN}'
_RAISED = str.maketrans('-0123456789', '⁻⁰¹²³⁴⁵⁶⁷⁸⁹')
_LOSSES = ('nmse', 'normalized_mse')
_MARKERS = 'osD^vP*X<>'
_X_SYMBOLS = SYMBOLS | {'budget': 'C', 'nmse': r'\mathrm{NMSE}', 'l0': 'L_0', 'sparsity': r'\lambda'}
_Y_SYMBOLS = {'converged_tokens': 'T', 'learning_rate': r'\eta', 'n_latents': r'n_{\mathrm{opt}}'}


def axes(panels: int = 1, *, share: bool = False) -> tuple[Figure, list[Axes]]:
  """A figure with logarithmic axes side by side, three in a row at most; `share` for those with the same limits."""
  rows = -(-panels // 3)
  fig = Figure(figsize=(8.4 if panels == 1 else 11.2, 4.9 if rows == 1 else 3.6 * rows), dpi=160, layout='constrained')
  grid = list(np.ravel(fig.subplots(rows, min(panels, 3), sharex=share, sharey=share)))
  out = grid[:panels]
  for ax in grid[panels:]:
    ax.remove()
  for ax in out:
    ax.set_xscale('log')
    ax.set_yscale('log')
    ax.grid(which='major', color='0.92', lw=0.8)
    ax.set_axisbelow(True)
    ax.spines[['top', 'right']].set_visible(False)
  return fig, out


def saved(fig: Figure) -> dict[str, bytes]:
  """The figure as a file of every kind, by its ending. No dates and versions are in them: one figure, the same bytes."""
  metadata: dict[str, dict[str, Any]] = {'png': {'Software': None}, 'pdf': {'CreationDate': None}}
  out = {}
  for kind, said in metadata.items():
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, metadata=said)
    fig.set_layout_engine('none')  # it is laid out now; once more would double the time
    out[kind] = buffer.getvalue()
  return out


def look(i: int, count: int) -> tuple[str, str]:
  """Colour and marker of the i-th of `count` ordered values; the light end of the map would vanish on white."""
  rgba = matplotlib.colormaps['viridis'](0.76 * i / max(1, count - 1))
  return matplotlib.colors.to_hex(rgba), _MARKERS[i % len(_MARKERS)]


def points(ax: Axes, x: Any, y: Any, color: str, marker: str, *, hollow: bool = False, **more: Any) -> None:
  """Markers without a line: full ones belong to a fit, hollow ones were left out."""
  face, edge, width = ('white', color, 1.0) if hollow else (color, 'white', 0.4)
  ax.plot(x, y, marker, **({'ms': 5.5, 'mfc': face, 'mec': edge, 'mew': width, 'zorder': 4} | more))


def bars(ax: Axes, x: Any, y: Any, low: Any, high: Any, color: str, *, along: str = 'y') -> None:
  """90 % intervals through points, along x or y; none is drawn where an end is not known."""
  middle = np.asarray(x if along == 'x' else y, float)
  reach = np.abs(np.stack([np.asarray(low, float), np.asarray(high, float)]) - middle)
  ax.errorbar(x, y, **{f'{along}err': reach}, fmt='none', ecolor=color, elinewidth=1.0, capsize=2.5, zorder=3)


def refused(ax: Axes, at: Sequence[float]) -> None:
  """Crosses at the bottom where there was something to see but nothing to conclude."""
  if not len(at):
    return  # an empty line that is not clipped has no extent, and the layout collapses
  y = np.full(len(at), 0.025)
  ax.plot(at, y, 'x', color='0.4', ms=6, transform=ax.get_xaxis_transform(), clip_on=False)


def sides(fit: Fit) -> tuple[str, str | None]:
  """The variable along the axis, and the one whose every value gets a curve of its own.

  No two cells have one L0, so it goes along the axis.
  """
  x, *others = fit.x
  return (others[0], x) if MEASURED in others else (x, others[0] if others else None)


def law(ax: Axes, fit: Fit, fixed: Mapping[str, float], color: str, beyond: float, *, band: bool = True) -> None:
  """The law over the data and, dashed, `beyond` times further; its band over both unless told otherwise.

  Further is to larger values, or to lower ones of a loss.
  """
  rows = at(fit.table, fixed)
  x = sides(fit)[0]
  low, high = float(rows[x].min()), float(rows[x].max())
  further = (low / beyond, low) if x in _LOSSES else (high, high * beyond)
  for start, stop, style in ((low, high, '-'), (*further, '--')):
    place = {x: np.geomspace(start, stop, 80)} | {key: np.full(80, value) for key, value in fixed.items()}
    ax.plot(place[x], fit.predict(place), style, color=color, lw=1.4, zorder=3)
    if not band:
      continue
    below, above = fit.band(place)
    ax.fill_between(place[x], below, above, color=color, alpha=0.16, lw=0, zorder=2)


def label(ax: Axes, x: str, y: str) -> None:
  """Axis labels with their units; names that are not ours are shown as they are."""
  ax.set_xlabel(LABELS.get(x, x), parse_math=False)
  ax.set_ylabel(LABELS.get(y, y), parse_math=False)


def ticks(ax: Axes, x: str = '', sizes: Sequence[float] | Array = (), *, narrow: bool = False) -> None:
  """Round numbers on both axes; on an axis of sizes, those that were trained and their continuation."""
  _round_ticks(ax.yaxis, *ax.get_ylim(), most=200)
  known = np.unique(np.asarray(sizes, float))
  if x not in ('n_latents', 'k') or not 0 < len(known) <= 24:
    _round_ticks(ax.xaxis, *ax.get_xlim(), most=40 if narrow else 120)
    return
  if len(known) == 1:  # points above each other: of their own, limits have no width, and the axes vanish
    ax.set_xlim(known[0] / 2, known[0] * 2)
  ratio = known[-1] / known[-2] if len(known) > 1 else np.inf
  further = known[-1] * ratio ** np.arange(1, 1 + math.floor(np.log(ax.get_xlim()[1] / known[-1]) / np.log(ratio)))
  shown = np.concatenate([known, further])
  letters = sum(len(f'{value:.10g}') for value in shown)
  every = -(-letters // (28 if narrow else 42))  # labels must not touch
  ax.xaxis.set_major_locator(ticker.FixedLocator(shown[::-1][::every][::-1].tolist()))
  ax.xaxis.set_minor_locator(ticker.FixedLocator(shown.tolist()))
  ax.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:.10g}'))
  ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def legend(fig: Figure, handles: Sequence[Line2D]) -> None:
  """Outside on the right, where it can hide no point."""
  box = fig.legend(handles=list(handles), loc='outside right upper', frameon=False, fontsize=8.5, labelspacing=0.7)
  for text in box.get_texts():
    text.set_linespacing(1.35)


def warn(fig: Figure, codes: Sequence[str]) -> None:
  """Codes such as 'few_points' as '! few points' in the lower left corner; what they mean is in the report."""
  if codes:
    said = '   '.join(f'! {code.replace("_", " ")}' for code in dict.fromkeys(codes))
    text = '\n'.join(textwrap.wrap(said, 130))
    fig.supxlabel(text, fontsize=8.5, color=WARNING, x=0.01, ha='left', parse_math=False)


def finish(fig: Figure, ax: Axes, x: str, fits: Sequence[Fit], title: str, handles: list[Line2D]) -> Figure:
  """The figure with labels, a title, ticks, a legend and the warnings of its fits."""
  label(ax, x, fits[0].y)
  families = {fit.where.get('activation', '') for fit in fits}
  name = families.pop() if len(families) == 1 else ''  # of several, the legend says which is whose
  ax.set_title(title + (f', {plain(name)}' if name else ''), fontsize=11, pad=10)
  ticks(ax, x, np.concatenate([fit.table[x].to_numpy(float) for fit in fits]))
  legend(fig, handles)
  warn(fig, codes(fits))
  return fig


def given_codes(value: Sequence[str]) -> tuple[str, ...]:
  """Codes of warnings that a caller wants shown; a single text would be shown letter by letter."""
  return checks.texts('codes', value, "codes=['few_points']", least=0)


def codes(fits: Sequence[Fit]) -> list[str]:
  """Codes of the warnings of these fits, each followed by the values it holds for when that is not all of them."""
  out = []
  for code in dict.fromkeys(w['code'] for fit in fits for w in fit.warnings):
    hit = [fit for fit in fits if any(w['code'] == code for w in fit.warnings)]
    own = gathered(dict([*fit.where.items()][-1:]) for fit in hit)  # the target, which tells them apart
    said = ', '.join(f'{key} = {values}' for key, values in own.items())
    out.append(code if len(hit) == len(fits) or not said else f'{code} ({said})')
  return out


def equation(fit: Fit) -> str:
  """The law in mathtext, in the symbols of its columns."""
  fallback = 'y' if fit.law.name == 'growth' or '/' in fit.y else 'L'
  text, symbols = fit.law.latex, []
  for i, column in enumerate(fit.x):
    symbols.append(_X_SYMBOLS.get(column, f'x_{i + 1}' if len(fit.x) > 1 else 'x'))
    text = text.replace(f'<{i}>', symbols[-1])
  return f'${_Y_SYMBOLS.get(fit.y, fallback)}({", ".join(symbols)}) = {text}$'


def symbol(column: str) -> str:
  """In mathtext, without dollars."""
  return _X_SYMBOLS.get(column, 'x')


def constants(fit: Fit, fits: Sequence[Fit] = ()) -> str:
  """Every constant with its 90 % interval, one a line, and the held-out error; before them what tells it from `fits`."""
  shared = {'activation'} if len({one.where.get('activation') for one in fits}) < 2 else set()
  lines = where({key: value for key, value in fit.where.items() if key not in shared})
  for name, p in fit.params.items():
    stem, _, index = name.partition('_')
    letter = (f'\\{stem}' if len(stem) > 1 else stem) + (f'_{index}' if index else '')
    nothing = 1e-6 if name == 'e' else 0.0
    lines.append(f'${letter}$ = {estimate(p["estimate"], p["low"], p["high"], nothing)}')
  if fit.holdout:
    lines.append(f'held out: {100 * fit.holdout["mean_rel_err"]:.2g} % mean error')
  return '\n'.join(lines)


def where(common: Mapping[str, float | str]) -> list[str]:
  """What the points of a fit have in common, such as k = 8, in mathtext; texts stand for themselves."""
  return [plain(value) if isinstance(value, str) else f'${symbol(key)}$ = {value:g}' for key, value in common.items()]


def estimate(value: float, low: float, high: float, nothing: float = 0.0) -> str:
  """A number with its 90 % interval where that is known."""
  ends = f' [{number(low, nothing)}, {number(high, nothing)}]' if np.isfinite([low, high]).all() else ''
  return number(value, nothing) + ends


def number(value: float, nothing: float = 0.0) -> str:
  """Three digits with true minus signs and powers of ten; 0 up to `nothing`. Plain text, for mathtext is slow to draw."""
  if abs(value) <= nothing:
    return '0'
  if 1e-3 <= abs(value) < 1e3:
    return f'{value:.3g}'.replace('-', _MINUS)
  if 1e3 <= abs(value) < 1e5:
    return f'{float(f"{value:.3g}"):.0f}'.replace('-', _MINUS)
  mantissa, exponent = f'{value:.1e}'.split('e')
  return f'{mantissa.replace("-", _MINUS)}\N{MULTIPLICATION SIGN}{power_of_ten(int(exponent))}'


def power_of_ten(exponent: int) -> str:
  """Such as 10⁻³."""
  return '10' + str(exponent).translate(_RAISED)


def plain(text: Any, most: int = 40) -> str:
  """Text from data for a figure: no mathtext, one line, not longer than fits."""
  words = ' '.join(str(text).split())
  return (words if len(words) <= most else words[: most - 1] + '…').replace('$', r'\$')


def linear(ax: Axes) -> None:
  """A plain y axis, for differences in per cent."""
  ax.set_yscale('linear')
  ax.yaxis.set_major_locator(ticker.MaxNLocator(7, steps=[1, 2, 5, 10]))
  ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f'{v:g}'.replace('-', _MINUS)))


def _round_ticks(axis: Axis, low: float, high: float, most: float) -> None:
  """Up to `most` times the smallest value, more than powers of ten are labelled."""
  span = high / low
  if span > 1.5:
    fine, middle, coarse = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 5)
    subs = fine if span < 3 else middle if span < 12 else coarse if span < most else (1,)
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
    rest = ticker.NullLocator() if span < most else ticker.LogLocator(subs='auto', numticks=20)
    axis.set_minor_locator(rest)
  else:
    axis.set_major_locator(ticker.MaxNLocator(6))
    axis.set_minor_locator(ticker.NullLocator())
  powers = low < 0.9e-3 or high > 2e5
  axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: _power(value) if powers else f'{value:g}'))
  axis.set_minor_formatter(ticker.NullFormatter())


def _power(value: float) -> str:
  exponent = math.floor(math.log10(value) + 1e-9)
  mantissa = f'{value / 10.0**exponent:.3g}'
  return ('' if mantissa == '1' else f'{mantissa}\N{MULTIPLICATION SIGN}') + power_of_ten(exponent)
