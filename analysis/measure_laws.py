"""What a ledger's measures have to do with the NMSE: the law of each value over it, and whether both order cells alike.

An exact reconstruction changes nothing, so a value such as the KL is expected to vanish with the NMSE: y = c NMSE^p. The
same law with an offset says whether that holds as far as the cells show. Of several families each has a c of its own: at
equal NMSE they need not have equal values.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import grouped, setting, sparsity
from analysis.at_l0 import AtL0, at_l0
from analysis.compare import Comparison
from analysis.equal_l0 import Compared
from analysis.family_tables import Table
from analysis.fit import fit_law, with_holdout
from analysis.fit_result import Fit
from analysis.fitting.uncertainty import Estimate
from analysis.grouped import Grouped
from analysis.law import Array
from analysis.measured import SE, UNITS
from sae_jax.errors import UserError

# The values of a measure that are drawn, the first in a table too. Of a measure that is not here, the first few that vary.
_SHOWN = {
  'downstream': ('kl', 'delta_ce', 'recovered_zero'),
  'reconstruction': ('per_token_nmse', 'cosine_similarity', 'l2_ratio'),
  'probes': ('pre', 'codes'),
  'latents': ('dense_share', 'rare_share'),
  'refine': ('growth', 'error_removed'),
  'progressive': ('nmse_at_8', 'nmse_at_32', 'threshold_nmse_at_32'),
  'n2g': ('recall', 'precision', 'f1'),
  'simulate': ('kl', 'delta_ce'),
  'ablation': ('latent_once', 'latent_all', 'latent_over_channel_all'),
}
_MOST = 3
_BOUNDED = ('share', 'cosine', 'ratio', 'log10')  # begin the units of what has an end, so that no power law goes on
MEASURE = 'measure_'  # begins the names of figures
_LEAST = 3  # families at one place that have an order


@dataclasses.dataclass(frozen=True, eq=False)
class OneValue:
  """One value of a measure over the cells that have it."""

  column: str
  units: str
  cells: pd.DataFrame
  pair: Comparison | None = None  # the law over the NMSE with an offset and without; None where it was refused
  apart: Grouped | None = None  # of several families, with one exponent for all
  refused: str = ''
  at_l0: AtL0 | None = None  # the families at equal L0

  @property
  def law(self) -> Fit | None:
    """Without an offset."""
    return self.apart.common if self.apart else self.pair and self.pair.plain

  @property
  def families(self) -> list[str]:
    """Those compared at equal L0 of which the law is too, in the order of their NMSE."""
    known = {*self.cells['activation']}
    return [name for name in self.at_l0.of.ranked if name in known] if self.at_l0 else []

  @property
  def name(self) -> str:
    """Without that of the measure."""
    return self.column.partition('/')[2]

  @property
  def picture(self) -> str:
    """Its name as that of a file, whatever the measures of a cell call it."""
    return MEASURE + re.sub(r'\W', '_', self.column, flags=re.ASCII)

  @property
  def alike(self) -> tuple[float, float]:
    """Rank correlations of the cells with the NMSE: Spearman's and Kendall's."""
    y, x = (self.cells[column].to_numpy(float) for column in (self.column, 'nmse'))
    return spearman(x, y), kendall(x, y)

  @property
  def sentence(self) -> str:
    """What was found, for people."""
    over = f'over {len(self.cells)} cells'
    rank = f'rank correlation with the NMSE {over}: {_rank(self.alike[0]) or "none, for it does not vary"} (Spearman)'
    if self.law is None:
      return f'{self.column}: {rank}.' + (f' No law over the NMSE: {self.refused}.' if self.refused else '')
    p = Estimate(*(self.law.params['p'][key] for key in ('estimate', 'low', 'high')))
    error = float((self.cells[self.column + SE] / self.cells[self.column]).median())
    scatter = self.law.diagnostics['rms_log_residual']
    known = f', and their standard errors have a median of {100 * error:.2g} %' if np.isfinite(error) else ''
    held = self.law.holdout
    said = f' Held out, cells of {held["rule"]} are predicted to {100 * held["mean_rel_err"]:.2g} %.' if held else ''
    offset = f' An offset at NMSE = 0 is {self.pair.verdict}.' if self.pair and not self.apart else ''
    return (
      f'{self.column} goes as NMSE to the power of {p}{", each family at a level of its own" if self.apart else ""}: '
      f'cells lie within {100 * scatter:.2g} % (rms) of the law{known}.{said}{offset} {rank[0].upper() + rank[1:]}.'
    )


@dataclasses.dataclass(frozen=True, eq=False)
class OneMeasure:
  """The values of a measure that are shown."""

  name: str
  values: list[OneValue]

  @property
  def fits(self) -> list[Fit]:
    return [one.law for one in self.values if one.law]

  def to_json(self) -> list[dict[str, Any]]:
    """Its entries of laws.json."""
    made = []
    for one in self.values:
      made += [one.pair.plain.to_json() | {'comparison': one.pair.to_json()}] if one.pair else []
      made += one.apart.to_json() if one.apart else []
    return made

  def tables(self) -> list[Table]:
    """The first value of every cell or family, then how the values order cells."""
    first = self.values[0]
    grid = _families(first) if first.at_l0 else _grid(first)
    return [one for one in (grid, _levels(self.values), _orders(self.values)) if one.rows]


def analyse(ledger: str, points: pd.DataFrame, compared: Compared | None, bootstrap: int) -> list[OneMeasure]:
  """Every measure of a ledger's cells.

  Args:
    ledger: the folder a sweep wrote.
    points: cells with columns of measures. Laws are of those that saw the most tokens among the measured ones.
    compared: the same at equal L0, where there are several families.
    bootstrap: resamples behind intervals.
  """
  units: dict[str, str] = points.attrs.get(UNITS, {})
  families = at_l0(ledger, compared.cells) if compared and units else {}
  out = []
  for measure in dict.fromkeys(column.partition('/')[0] for column in units):
    columns = [column for column in units if column.startswith(f'{measure}/') and points[column].notna().any()]
    cells = setting.longest(points[points[columns].notna().any(axis=1)])
    known = [f'{measure}/{name}' for name in _SHOWN.get(measure, ())]
    vary = [column for column in columns if cells[column].nunique() > 1 or len(cells) == 1]
    shown = [column for column in known if column in columns] or vary[:_MOST] or columns[:_MOST]
    values = [_value(cells, column, units[column], families.get(column), bootstrap) for column in shown]
    out += [OneMeasure(measure, values)] if values else []
  return out


def _value(cells: pd.DataFrame, column: str, units: str, families: AtL0 | None, bootstrap: int) -> OneValue:
  cells = cells[cells[column].notna()].reset_index(drop=True)
  found = OneValue(column, units, cells, at_l0=families)
  if units.startswith(_BOUNDED):
    return found
  sizes = np.sort(cells['n_latents'].unique())
  rule = f'n_latents>{sizes[-2]:g}' if len(sizes) > 1 else None

  def fit(law: str, resamples: int) -> Fit:
    made = with_holdout(
      lambda holdout: fit_law(cells, law, ['nmse'], column, bootstrap=resamples, holdout=holdout), rule
    )
    if made.freedom < 1:
      raise UserError(f'{len(cells)} cells for {len(made.law.names)} constants; measure more')
    return made

  try:
    found = dataclasses.replace(found, pair=Comparison(fit('power', 0), fit('growth', bootstrap)))
    if families:
      apart = grouped.fit_by(cells, 'activation', 'growth', ['nmse'], column, bootstrap=bootstrap, holdout=rule)
      found = dataclasses.replace(found, apart=apart)
  except UserError as error:
    found = dataclasses.replace(found, refused=str(error))
  return found


def _grid(first: OneValue) -> Table:
  """A row a size, a column a target."""
  targets = sparsity.targets(first.cells)
  rows = []
  for n in np.sort(first.cells['n_latents'].unique()):
    mine = first.cells[first.cells['n_latents'] == n]
    rows.append([f'{n:,.0f}', *(_mean(sparsity.at(mine, target), first.column) for target in targets)])
  note = f'Standard errors are over what was sampled, such as windows, which all cells share. In {first.units}.'
  return Table(first.column, ['n', *map(sparsity.said, targets)], rows, note)


def _mean(cells: pd.DataFrame, column: str) -> str:
  """Of the seeds of a setting, which share their windows: so the error does not fall with their number."""
  return with_error(cells[column].mean(), cells[column + SE].mean()) if len(cells) else ''


def _families(first: OneValue) -> Table:
  """A row a family and size, at the L0 where most of them meet."""
  found = first.at_l0
  assert found is not None
  rows = []
  for name in found.of.ranked:
    for n in found.of.sizes:
      value, se = found.value(name, n)
      if not np.isfinite(value):
        continue
      row = [name, f'{n:,.0f}', with_error(value, se)]
      less, paired, apart = found.difference(name, n)
      against = name != found.of.reference and np.isfinite(less)
      rows.append(
        [*row, with_error(less, paired), f'{apart:.2g}' if np.isfinite(apart) else ''] if against else [*row, '', '']
      )
  reference = found.of.reference
  note = (
    f'Read off between the cells of a size as the NMSE is, linearly in the logarithm of L0. Differences are on the same '
    f'samples, so their standard errors are paired; beside them what the errors of both would give alone. Neither knows '
    f'of the scatter between seeds. In {first.units}.'
  )
  heads = ['family', 'n', first.name, f'less that of {reference}', 'unpaired error']
  return Table(f'{first.column} at L0 = {found.of.main:g}', heads, rows, note)


def _levels(values: Sequence[OneValue]) -> Table:
  """A row a family, a column a value."""
  columns: dict[str, dict[str, str]] = {}
  reference = ''
  for one in values:
    if one.apart and one.at_l0 and (reference := one.at_l0.of.reference) in one.families:
      columns[one.name] = {name: str(_over(one.apart, name, reference)) for name in one.families if name != reference}
  rows = [[name, *(column[name] for column in columns.values())] for name in next(iter(columns.values()), {})]
  note = (
    f'How many times the value of {reference} a family has at the same NMSE, from laws of one exponent and a level of '
    'each family. At 1 the NMSE says it all. In brackets 90 % intervals.'
  )
  return Table('At equal NMSE', ['family', *columns], rows, note)


def _over(found: Grouped, name: str, reference: str) -> Estimate:
  """The level of a family over that of another."""
  mine, other = (found.common.law.names.index(f'c[{one}]') for one in (name, reference))
  return Estimate(*np.exp(found.common.derived(lambda theta_MP: theta_MP[:, mine] - theta_MP[:, other])).tolist())


def _orders(values: Sequence[OneValue]) -> Table:
  """A row a value."""
  rows = []
  for one in values:
    row = [one.name, str(len(one.cells)), *map(_rank, one.alike)]
    if one.at_l0:
      ranks = one.at_l0.ranks(kendall, _LEAST)
      row += [f'{np.mean(ranks):.2f}' if len(ranks) else '', str(len(ranks))]
    rows.append(row)
  heads = ['value', 'cells', "Spearman's", "Kendall's"]
  note = (
    'Rank correlations with the NMSE: 1 is the same order, -1 the reverse, as of what is better where it is larger.'
  )
  if values[0].at_l0:
    heads += ["Kendall's of families", 'places']
    note += f' Of families: the mean over the sizes and L0s, the places, that at least {_LEAST} of them reach.'
  return Table('Does it order cells as the NMSE does?', heads, rows, note)


def _rank(value: float) -> str:
  return f'{value:.3f}' if np.isfinite(value) else ''


def with_error(value: float, se: float) -> str:
  """Such as '0.329 ± 0.022': as many digits as the error deserves."""
  if not np.isfinite(se) or se <= 0:
    return f'{value:.4g}'
  digits = max(0, 1 - int(np.floor(np.log10(se))))
  return f'{value:.{digits}f} ± {se:.{digits}f}' if digits < 9 else f'{value:.4g} ± {se:.2g}'


def spearman(x: Array, y: Array) -> float:
  """Rank correlation; NaN where one of both has one value alone."""
  return float(pd.Series(x).rank().corr(pd.Series(y).rank())) if len(x) > 1 else np.nan


def kendall(x: Array, y: Array) -> float:
  """Kendall's tau-b: the pairs in the same order less those in the reverse, over all pairs; ties have none."""
  a, b = (np.sign(np.subtract.outer(v, v)) for v in (x, y))
  pairs = np.sqrt((a**2).sum() * (b**2).sum())
  return float((a * b).sum() / pairs) if pairs else np.nan
