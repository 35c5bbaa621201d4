"""Families of autoencoders compared at equal measured L0.

What was asked for (k, a coefficient) differs from what came of it, and more active latents alone lower the loss. So the
loss of each family is read off at one L0: from its cells of one size, linearly in the logarithms of L0 and NMSE between
two neighbours, and along the line of the last two up to 10 % beyond. A cell that another of its family and size beats at
fewer latents is on no such curve.

The scatter of cells is that between seeds, or in a table without repeats that around log-linear laws of each family.
Every interval here comes from drawing all cells anew with this scatter, which is itself drawn as far as few repeats
leave it open. Of an average that is the interval of Student's t.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import pandas as pd

from analysis import family_cells, sparsity, table
from analysis.fit import fit_law
from analysis.fit_result import Fit
from analysis.fitting.uncertainty import Estimate
from analysis.law import Array
from sae_jax import flops
from sae_jax.errors import UserError

FLAT = 'power_no_floor'  # over few sizes an irreducible loss is a guess, and exponents beside one cannot be compared
_REFERENCE = 'topk'  # of the paper; where it is missing, the family with most cells
_DRAWS = 4000
_GUESSES = 9  # values of L0 tried where no k was asked for
_FURTHER = np.log(2)  # how far beyond its sizes the curve of a family over n is followed
_NAMED = 6  # settings named in a warning


@dataclasses.dataclass(frozen=True, eq=False)
class Compared:
  """The log NMSE of every family at every size and L0; NaN where its cells do not reach that L0."""

  families: tuple[str, ...]
  reference: str
  sizes: Array
  l0: Array
  main: float  # the L0 that most families reach at most sizes
  weight_FNLC: Array  # of the cells in what a family has there: their log NMSE gives `loss_FNL`
  loss_FNL: Array
  draws_BFNL: Array  # the same for cells drawn anew
  scatter: float  # standard deviation of the log NMSE of cells; NaN when not known
  freedom: int  # of the scatter
  repeats: bool  # whether it is that between seeds
  cells: pd.DataFrame  # those compared: activation, n_latents, l0, nmse and what else the table has
  curves: pd.DataFrame  # the settings on the frontiers: activation, n_latents, l0, nmse; by rising l0
  others: pd.DataFrame  # cells of another number of tokens, with `over` and `over_reference` as of `_beside`
  warnings: list[dict[str, str]]

  def estimate(self, value: Callable[[Array], Array]) -> Estimate:
    """A number made of losses [..., F, N, L], with its 90 % interval."""
    return Estimate.of(value(self.loss_FNL), value(self.draws_BFNL))

  @functools.cached_property
  def ranked(self) -> list[str]:
    """The families, the one of the least NMSE at the main L0 first, where they share a size with the reference."""
    over = {name: self.ratio(name, self.reference, l0=self.main).value for name in self.families}
    return sorted(self.families, key=lambda name: (np.isnan(over[name]), over[name]))

  def points(self) -> pd.DataFrame:
    """One row a family, size and L0 that it reaches: activation, n_latents, l0, nmse, low, high."""
    rows = []
    for f, n, at in np.argwhere(np.isfinite(self.loss_FNL)):
      found = self.estimate(lambda loss, place=(f, n, at): np.exp(loss[..., *place]))
      place = {'activation': self.families[f], 'n_latents': int(self.sizes[n]), 'l0': float(self.l0[at])}
      rows.append(place | {'nmse': found.value, 'low': found.low, 'high': found.high})
    return pd.DataFrame(rows)

  def shared(self, one: str, other: str) -> Array:
    """The sizes and L0s [N, L] that both families reach; none where one of them is not in the table."""
    if not {one, other} <= {*self.families}:
      return np.zeros(self.loss_FNL.shape[1:], bool)
    return np.isfinite(self._of(self.loss_FNL, one) + self._of(self.loss_FNL, other))

  def ratio(self, of: str, over: str, n: float | None = None, l0: float | None = None) -> Estimate:
    """The NMSE of one family over that of another: the geometric mean over shared sizes and L0s, or at some of them."""
    on_NL = self.shared(of, over) & self._at(n, l0)
    return self.estimate(lambda loss: np.exp(_mean(self._of(loss, of) - self._of(loss, over), on_NL)))

  def steeper(self, one: str, other: str, l0: float | None = None) -> Estimate:
    """How much larger the exponent of n is in one family: the mean over L0s, or at one of them.

    Both exponents are slopes over the sizes that both families reach, so what bends both curves cancels.
    """
    on_NL = self.shared(one, other) & self._at(None, l0)
    u_NL = np.where(on_NL, np.log(self.sizes)[:, None], 0.0)
    away_NL = on_NL * (u_NL - u_NL.sum(axis=0) / np.maximum(on_NL.sum(axis=0), 1))
    enough_L = on_NL.sum(axis=0) > 1

    def difference(loss: Array) -> Array:
      less = np.where(on_NL, self._of(loss, other) - self._of(loss, one), 0.0)
      return _mean((away_NL * less).sum(axis=-2) / np.maximum((away_NL**2).sum(axis=0), 1e-300), enough_L, 1)

    return self.estimate(difference)

  def latents(self, of: str, over: str) -> tuple[float, Estimate]:
    """The largest n that both reach at the main L0, and how many times the latents of the other family it takes there.

    Less than 1 says that the other family needs more latents for that loss. It is 0 or infinite where that is a factor of
    two or more beyond the sizes of the other.
    """
    at = int(np.flatnonzero(self.l0 == self.main)[0])
    both_N = np.flatnonzero(self.shared(of, over)[:, at])
    if not both_N.size:
      return np.nan, Estimate.of(np.array(np.nan), np.array([np.nan]))
    last, own_N = int(both_N[-1]), np.isfinite(self._of(self.loss_FNL, over)[:, at])
    u_N = np.log(self.sizes)

    def times(loss: Array) -> Array:
      curve = self._of(loss, over)[..., own_N, at]
      return np.exp(u_N[last] - _crossed(u_N[own_N], curve, self._of(loss, of)[..., last, at]))

    return float(self.sizes[last]), self.estimate(times)

  def compute(self, n: float, latents: Estimate) -> Estimate:
    """The same in useful FLOPs at equal tokens, which the width of the activations leaves as it is."""

    def spent(size: float) -> float:
      return flops.step_flops(size, self.main, 1, 2**17)['useful']  # of a large batch, where biases cost nothing

    return Estimate(*(spent(n) / spent(n / times) if 0 < times < np.inf else times for times in latents))

  @functools.cached_property
  def laws(self) -> list[Fit]:
    """L(n) at the main L0 of every family with three sizes or more."""
    return self._fits(sparsity.at(self.points(), {'l0': self.main}), FLAT, ['n_latents'], {'l0': self.main})

  @functools.cached_property
  def joint(self) -> list[Fit]:
    """L(n, L0) of every family whose cells can carry it."""
    return self._fits(self.cells, 'joint_nk_no_floor', ['n_latents', 'l0'], {})

  def _fits(self, points: pd.DataFrame, law: str, x: list[str], where: dict[str, float]) -> list[Fit]:
    out = []
    for name in self.families:
      mine = sparsity.at(points, {'activation': name})
      try:
        fit = fit_law(mine, law, x)
      except UserError:  # too few cells: the table shows them all the same
        continue
      if fit.freedom > 0:
        out.append(dataclasses.replace(fit, where={'activation': name} | where))
    return out

  def _at(self, n: float | None, l0: float | None) -> Array:
    """The sizes and L0s [N, L] asked for; all where none is."""
    at_N, at_L = (np.ones(len(x), bool) if one is None else x == one for x, one in ((self.sizes, n), (self.l0, l0)))
    return at_N[:, None] & at_L

  def _of(self, loss: Array, name: str) -> Array:
    return loss[..., self.families.index(name), :, :]


def compare(cells: pd.DataFrame) -> Compared:
  """The families of a table at equal L0.

  Args:
    cells: columns activation, n_latents, l0, nmse, one row a cell. Rows of one family, size and target (`k` or
      `sparsity`) repeat one setting. Where cells of one size had different `tokens`, the most frequent number counts.

  Raises:
    UserError: there is one family, or no L0 that two families of one size reach.
  """
  rows, warnings = family_cells.readable(cells)
  rows, others = family_cells.budget(rows)
  families = tuple(sorted(rows['activation'].unique()))
  if len(families) < 2:
    raise UserError(f'cells of {", ".join(families) or "no family"} alone; families are compared where there are two')
  sizes = np.sort(rows['n_latents'].unique())
  nodes, beaten = curves(rows)
  lists = {(f, n): nodes.get((name, size)) for f, name in enumerate(families) for n, size in enumerate(sizes)}
  asked = rows['k'].dropna().unique() if 'k' in rows else np.array([])
  if not len(asked):
    asked = np.geomspace(rows['l0'].min(), rows['l0'].max(), _GUESSES)
    asked = np.array([float(f'{value:.2g}') for value in asked])
  l0_L = np.unique(asked.astype(float))
  weight_FNLC = np.full((len(families), len(sizes), len(l0_L), len(rows)), np.nan)
  for (f, n), curve in lists.items():
    for i, l0 in enumerate(l0_L):
      if curve is not None and (weight_C := weights(*curve, np.log(l0))) is not None:
        weight_FNLC[f, n, i] = weight_C
  reached_FNL = np.isfinite(weight_FNLC[..., 0])
  pairs_L = (reached_FNL.sum(axis=0) * (reached_FNL.sum(axis=0) > 1)).sum(axis=0)
  if not pairs_L.any():
    raise UserError('no L0 is reached by two families of one size; train some with more and with fewer active latents')
  weight_FNLC, l0_L, pairs_L = weight_FNLC[:, :, pairs_L > 0], l0_L[pairs_L > 0], pairs_L[pairs_L > 0]
  most = np.flatnonzero(pairs_L == pairs_L.max())
  reference = _REFERENCE if _REFERENCE in families else str(rows['activation'].value_counts().index[0])
  v_C = np.log(rows['nmse'].to_numpy(float))
  scatter, freedom, repeats = _scatter(rows, nodes, v_C)
  rng = np.random.default_rng(0)
  scale_B = scatter * np.sqrt(freedom / rng.chisquare(max(freedom, 1), _DRAWS))
  noise_BC = rng.normal(size=(_DRAWS, len(rows))) * scale_B[:, None]
  loss_FNL = weight_FNLC @ v_C
  return Compared(
    families,
    reference,
    sizes,
    l0_L,
    float(l0_L[most[len(most) // 2]]),
    weight_FNLC,
    loss_FNL,
    loss_FNL + np.moveaxis(weight_FNLC @ noise_BC.T, -1, 0),
    scatter,
    freedom,
    repeats,
    rows,
    pd.concat(
      pd.DataFrame({'activation': name, 'n_latents': n, 'l0': np.exp(u_S), 'nmse': np.exp(weight_SC @ v_C)})
      for (name, n), (u_S, weight_SC) in nodes.items()
    ),
    _beside(others, nodes, v_C, reference),
    warnings + beaten,
  )


def curves(rows: pd.DataFrame) -> tuple[dict[tuple[str, float], tuple[Array, Array]], list[dict[str, str]]]:
  """By family and size: ln L0 [S] of the settings on its frontier, rising, and the weights [S, C] of the cells in each.

  Also a warning that names the settings which others beat.
  """
  found, beaten = {}, []
  u_C, v_C = (np.log(rows[column].to_numpy(float)) for column in ('l0', 'nmse'))
  for (name, n), at in rows.groupby(['activation', 'n_latents']).indices.items():
    settings, which = np.unique(rows['setting'].to_numpy()[at], return_inverse=True)
    weight_SC = np.zeros((len(settings), len(rows)))
    weight_SC[which, at] = 1 / np.bincount(which)[which]
    order = np.lexsort((weight_SC @ v_C, weight_SC @ u_C))
    weight_SC, v_S = weight_SC[order], (weight_SC @ v_C)[order]
    best = v_S < np.minimum.accumulate(np.concatenate([[np.inf], v_S[:-1]]))
    beaten += [f'{settings[order][i]} (NMSE {np.exp(v_S[i]):.3g})' for i in np.flatnonzero(~best)]
    found[str(name), float(n)] = (weight_SC @ u_C)[best], weight_SC[best]
  if not beaten:
    return found, []
  more = f' and {len(beaten) - _NAMED} more' if len(beaten) > _NAMED else ''
  text = 'settings are worse than another of their family and size with fewer active latents, and on no frontier'
  return found, [table.warning('beaten', f'{len(beaten)} {text}: {"; ".join(beaten[:_NAMED])}{more}')]


def weights(u_S: Array, weight_SC: Array, at: float) -> Array | None:
  """Weights [C] of the cells in the log NMSE at a log L0; None where they do not reach it."""
  if len(u_S) < 2:
    return None
  reach = np.log(sparsity.ALIKE)
  if not u_S[0] - min(reach, u_S[1] - u_S[0]) <= at <= u_S[-1] + min(reach, u_S[-1] - u_S[-2]):
    return None
  i = int(np.clip(np.searchsorted(u_S, at), 1, len(u_S) - 1))
  share = (at - u_S[i - 1]) / max(u_S[i] - u_S[i - 1], 1e-12)
  return (1 - share) * weight_SC[i - 1] + share * weight_SC[i]


def _scatter(
  rows: pd.DataFrame, nodes: dict[tuple[str, float], tuple[Array, Array]], v_C: Array
) -> tuple[float, int, bool]:
  """Standard deviation of the log NMSE of cells, its degrees of freedom, and whether it is that between seeds.

  Seeds differ in L0 too, so what the slope of the curve makes of that is taken off.
  """
  u_C = np.log(rows['l0'].to_numpy(float))
  squares, freedom = 0.0, 0
  for u_S, weight_SC in nodes.values():
    slope_S = np.gradient(weight_SC @ v_C, u_S) if len(u_S) > 1 else np.zeros(1)
    for slope, weight_C in zip(slope_S, weight_SC, strict=True):
      at = weight_C > 0
      off = (v_C - slope * u_C)[at]
      squares, freedom = squares + float(np.sum((off - off.mean()) ** 2)), freedom + len(off) - 1
  if freedom:
    return float(np.sqrt(squares / freedom)), freedom, True
  for _, index in rows.groupby('activation').indices.items():
    w_C = np.log(rows['n_latents'].to_numpy(float)[index])
    design = np.stack([np.ones(len(index)), w_C, u_C[index], w_C * u_C[index]], axis=1)
    theta, _, rank, _ = np.linalg.lstsq(design, v_C[index], rcond=None)
    squares += float(np.sum((v_C[index] - design @ theta) ** 2))
    freedom += len(index) - int(rank)
  return (float(np.sqrt(squares / freedom)) if freedom else np.nan), freedom, False


def _beside(
  others: pd.DataFrame, nodes: dict[tuple[str, float], tuple[Array, Array]], v_C: Array, reference: str
) -> pd.DataFrame:
  """Cells of another number of tokens, with their loss over that of cells of the usual one at the same size and L0."""
  rows = []
  for row in others.to_dict('records'):
    for column, name in (('over', row['activation']), ('over_reference', reference)):
      curve = nodes.get((name, row['n_latents']))
      weight_C = curve and weights(*curve, np.log(row['l0']))
      row[column] = np.nan if weight_C is None else row['nmse'] / np.exp(weight_C @ v_C)
    rows.append(row)
  return pd.DataFrame(rows, columns=pd.Index([*others.columns, 'over', 'over_reference']))


def _mean(value: Array, on: Array, axes: int = 2) -> Array:
  """The mean over the last axes where `on`; NaN where that is nowhere."""
  count = on.sum()
  return np.where(on, value, 0.0).sum(axis=tuple(range(-axes, 0))) / (count or np.nan)


def _crossed(u_N: Array, curve: Array, value: Array) -> Array:
  """Where curves [..., N] over `u_N`, linear between points and along the last two beyond, fall to a value [...].

  Infinite where that is more than a factor of two beyond the points; NaN for a curve that does not fall.
  """
  if len(u_N) < 2:
    return np.full(np.shape(value), np.nan)
  falls = (np.diff(curve, axis=-1) < 0).all(axis=-1)
  i = np.clip((curve > value[..., None]).sum(axis=-1), 1, len(u_N) - 1)[..., None]
  before, after = (np.take_along_axis(curve, j, -1)[..., 0] for j in (i - 1, i))
  i = i[..., 0]
  found = u_N[i - 1] + (u_N[i] - u_N[i - 1]) * (before - value) / np.where(falls, before - after, np.nan)
  return np.where(found < u_N[0] - _FURTHER, -np.inf, np.where(found > u_N[-1] + _FURTHER, np.inf, found))
