"""The figure of an allocation: how to split a budget between latents and tokens."""

import dataclasses

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from analysis.allocation import allocate
from analysis.figures import style
from analysis.fit_result import Fit, fits_of
from sae_jax import checks
from sae_jax.errors import UserError

_FURTHER = 8.0  # how far beyond the data a plan is drawn


def allocation(fit: Fit, flops_per_latent_token: float) -> Figure:
  """Contours of the loss over latents and tokens, lines of equal compute, and the best split of every budget.

  Args:
    fit: of additive2 over (n_latents, tokens).
    flops_per_latent_token: as for `allocation.allocate`; the compute of (n, T) is this times n T.

  Raises:
    UserError: another law; no split is best.
  """
  (fit,) = fits_of(fit)
  checks.positive('flops_per_latent_token', flops_per_latent_token, 'give FLOPs')
  ends = {x: (float(fit.table[x].min()), float(fit.table[x].max())) for x in fit.x}
  if set(ends) != {'n_latents', 'tokens'}:
    raise UserError(f'an allocation needs a law over n_latents and tokens, not over {", ".join(fit.x)}')
  (n0, n1), (t0, t1) = ends['n_latents'], ends['tokens']
  cost = flops_per_latent_token
  budgets = np.geomspace(cost * n0 * t0, cost * n1 * t1 * _FURTHER**2, 60)
  splits = [allocate(fit, float(c), cost) for c in budgets]
  fig, (ax,) = style.axes()
  ax.grid(False)
  n_N, t_N = np.geomspace(n0 / 1.5, n1 * _FURTHER, 90), np.geomspace(t0 / 1.5, t1 * _FURTHER, 90)
  grid_n, grid_t = np.meshgrid(n_N, t_N)
  loss = fit.predict({'n_latents': grid_n.ravel(), 'tokens': grid_t.ravel()}).reshape(grid_n.shape)
  levels = np.geomspace(loss.min(), loss.max(), 10)[1:-1]
  colors = [style.look(i, len(levels))[0] for i in range(len(levels))]
  lines = ax.contour(grid_n, grid_t, loss, levels=levels, colors=colors, linewidths=1.1)
  ax.clabel(lines, fmt=lambda value: f'{value:.3g}', fontsize=8, colors='0.15')
  for decade in range(int(np.ceil(np.log10(budgets[0]))), int(np.log10(budgets[-1])) + 1):
    ax.plot(n_N, 10.0**decade / (cost * n_N), ':', color='0.6', lw=0.9, zorder=1)
    edge = 10.0**decade / (cost * t_N[-1])  # where it meets the upper side
    if n_N[0] < edge < n_N[-1]:
      ax.annotate(
        style.power_of_ten(decade),
        (edge, t_N[-1]),
        (0, 2),
        textcoords='offset points',
        fontsize=7,
        color='0.4',
        ha='center',
      )
  box = Rectangle((n0, t0), n1 - n0, t1 - t0, fill=False, ls=(0, (4, 3)), ec='0.35', lw=1.0)
  ax.add_patch(box)
  best = np.array([[s.n_latents, s.tokens] for s in splits])  # [budgets, 2, (estimate, low, high)]
  inside = ((best[:, 0, 0] <= n1) & (best[:, 1, 0] <= t1)) & ((best[:, 0, 0] >= n0) & (best[:, 1, 0] >= t0))
  ax.plot(best[:, 0, 0], best[:, 1, 0], '--', color='black', lw=2, zorder=4)
  ax.plot(best[inside, 0, 0], best[inside, 1, 0], '-', color='black', lw=2, zorder=4)
  if np.isfinite(best).all():
    # Along a line of equal compute, the interval of n is that of T turned round.
    low, high = best[:, 0, 1], best[:, 0, 2]
    x = np.concatenate([low, high[::-1]])
    y = np.concatenate([budgets / (cost * low), (budgets / (cost * high))[::-1]])
    ax.fill(x, y, color='black', alpha=0.12, lw=0, zorder=2)
  style.points(ax, fit.table['n_latents'], fit.table['tokens'], '0.35', 'o', ms=4)
  ax.set_xlim(n_N[0], n_N[-1])
  ax.set_ylim(t_N[0], t_N[-1])
  style.label(ax, 'n_latents', 'tokens')
  style.ticks(ax, 'n_latents', fit.table['n_latents'].to_numpy(float))
  same = ', '.join(style.where(fit.where))
  ax.set_title(style.equation(fit) + (f', {same}' if same else ''), fontsize=11, pad=10)
  exponent = splits[0].exponent_n
  text = f'best split of a budget:\n$n \\propto C^{{\\,p}}$, $p$ = {style.estimate(*exponent)}'
  handles = [
    Line2D([], [], color='black', lw=2, label=text),
    Line2D([], [], ls=':', color='0.6', label='equal compute, in FLOPs'),
    Line2D([], [], ls='', marker='o', color='0.35', ms=4, label='measured'),
    Line2D([], [], ls=(0, (4, 3)), color='0.35', lw=1, label='the range of the data'),
    Line2D([], [], ls='', label='\n' + style.constants(dataclasses.replace(fit, where={}))),
  ]
  style.legend(fig, handles)
  style.warn(fig, style.codes([fit]))
  return fig
