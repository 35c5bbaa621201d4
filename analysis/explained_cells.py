"""Cells whose latents were explained by patterns of tokens, and their values at equal n and L0.

A family is read off between its cells, as the NMSE is at equal L0. Beyond the outermost one it is not, since a share could
leave 0 to 1 there: a cell near that L0 counts itself.

Errors come from what is sampled, and from chance in training. The first of scores of latents are over latents, and those
of the rest over windows and places.

Latents are each autoencoder's own, so their errors add in squares over autoencoders. Other latents are a part of what
differs between seeds: the scatter of seeds has the error over latents in it, and to add both would count that twice. So
the larger one is taken.

Windows and places are the same for all autoencoders. So errors over them add as they are, which is too much rather than
too little. Two seeds see the same windows, and their scatter has nothing of this error: it is added in squares.

The scatter of seeds is one number a value, from all settings of all families that have several, for one setting has too
few. Cells of settings with one seed take it too, for training is no less a matter of chance there. It is relative, but
absolute for differences, which can be near 0.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import safetensors.numpy
from scipy import special

from analysis import equal_l0, family_cells, sparsity
from analysis.fitting.uncertainty import TAILS, Estimate
from analysis.law import Array
from analysis.measured import SE
from analysis.table import warning
from sae_jax import files, schema
from sae_jax.errors import UserError
from sae_jax.measures import results

OF = 'topk'  # of which the paper's claims are
OVER = 'relu'  # against which they are
_NEAR = 1.25  # factor within which the L0 of a single cell stands for another one
_OWN = 'n2g/'  # begins the columns of what is sampled anew in every autoencoder
_DIFFERENCES = ('_over_true', '_over_bigram')  # end the columns of one loss less another
PRECISION, RECALL, F1, ELIGIBLE = (f'{_OWN}{name}' for name in ('precision', 'recall', 'f1', 'eligible'))


class Place(NamedTuple):
  """A family at a size and an L0.

  Attributes:
    family, n, l0: which.
    reached: the L0 of what is shown.
    weight_C: of the cells in it.
  """

  family: str
  n: float
  l0: float
  reached: float
  weight_C: Array


@dataclasses.dataclass(frozen=True, eq=False)
class Explained:
  """The cells of a ledger whose latents were explained, and where their families can be compared.

  Attributes:
    cells: a row an autoencoder, with columns of measures.
    places: by size, L0 and family.
    warnings: of the ledger, and of what is in no comparison.
  """

  cells: pd.DataFrame
  places: list[Place]
  warnings: list[dict[str, str]] = dataclasses.field(default_factory=list)

  def value(self, place: Place, column: str) -> tuple[float, float]:
    """A value and its standard error; NaN where a cell lacks it."""
    value = float(_parts(place.weight_C, self._values(column)).sum())
    return value, self._error(place.weight_C, column)

  def mean(self, places: Sequence[Place], column: str) -> Estimate:
    """The mean of a value over places, and its interval."""
    weight_C = sum((place.weight_C for place in places), np.zeros(len(self.cells))) / max(len(places), 1)
    middle = float(_parts(weight_C, self._values(column)).sum()) if places else np.nan
    return Estimate(middle, *(middle + self._reach(weight_C, column)).tolist())

  def ratio(self, pairs: Sequence[tuple[Place, Place]], column: str) -> Estimate:
    """A value at the first of each pair over that at the second: the geometric mean over pairs, and its interval."""
    logs, slope_C = [], np.zeros(len(self.cells))
    for pair in pairs:
      for place, sign in zip(pair, (1, -1), strict=True):
        value = self.value(place, column)[0]
        slope_C += sign * place.weight_C / (value * len(pairs))
        logs.append(sign * np.log(value) / len(pairs))
    middle = float(np.sum(logs)) if pairs else np.nan
    return Estimate(float(np.exp(middle)), *np.exp(middle + self._reach(slope_C, column)).tolist())

  def pairs(self, one: str, other: str, column: str) -> list[tuple[Place, Place]]:
    """Both families, wherever both have a value at the same size and L0."""
    known = [place for place in self.places if np.isfinite(self.value(place, column)[0])]
    there = {(place.n, place.l0): place for place in known if place.family == other}
    return [(p, there[p.n, p.l0]) for p in known if p.family == one and (p.n, p.l0) in there]

  @functools.cached_property
  def families(self) -> list[str]:
    """Those with places, the paper's own and the one it is compared with first."""
    return sorted({place.family for place in self.places}, key=lambda name: (name != OF, name != OVER, name))

  @functools.cached_property
  def shown(self) -> list[tuple[str, pd.Series]]:
    """Two cells whose latents are drawn, with their titles: of two families at equal n and L0, or of two sparsities."""
    two = self.pairs(*self.families[:2], RECALL) if len(self.families) > 1 else []
    if two:
      largest = [pair for pair in two if pair[0].n == two[-1][0].n]
      chosen = [place.weight_C for place in largest[len(largest) // 2]]
    else:
      mine = [place for place in self.places if place.family == self.families[0]]
      ends = [place.weight_C for place in mine if place.n == mine[-1].n]
      chosen = [ends[0], ends[-1]] if len(ends) > 1 else ends
    rows = [self.cells.iloc[int(np.argmax(weight_C))] for weight_C in chosen]
    return [(f'{row["activation"]}, n = {row["n_latents"]:,.0f}, L0 = {row["l0"]:.3g}', row) for row in rows]

  def slope(self, column: str, x: str) -> Estimate:
    """By what power of n or of L0 a value goes in the paper's own family, the other one held; NaN where cells are few."""
    rows = self.cells[(self.cells['activation'] == OF) & (self.cells.get(column, np.nan) > 0)]
    moving = [name for name in ('n_latents', 'l0') if (rows[name].max() / rows[name].min() if len(rows) else 1) > _NEAR]
    freedom = len(rows) - 1 - len(moving)
    if x not in moving or freedom < 1:
      return Estimate(np.nan, np.nan, np.nan)
    design = np.stack([np.ones(len(rows)), *(np.log(rows[name].to_numpy(float)) for name in moving)], axis=1)
    if np.linalg.matrix_rank(design) < design.shape[1]:  # both move together, and neither power is known
      return Estimate(np.nan, np.nan, np.nan)
    y = np.log(rows[column].to_numpy(float))
    theta = np.linalg.lstsq(design, y, rcond=None)[0]
    variance = ((y - design @ theta) ** 2).sum() / freedom * np.linalg.inv(design.T @ design).diagonal()
    at = 1 + moving.index(x)
    reach = special.stdtrit(freedom, TAILS[1]) * np.sqrt(variance[at])
    return Estimate(float(theta[at]), float(theta[at] - reach), float(theta[at] + reach))

  def points(self) -> pd.DataFrame:
    """One row a place, with every value and its error."""
    names = [name for name in self.cells if name + SE in self.cells]
    rows = []
    for place in self.places:
      said = {'activation': place.family, 'n_latents': int(place.n), 'l0': place.l0, 'reached_l0': place.reached}
      pairs = {name: self.value(place, name) for name in names}
      rows.append(
        said | {key: v for name, pair in pairs.items() for key, v in zip((name, name + SE), pair, strict=True)}
      )
    return pd.DataFrame(rows)

  def _error(self, weight_C: Array, column: str) -> float:
    """Of a weighted sum of cells."""
    shared_C, own_C = (np.abs(_parts(weight_C, error_C)) for error_C in self._errors(column))
    return float(np.hypot(shared_C.sum(), np.sqrt((own_C**2).sum())))

  def _reach(self, weight_C: Array, column: str) -> Array:
    """The ends of the interval of a weighted sum, from its middle."""
    return special.ndtri(TAILS) * self._error(weight_C, column)

  def _values(self, column: str) -> Array:
    return self.cells.get(column, pd.Series(np.nan, self.cells.index)).to_numpy(float)

  def _errors(self, column: str) -> tuple[Array, Array]:
    """Of every cell, what is the same draw for all of them and what is drawn anew for each; NaN where neither is known."""
    measured_C, seeds_C = self._values(column + SE), self._seeds(column)
    if column.startswith(_OWN):
      return np.zeros(len(measured_C)), np.fmax(measured_C, seeds_C)
    known_C = np.isfinite(measured_C) | np.isfinite(seeds_C)
    return np.where(known_C, np.nan_to_num(measured_C), np.nan), np.nan_to_num(seeds_C)

  def _seeds(self, column: str) -> Array:
    """How far seeds of one setting scatter, for every cell; NaN where no setting has two."""
    value_C = self._values(column)
    groups = [value_C[at][np.isfinite(value_C[at])] for at in self.cells.groupby('setting').indices.values()]
    is_signed = column.endswith(_DIFFERENCES) or bool((value_C < 0).any())
    unit_C = np.ones(len(value_C)) if is_signed else np.abs(value_C)
    # A count of nothing, always 0, has no relative scatter.
    off = [(v - v.mean()) / (1 if is_signed else v.mean()) for v in groups if len(v) > 1 and (is_signed or v.mean())]
    freedom = sum(len(o) - 1 for o in off)
    return unit_C * (np.sqrt(sum(float((o**2).sum()) for o in off) / freedom) if freedom else np.nan)


def find(table: pd.DataFrame) -> Explained:
  """What a ledger's finished cells say, with the warnings in their `attrs`.

  Raises `UserError` where no latents were explained, or none can be compared.
  """
  said = list(table.attrs.get('warnings', []))
  if RECALL not in table or table[RECALL].isna().all():
    raise UserError(_unexplained(table))
  mine = table[table[RECALL].notna()]
  cells, doubts = family_cells.readable(mine)
  if cells.empty:
    raise UserError(
      f'of cells with explained latents the least NMSE is {mine["nmse"].min():.3g} and the largest L0 '
      f'{mine["l0"].max():.3g}, and only those with an NMSE below 1 and an L0 above 0 are compared; train them longer or '
      'at another learning rate, or explain other cells'
    )
  cells, others = family_cells.budget(cells)
  curves, beaten = equal_l0.curves(cells)
  asked = cells['k'].dropna().unique() if 'k' in cells else []
  usual = str(cells['activation'].value_counts().index[0])
  own = sparsity.at(cells, {'activation': usual})['l0']
  l0s = sorted(asked if len(asked) else own.where(own < 1, own.round()).unique())  # below 1 none rounds to 0
  places = [
    Place(family, n, float(l0), *found)
    for (family, n), (u_S, weight_SC) in curves.items()
    for l0 in l0s
    if (found := _at(u_S, weight_SC, float(l0))) is not None
  ]
  if not places:
    raise UserError(
      f'no cell with explained latents comes within {100 * (_NEAR - 1):.0f} % of an L0 that was asked for '
      f'({", ".join(f"{l0:g}" for l0 in l0s)}), nor do two of a family and size lie on both sides of one: '
      f'{family_cells.listed([_reach(*name, u_S) for name, (u_S, _) in curves.items()])}; explain cells that come nearer, or train some'
    )
  said += [*_without(table), *doubts, *family_cells.other_budgets(others), *beaten]
  reached = {(place.family, place.n) for place in places}
  if away := [_reach(*name, u_S) for name, (u_S, _) in curves.items() if name not in reached]:
    text = f'families come near no L0 of {", ".join(f"{l0:g}" for l0 in l0s)} and are in no comparison'
    said.append(warning('no_equal_l0', f'{len(away)} {text}: {family_cells.listed(away)}'))
  return Explained(cells, sorted(places, key=lambda p: (p.n, p.l0, p.family != OF, p.family != OVER, p.family)), said)


def _without(table: pd.DataFrame) -> list[dict[str, str]]:
  """A warning that names the cells whose latents were not explained; none when there are none."""
  lacking = table[table[RECALL].isna()]
  if lacking.empty:
    return []
  named = [
    f'{row["id"] if "id" in row else row["activation"]} n={row["n_latents"]:g}' for row in lacking.to_dict('records')
  ]
  text = f'{len(lacking)} of {len(table)} finished cells have no {RECALL} and are in no comparison'
  return [warning('not_explained', f'{text}: {family_cells.listed(named)}')]


def _unexplained(table: pd.DataFrame) -> str:
  """Why no cell has a recall, and what to do."""
  measured = table[ELIGIBLE].dropna() if ELIGIBLE in table else pd.Series(dtype=float)
  if measured.empty:
    doubts = [one['message'] for one in table.attrs.get('warnings', []) if one['code'].startswith('measures_')]
    return (
      f'no finished cell has {RECALL}; python -m sweeps.measure --ledger=DIR --measures=n2g,simulate,ablation measures it'
      + (f' ({"; ".join(doubts)})' if doubts else '')
    )
  if not measured.any():
    return (
      f'no latent was explained in any of {len(measured)} cells with n2g ({ELIGIBLE} is 0): each is active at too few '
      'tokens of the text that examples are taken from; explain autoencoders with more active latents, or fewer in all'
    )
  return (
    f'of {len(measured)} cells with n2g none has {RECALL}: no explained latent is active on the held-out text; measure '
    'on more of it with python -m sweeps.measure --windows=N'
  )


def _reach(family: str, n: float, u_S: Array) -> str:
  """The L0s of the cells on a curve, in words."""
  ends = dict.fromkeys(f'{np.exp(u):.3g}' for u in (u_S[0], u_S[-1]))
  return f'{family} with n = {n:,.0f} has L0 = {" to ".join(ends)}'


def _at(u_S: Array, weight_SC: Array, l0: float) -> tuple[float, Array] | None:
  """The L0 that a family reaches there, and the weights of its cells."""
  between = u_S[0] <= np.log(l0) <= u_S[-1]
  weight_C = equal_l0.weights(u_S, weight_SC, np.log(l0)) if between else None
  if weight_C is not None:
    return l0, weight_C
  away_S = np.abs(u_S - np.log(l0))
  nearest = int(np.argmin(away_S))
  return (float(np.exp(u_S[nearest])), weight_SC[nearest]) if away_S[nearest] <= np.log(_NEAR) else None


def scores(ledger: str, cell: str) -> tuple[Array, Array]:
  """Precision and recall of every explained latent of a cell; NaN where one is undefined.

  Raises `UserError` for arrays that are not there, or not those of its measure.
  """
  folder = files.join(ledger, schema.CELLS, cell)
  counts: dict[str, list[Array]] = {'true_E': [], 'predicted_E': [], 'hits_E': []}
  try:
    result = results.read(folder, cell)['n2g']
    for unit, record in enumerate(results.records(folder, result)):
      if data := results.arrays(folder, result.key, unit, record):
        found = safetensors.numpy.load(data)
        for name, parts in counts.items():
          parts.append(found[name].astype(float))
  except (schema.Broken, OSError, KeyError) as error:
    raise UserError(
      f'the explained latents of cell {cell} cannot be read ({error}); delete its n2g.jsonl and measure its n2g again'
    ) from None
  true_E, predicted_E, hits_E = (np.concatenate([np.zeros(0), *parts]) for parts in counts.values())
  with np.errstate(invalid='ignore', divide='ignore'):
    return hits_E / predicted_E, hits_E / true_E


def _parts(weight_C: Array, value_C: Array) -> Array:
  """A cell without weight may lack its value."""
  return np.where(weight_C == 0, 0.0, weight_C * value_C)
