"""The figure of several subjects: loss against latents, one line a subject."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.family import Family
from analysis.figures import style
from sae_jax import checks
from sae_jax.errors import UserError


def family(found: Family, codes: Sequence[str] = ()) -> Figure:
  """Every subject with its own exponent, and grey under it the same with the exponent common to all.

  `codes` are of further warnings to show.
  """
  if not isinstance(found, Family):
    raise UserError(f'{checks.shown(found)} is no family; give what family.fit_family returns')
  codes = style.given_codes(codes)
  fig, (ax,) = style.axes()
  fit = found.separate
  x, *inside = fit.x
  rows = found.exponents().set_index('subject')
  handles = []
  for i, subject in enumerate(found.subjects):
    color, marker = style.look(i, len(found.subjects))
    # A subject is e in its own column and 1 in the others; the first has none.
    mine = fit.table[np.logical_and.reduce([(fit.table[c] > 1) == (c == f'is_{i}') for c in inside])]
    low, high = float(mine[x].min()), float(mine[x].max())
    for start, stop, line in ((low, high, '-'), (high, 4 * high, '--')):
      at = {x: np.geomspace(start, stop, 60)} | {c: np.full(60, np.e if c == f'is_{i}' else 1.0) for c in inside}
      ax.plot(at[x], found.common.predict(at), color='0.8', lw=4, zorder=0, solid_capstyle='butt')
      ax.plot(at[x], fit.predict(at), line, color=color, lw=1.4, zorder=3)
    style.points(ax, mine[x], mine[fit.y], color, marker)
    e = rows.loc[subject]
    text = f'{style.plain(subject)}\nexponent {style.estimate(e["exponent"], e["low"], e["high"])}'
    handles.append(Line2D([], [], color=color, marker=marker, label=text))
  p = found.p_common
  said = '' if not np.isfinite(p) else ' (p < 0.001)' if p < 0.001 else f' (p = {p:.2g})'
  b = found.common.params['b']
  text = f'one exponent for all:\n{style.estimate(b["estimate"], b["low"], b["high"])}'
  handles.append(Line2D([], [], color='0.8', lw=4, label=text))
  verdict = {'separate': 'exponents differ', 'common': 'nothing speaks against one exponent'}
  handles.append(Line2D([], [], ls='', label=verdict.get(found.verdict, found.verdict) + said))
  style.label(ax, x, fit.y)
  same = ', '.join(style.where(fit.where))
  formula = r'$L_s(n) = e_s + a_s\,n^{-b_s}$' if 'ln_e' in fit.params else r'$L_s(n) = a_s\,n^{-b_s}$'
  ax.set_title(formula + (f', {same}' if same else ''), fontsize=11, pad=10)
  style.ticks(ax, x, fit.table[x].to_numpy(float))
  style.legend(fig, handles)
  style.warn(fig, [*style.codes([found.separate]), *codes])
  return fig
