"""The figure of the comparison: step time of each library as a multiple of ours, a panel a shape."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

_OURS, _THEIRS = '#1f77b4', '#444444'


def side_by_side(rows: list[dict[str, Any]]) -> Figure:
  """A point a library at the median of its rounds' ratios, a bar over their range; 1 is our step with all extras."""
  fig = Figure(figsize=(4.2 * len(rows), 2.4), layout='constrained')
  for column, row in enumerate(rows):
    ax = fig.add_subplot(1, len(rows), column + 1)
    names = list(row['times_ours'])
    for y, name in enumerate(names):
      r, color = row['times_ours'][name], _OURS if name.startswith('sae_jax') else _THEIRS
      ax.plot([r['low'], r['high']], [y, y], color=color, lw=2, alpha=0.5, solid_capstyle='butt')
      ax.plot(r['ratio'], y, 'o', color=color, ms=6)
      ax.annotate(f'{r["ratio"]:.2f}', (r['high'], y), (6, 0), textcoords='offset points', va='center', fontsize=8)
    ax.axvline(1, color=_OURS, lw=1)
    ax.set_xscale('log', base=2)
    low, high = (f(r[key] for r in row['times_ours'].values()) for f, key in ((min, 'low'), (max, 'high')))
    ax.set_xlim(min(low, 1) / 1.25, high * 1.7)  # room for the number at the right
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f'{v:g}'))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(names)), [_label(name, row) for name in names] if column == 0 else [''] * len(names))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlabel('step time / sae_jax step time')
    d, n, batch, k = row['shape']
    ax.set_title(f'd={d}, n={n:,}, B={batch:,}, k={k}', fontsize=9, loc='left')
    for side in ('top', 'right'):
      ax.spines[side].set_visible(False)
  return fig


def _label(name: str, row: dict[str, Any]) -> str:
  return name if name.startswith('sae_jax') else f'{name} {next(iter(row["versions"][name].values()))}'
