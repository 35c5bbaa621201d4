"""A fitted law: estimates, intervals, diagnostics and the points behind them; predictions, and words and JSON of it."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import laws, table
from analysis.fitting import uncertainty
from analysis.law import Law
from sae_jax import checks, files
from sae_jax.errors import UserError

Array = np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
  """A law with estimates, intervals, diagnostics and the points it was fitted to."""

  law: Law
  x: tuple[str, ...]
  y: str
  objective: str
  # name -> estimate, low, high (the interval to quote), standard_error, profile_low, profile_high; NaN: none
  params: dict[str, dict[str, float]]
  start_agreement: float  # share of starts within 1 % of the best objective
  diagnostics: dict[str, Any]
  holdout: dict[str, Any] | None  # rule, mean_rel_err, max_rel_err, … of a refit without the held-out points
  warnings: list[dict[str, str]]
  table: pd.DataFrame  # the points
  theta_P: Array  # estimates in fit coordinates
  draws_BP: Array  # the same for every resample; empty without bootstrap
  covariance_PP: Array | None = None  # of theta_P; None when the points do not determine it
  where: dict[str, float | str] = dataclasses.field(default_factory=dict)  # common to all points, e.g. {'k': 32}

  @property
  def quantity(self) -> str:
    """Such as 'L(n)', 'n(C)' for a best size, 'L_s(n)' for several subjects or 'downstream/kl(NMSE)' for a measure."""
    family = self.law.name.startswith('family')
    known = laws.QUANTITIES.get(self.y, self.y if '/' in self.y else 'L')
    quantity = 'L_s' if family else known
    shown = self.x[:1] if family else self.variables  # the others only tell subjects apart
    return f'{quantity}({", ".join(laws.SYMBOLS.get(column, column) for column in shown)})'

  @property
  def label(self) -> str:
    """The quantity and what its points have in common, such as 'L(n), k = 8'."""
    return ', '.join([self.quantity, *where_words(self.where)])

  def words(self, text: str) -> str:
    """A text about the law, such as its formula, in the symbols of the columns that it was fitted over."""
    pairs = zip(self.law.axes, self.x, strict=True)
    symbols = {laws.SYMBOLS[axis]: laws.SYMBOLS[x] for axis, x in pairs if {axis, x} <= laws.SYMBOLS.keys()}
    return re.sub(r'\w+', lambda word: symbols.get(word[0], word[0]), text)

  @property
  def variables(self) -> tuple[str, ...]:
    """The columns that are variables, without those that tell curves apart."""
    return self.x[: len(self.x) - self.law.inner]

  def predict(self, at: pd.DataFrame | Mapping[str, Any]) -> Array:
    """Loss [N] at the rows of a table, or at scalars or arrays [N] by column name; scalars hold for all rows.

    Raises:
      UserError: a column of the law is missing, its values are not finite and positive, or lengths differ.
    """
    with np.errstate(over='ignore'):  # a law far outside its data may leave the range of float64: inf, not an error
      return np.exp(self.law.log_prediction(self.theta_P[None], self.logs(at))[0][0])

  @property
  def freedom(self) -> int:
    """Points beyond the constants."""
    return len(self.table) - len(self.theta_P)

  def band(self, at: pd.DataFrame | Mapping[str, Any]) -> tuple[Array, Array]:
    """Bounds [N] of the 90 % interval of the law itself: see `uncertainty.band`; NaN where it is unknown."""
    return self._band(at, None)

  def interval(self, at: pd.DataFrame | Mapping[str, Any]) -> tuple[Array, Array]:
    """Bounds [N] of the 90 % interval of one new observation at every row; NaN where it is unknown."""
    return self._band(at, self.residuals())

  def redrawn(self, draws_BP: Array, by: str) -> 'Fit':
    """The same fit with intervals from these resamples of `by`, or from standard errors where those are wider."""
    params, method = uncertainty.params(self.law, self.theta_P, draws_BP, self.covariance_PP, self.freedom)
    params = {name: self.params[name] | p for name, p in params.items()}  # profiles stay
    interval = self.diagnostics['interval'] | {'method': method, 'resamples': len(draws_BP), 'by': by}
    old = ('no_interval', 'not_finite')
    warnings = [w for w in self.warnings if w['code'] not in old] + uncertainty.interval_warnings(params, method)
    return dataclasses.replace(
      self, params=params, draws_BP=draws_BP, warnings=warnings, diagnostics=self.diagnostics | {'interval': interval}
    )

  def warned(self, *more: dict[str, str]) -> 'Fit':
    """The same fit with more warnings."""
    return dataclasses.replace(self, warnings=[*self.warnings, *more])

  def residuals(self) -> Array:
    """ln predicted - ln observed [N] at the points of the fit."""
    return np.log(self.predict(self.table)) - np.log(table.positive(self.table, [self.y])[:, 0])

  def to_json(self) -> dict[str, Any]:
    """An entry of laws.json: strict JSON, null where a number is unknown."""
    record = {
      'law': self.law.name,
      'formula': self.words(self.law.formula),
      'x': list(self.variables),
      'y': self.y,
      'where': self.where,
      'params': self.params,
      'meaning': {p.name: self.words(p.meaning) for p in self.law.parameters},
      'objective': self.objective,
      'n_points': len(self.table),
      'start_agreement': self.start_agreement,
      'holdout': self.holdout,
      'warnings': self.warnings,
    }
    return _strict(record | self.diagnostics)

  def summary(self) -> str:
    """Lines for a terminal: the law, every constant with its interval, the checks; not the warnings."""
    over = f'{self.law.name}: {self.y} over {", ".join(self.variables)}, {len(self.table)} points'
    lines = [f'{self.label}   ({over})', f'  {self.words(self.law.formula)}']
    wide = max(7, *map(len, self.params))
    for name, p in self.params.items():
      estimate, low, high = (nothing_is_zero(name, p[key]) for key in ('estimate', 'low', 'high'))
      known = f'{low:.5g} to {high:.5g}' if np.isfinite([low, high]).any() else 'unknown'
      lines.append(f'  {name:{wide}s} {estimate:12.5g}   90 % interval {known}{self._profile_text(name)}')
    d = self.diagnostics
    lines.append(
      f'  rms log residual {d["rms_log_residual"]:.5f}; {self.objective}; '
      f'{self.start_agreement:.0%} of starts agree; interval by {d["interval"]["method"]}'
    )
    if seeds := d['seed_noise']:
      p = seeds['lack_of_fit_p']
      lines.append(
        f'  seed noise {seeds["sd_log"]:.5f} in log loss, {seeds["freedom"]} degrees of freedom'
        + (f'; lack of fit beyond it: p = {p:.2g}' if np.isfinite(p) else '')
      )
    if self.holdout:
      lines.append('  held out: ' + self.holdout_text())
    return '\n'.join(lines)

  def holdout_text(self) -> str:
    """The held-out error in a sentence; empty when nothing was held out."""
    if not self.holdout:
      return ''
    h = self.holdout
    return (
      f'{h["n_held_out"]} with {h["rule"]} predicted from the other {h["n_fitted"]}, '
      f'error {h["mean_rel_err"]:.2%} on average, {h["max_rel_err"]:.2%} at most'
    )

  def _profile_text(self, name: str) -> str:
    if not self.diagnostics['profile']:
      return ''
    low, high = (self.params[name][key] for key in ('profile_low', 'profile_high'))
    return f'; profile {"unbounded" if np.isnan(low) else f"{low:.5g}"} to {"unbounded" if np.isnan(high) else f"{high:.5g}"}'

  def _band(self, at: pd.DataFrame | Mapping[str, Any], residual_N: Array | None) -> tuple[Array, Array]:
    low, high = uncertainty.band(
      self.law, self.theta_P, self.draws_BP, self.covariance_PP, self.freedom, self.logs(at), residual_N
    )
    # A law far outside its data may leave the range of float64, which is "unbounded", not an error.
    with np.errstate(over='ignore'):
      return np.exp(low), np.exp(high)

  def derived(self, value: Callable[[Array], Array]) -> uncertainty.Estimate:
    """A number made of the constants [M, P] in fit coordinates, with its 90 % interval: see `uncertainty.derived`."""
    return uncertainty.derived(value, self.theta_P, self.draws_BP, self.covariance_PP, self.freedom)

  def logs(self, at: pd.DataFrame | Mapping[str, Any]) -> Array:
    """Natural logarithms [N, Q] of the variables at the rows of a table, or by column name."""
    rows = at if isinstance(at, pd.DataFrame) else _rows(at)
    return np.log(table.positive(rows, self.x))


def fits_of(value: Fit | Sequence[Fit], variables: int | None = None) -> list[Fit]:
  """One fit or several, all of one y over the same x, of so many variables where that is given. Raises `UserError`."""
  fits = value if isinstance(value, list | tuple) and value else [value]
  for fit in fits:
    if not isinstance(fit, Fit):
      raise UserError(f'{checks.shown(fit)} is no fit; give what analysis.fit_law returns')
  kinds = {(*fit.x, fit.y) for fit in fits}
  if len(kinds) > 1:
    said = ' and '.join(sorted(f'{y} over {", ".join(x)}' for *x, y in kinds))
    raise UserError(f'fits of {said} have no axes in common; give those of one kind')
  if variables is not None and len(fits[0].x) != variables:
    instead = 'plots.power or plots.growth' if len(fits[0].x) == 1 else 'plots.joint or plots.residuals'
    raise UserError(
      f'this figure needs a law over {variables} variable(s), and {fits[0].law.name} is over {", ".join(fits[0].x)}; '
      f'use {instead}'
    )
  return list(fits)


def where_words(where: Mapping[str, float | str]) -> list[str]:
  """What the points of a fit have in common, such as 'k = 8'; a family is said by its name alone."""
  shown = {key: value if isinstance(value, str | bool) else f'{value:g}' for key, value in where.items()}
  return [value if key == 'activation' else f'{key} = {value}' for key, value in shown.items()]


def nothing_is_zero(name: str, value: float) -> float:
  """An irreducible loss that a fit has driven to nothing as 0; other constants may be small and mean it."""
  return 0.0 if name.partition('[')[0] == 'e' and abs(value) < 1e-6 else value


def warning_lines(fits: Sequence[Fit]) -> list[str]:
  """One line a kind of warning of these fits, as of `gathered`."""
  pairs = [(fit.label, w) for fit in fits for w in fit.warnings]
  return [f'{w["code"]}: {w["message"]}' for w in gathered(pairs, whose=len(fits) > 1)]


def gathered(
  pairs: Sequence[tuple[str, dict[str, str]]], *, whose: bool = True, every: int = 0
) -> list[dict[str, str]]:
  """One warning a kind: the first message and, if asked for, whose that is and who has the like.

  Args:
    pairs: the owner of a warning, and the warning. Two refusals are of a kind when they are of the same law.
    whose: whether owners are named.
    every: their number; where it is given, all of them are not named one by one.
  """
  kinds: dict[tuple[str, str], list[tuple[str, str]]] = {}
  for owner, w in pairs:
    law = re.split(' at |: ', w['message'])[0] if w['code'] == 'not_fitted' else ''
    kinds.setdefault((w['code'], law), []).append((owner, w['message']))
  out = []
  for (code, _), hits in kinds.items():
    message = hits[0][1]
    same = list(dict.fromkeys(owner for owner, said in hits if said == message))
    like = list(dict.fromkeys(owner for owner, said in hits if said != message and owner not in same))
    more = f' [{"; ".join(same) if len(same) != every else "every family"}]' + (
      f'; the like for {"; ".join(like)}' if like else ''
    )
    out.append(table.warning(code, message + (more if whose else '')))
  return out


def _rows(at: Mapping[str, Any]) -> pd.DataFrame:
  """Scalars and arrays [N] by column name as a table."""
  if not isinstance(at, Mapping):
    raise UserError(f'at={checks.shown(at)} is no place; give a table, or values by column: {{"n_latents": 8192}}')
  try:
    columns = {key: np.asarray(value) for key, value in at.items()}
  except ValueError:
    raise UserError('at holds rows of different lengths; give a number or an array [N] for each column') from None
  shapes = {key: column.shape for key, column in columns.items() if column.ndim}
  if any(len(shape) > 1 for shape in shapes.values()) or len(set(shapes.values())) > 1:
    said = ', '.join(f'{key} {shape}' for key, shape in shapes.items())
    raise UserError(f'at has columns of shapes {said}; give a number or an array [N] for each, of one N')
  count = next(iter(shapes.values()), (1,))
  return pd.DataFrame({key: np.broadcast_to(column, count) for key, column in columns.items()})


def _strict(value: Any) -> Any:
  """The value with every number that JSON does not know replaced by None."""
  if isinstance(value, dict):
    return {key: _strict(v) for key, v in value.items()}
  if isinstance(value, list):
    return [_strict(v) for v in value]
  if isinstance(value, float | np.floating):
    return float(value) if np.isfinite(value) else None
  return value


def write_json(path: str, record: Any) -> None:
  """Strict JSON with a final newline. Raises `UserError` when `path` cannot be written."""
  files.write_output(path, json.dumps(record, indent=1, allow_nan=False).encode() + b'\n')
