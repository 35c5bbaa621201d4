"""The figure of a calibration: predictions with their intervals against what was measured."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import frames, table
from analysis.figures import style
from sae_jax.errors import UserError


def calibration(predictions: pd.DataFrame) -> Figure:
  """Predictions made before the cells were trained, with their 90 % intervals, against what was measured.

  Args:
    predictions: columns n_latents, k or sparsity, predicted, low, high, measured; one row a cell.

  Raises:
    UserError: a column is missing or not positive.
  """
  asked = 'sparsity' if 'sparsity' in frames.frame('predictions', predictions) else 'k'
  columns = ['n_latents', asked, 'predicted', 'low', 'high', 'measured']
  frame = pd.DataFrame(table.positive(predictions, columns), columns=pd.Index(columns))
  if frame.empty:
    raise UserError('predictions has no rows; give one a predicted cell')
  fig, (left, right) = style.axes(2)
  ends = np.array([frame[['low', 'measured']].min().min() / 1.05, frame[['high', 'measured']].max().max() * 1.05])
  left.plot(ends, ends, color='0.4', lw=0.9, zorder=1)
  right.axhline(0, color='0.4', lw=0.9, zorder=1)
  handles = []
  targets = np.sort(frame[asked].unique())
  for i, value in enumerate(targets):
    color, marker = style.look(i, len(targets))
    mine = frame[frame[asked] == value]
    hit = ((mine['low'] <= mine['measured']) & (mine['measured'] <= mine['high'])).to_numpy()
    percent = 100 * (mine[['predicted', 'low', 'high']].div(mine['measured'], axis=0) - 1)
    shift = 1.05 ** (i - (len(targets) - 1) / 2)  # intervals of several targets at one n must not cover each other
    style.bars(left, mine['measured'], mine['predicted'], mine['low'], mine['high'], color)
    style.bars(right, mine['n_latents'] * shift, percent['predicted'], percent['low'], percent['high'], color)
    for some, hollow in ((hit, False), (~hit, True)):
      style.points(left, mine['measured'][some], mine['predicted'][some], color, marker, hollow=hollow)
      style.points(right, mine['n_latents'][some] * shift, percent['predicted'][some], color, marker, hollow=hollow)
    text = f'${style.symbol(asked)}$ = {value:g}: {hit.sum()} of {len(hit)} inside'
    handles.append(Line2D([], [], color=color, marker=marker, label=text))
  inside = ((frame['low'] <= frame['measured']) & (frame['measured'] <= frame['high'])).sum()
  fig.suptitle(f'{inside} of {len(frame)} measured losses lie inside their 90 % interval', fontsize=11)
  left.set_xlim(*ends)
  left.set_ylim(*ends)
  style.label(left, 'measured normalised MSE', 'predicted normalised MSE')
  style.ticks(left, narrow=True)
  style.label(right, 'n_latents', 'predicted \N{MINUS SIGN} measured, in % of measured')
  style.ticks(right, 'n_latents', frame['n_latents'].to_numpy(), narrow=True)
  style.linear(right)
  handles.append(Line2D([], [], color='0.4', lw=0.9, label='predicted = measured'))
  handles.append(Line2D([], [], ls='', marker='o', mfc='white', mec='0.4', label='outside its interval'))
  style.legend(fig, handles)
  return fig
