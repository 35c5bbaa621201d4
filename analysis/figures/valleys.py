"""Figures of valleys: loss against size at a fixed compute, and against learning rate at a fixed size.

A valley with a bottom shows its parabola and its minimum with the 90 % interval. A refused one is drawn hollow and
dotted, and the legend says why: nothing is marked where nothing was found.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis import frames, learning_rate, setting, sparsity, table
from analysis.figures import style
from analysis.fit_result import Fit, fits_of
from sae_jax import checks
from sae_jax.errors import UserError


def isoflop(
  points: pd.DataFrame,
  best: pd.DataFrame,
  where: Mapping[str, float | str] | None = None,
  codes: Sequence[str] = (),
) -> Figure:
  """Loss against n for every compute budget, its parabola in log n and the best size.

  Args:
    points, best: as from `isoflop.profiles`, of runs of one family and target.
    where: what the runs have in common, for the title: {'k': 32}, or {'activation': 'relu', 'sparsity': 0.05}.
    codes: of warnings to show.
  """
  frames.frame('points', points, ('budget', 'id', 'n_latents'))
  y = str(points.columns[-1])
  if y in ('budget', 'id', 'n_latents'):
    raise UserError(f'points ends with {y!r} and its last column is the loss; give what isoflop.profiles returns')
  frames.frame('best', best, ('budget', 'n_latents', 'low', 'high', y, 'curvature', 'verdict', 'reason'))
  if points.empty or best.empty:
    raise UserError('there is no profile to draw; give budgets that several sizes had spent, as isoflop.budgets finds')
  table.positive(points, ['budget', 'n_latents', y])
  _check_found(best, ['n_latents', 'low', 'high', y, 'curvature'])
  where, codes = _given_where(where), style.given_codes(codes)
  fig, (ax,) = style.axes()
  handles = []
  for i, row in enumerate(best.to_dict('records')):
    mine = points[points['budget'] == row['budget']].rename(columns={y: 'y'})
    look = style.look(i, len(best))
    text = f'$C$ = {style.number(row["budget"])}: '
    handles.append(_valley(ax, 'n_latents', mine, row | {'x': row['n_latents'], 'y': row[y]}, look, text))
  style.label(ax, 'n_latents', y)
  style.ticks(ax, 'n_latents', points['n_latents'].to_numpy(float))
  same = ', '.join(style.where(where))
  ax.set_title('Loss against size at equal compute' + (f', {same}' if same else ''), fontsize=11, pad=10)
  style.legend(fig, handles + _key(best))
  style.warn(fig, [*_codes(best, 'budgets'), *codes])
  return fig


def learning_rates(
  cells: pd.DataFrame,
  fit: Fit | None = None,
  codes: Sequence[str] = (),
  where: Mapping[str, float | str] | None = None,
) -> Figure:
  """Loss against learning rate for every size, and the law of the best rate when there is one.

  Args:
    cells: as from `read_ledger.load_ledger`, of one family and target.
    fit: from `learning_rate.fit_learning_rate` of the same cells.
    codes: of warnings to show.
    where: what the cells have in common, for the title; by default their targets.
  """
  found = learning_rate.valleys(cells)
  codes = style.given_codes(codes)
  asked = sparsity.gathered(sparsity.targets(cells))
  same = style.where(_given_where(where)) or [f'${style.symbol(key)}$ = {values}' for key, values in asked.items()]
  if found.empty:
    raise UserError('cells has no rows, so there is no valley to draw; give the cells of one target')
  if fit is not None:
    (fit,) = fits_of([fit], 1)
    frames.frame('the points of fit', fit.table, ('n_latents', 'learning_rate', 'low', 'high'))
  fig, panels = style.axes(1 if fit is None else 2)
  ax = panels[0]
  handles = []
  for i, (row, (_, mine)) in enumerate(zip(found.to_dict('records'), setting.groups(cells), strict=True)):
    mine = mine.rename(columns={'nmse': 'y'})
    look = style.look(i, len(found))
    text = f'$n$ = {row["n_latents"]:g}: '
    handles.append(_valley(ax, 'learning_rate', mine, row | {'x': row['learning_rate'], 'y': row['nmse']}, look, text))
  style.label(ax, 'learning_rate', 'nmse')
  style.ticks(ax, narrow=fit is not None)
  ax.set_title(', '.join(['Loss against learning rate', *same]), fontsize=11, pad=10)
  handles += _key(found)
  notes = [*_codes(found, 'sizes'), *codes]
  if fit is not None:
    ax = panels[1]
    rows = fit.table
    style.points(ax, rows['n_latents'], rows['learning_rate'], 'black', 'o')
    style.bars(ax, rows['n_latents'], rows['learning_rate'], rows['low'], rows['high'], 'black')
    style.law(ax, fit, {}, 'black', beyond=4)
    bad = found.loc[found['verdict'] != 'minimum', 'n_latents']
    style.refused(ax, bad.tolist())
    style.label(ax, 'n_latents', 'learning_rate')
    style.ticks(ax, 'n_latents', found['n_latents'].to_numpy(float), narrow=True)
    ax.set_title(style.equation(fit), fontsize=11, pad=10)
    handles.append(Line2D([], [], color='black', marker='o', label='the law:\n' + style.constants(fit)))
    notes += style.codes([fit])
  style.legend(fig, handles)
  style.warn(fig, [n for n in notes if n != 'edge_minimum'])
  return fig


def _check_found(best: pd.DataFrame, columns: Sequence[str]) -> None:
  """Raises `UserError` unless every row has a verdict, and numbers where that is a minimum."""
  for column in ('verdict', 'reason'):
    frames.labels(best, column)
  for column in columns:
    frames.measured(best, column)
  table.positive(best, ['budget'])
  table.positive(best[best['verdict'] == 'minimum'], [c for c in columns if c not in ('low', 'high')])


def _given_where(where: Mapping[str, float | str] | None) -> dict[str, float | str]:
  if not isinstance(where, Mapping | None):
    raise UserError(f'where={checks.shown(where)} does not say what the runs have in common; write {{"k": 32}}')
  given: dict[str, float | str] = {}
  for key, value in (where or {}).items():
    rule = checks.text if key == 'activation' else checks.positive
    given[checks.text('a key of where', key, 'write {"k": 32}')] = rule(str(key), value, 'write {"k": 32}')
  return given


def _valley(ax: Axes, x: str, rows: pd.DataFrame, found: dict[str, Any], look: tuple[str, str], text: str) -> Line2D:
  """Draws the points of one valley and what was found there; returns its line of the legend."""
  color, marker = look
  if found['verdict'] != 'minimum':
    mean = rows.groupby(x)['y'].mean()
    ax.plot(mean.index, mean, ':', color=color, lw=1.0, zorder=2)
    style.points(ax, rows[x], rows['y'], color, marker, hollow=True)
    why = '\n'.join(textwrap.wrap(f'{found["verdict"]}: {found["reason"]}', 38))
    label = f'{text}refused\n' + why.replace('$', r'\$')
    return Line2D([], [], ls=':', lw=1.0, color=color, marker=marker, mfc='white', label=label)
  at = np.geomspace(min(rows[x].min(), found['x']), max(rows[x].max(), found['x']), 80)
  ax.plot(at, found['y'] * np.exp(found['curvature'] * np.log(at / found['x']) ** 2), color=color, lw=1.3, zorder=3)
  style.points(ax, rows[x], rows['y'], color, marker)
  style.bars(ax, [found['x']], [found['y']], [found['low']], [found['high']], color, along='x')
  ax.plot([found['x']], [found['y']], '|', color='black', ms=13, mew=1.6, zorder=5)
  best = style.estimate(found['x'], found['low'], found['high'])
  return Line2D([], [], color=color, marker=marker, label=f'{text}best at {best}')


def _key(found: pd.DataFrame) -> list[Line2D]:
  if not (found['verdict'] == 'minimum').any():
    return []
  return [Line2D([], [], ls='', marker='|', ms=11, mew=1.6, color='black', label='least loss of the parabola')]


def _codes(found: pd.DataFrame, what: str) -> list[str]:
  verdicts: Sequence[str] = found.loc[found['verdict'] != 'minimum', 'verdict'].tolist()
  return [f'{verdicts.count(v)} of {len(found)} {what} refused: {v}' for v in dict.fromkeys(verdicts)]
