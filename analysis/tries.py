"""Tries laws of one family one after the other, and keeps what was refused, why, and at which targets."""

import dataclasses
from collections.abc import Callable
from typing import Any

from analysis import sparsity, table
from analysis.compare import WITHOUT, Comparison
from analysis.fit import with_holdout
from analysis.fit_result import Fit
from sae_jax.errors import UserError


class Tries:
  """Tries laws and keeps what was refused, why, and at which targets.

  `where` is what the points of a fit have in common: the target {'k': 8}, nothing for all targets together.
  """

  def __init__(self, bootstrap: int, largest: str | None, family: dict[str, str]):
    self.bootstrap = bootstrap
    self.largest = largest  # the rule that holds out the largest size
    self.family = family  # what fits say of it: {} where the ledger has one alone
    self.comparisons: list[Comparison] = []
    self._refused: dict[str, dict[str, list[dict[str, float]]]] = {}

  def one(self, what: str, fit: Callable[[], Any], where: dict[str, float]) -> Any:
    """What `fit` returns, or None when it is refused."""
    try:
      return fit()
    except UserError as error:
      self._refused.setdefault(what, {}).setdefault(str(error), []).append(where)
      return None

  def plain(self, what: str, fit: Callable[[], Fit], where: dict[str, float]) -> Fit | None:
    """The fit without a held-out error, refused where it passes through its points whatever they are."""

    def tested() -> Fit:
      found = fit()
      if len(found.table) <= len(found.law.names):
        text = f'{len(found.table)} points for {len(found.law.names)} constants: nothing tests the law; add points'
        raise UserError(text)
      return dataclasses.replace(found, where=self.family | where)

    return self.one(what, tested, where)

  def law(
    self, what: str, fit: Callable[[str | None], Fit], where: dict[str, float], holdout: str | None = None
  ) -> Fit | None:
    """The fit with its held-out error where it has one, of the largest size unless told otherwise."""
    held = holdout or self.largest
    return self.one(what, lambda: dataclasses.replace(with_holdout(fit, held), where=self.family | where), where)

  def floored(
    self,
    what: str,
    law: str,
    fit: Callable[[str, int, str | None], Fit],
    where: dict[str, float],
    holdout: str | None = None,
  ) -> Fit | None:
    """The fit of (law, resamples, holdout), compared with the same law without an irreducible loss."""
    found = self.law(what, lambda h: fit(law, self.bootstrap, h), where, holdout)
    plain = found and self.law(f'{what} without e', lambda h: fit(WITHOUT[law], 0, h), where, holdout)
    if found and plain:
      self.comparisons.append(Comparison(found, plain))
    return found

  def warnings(self) -> list[dict[str, str]]:
    """One a law."""
    out = []
    for what, reasons in self._refused.items():
      parts = []
      for reason, places in reasons.items():
        parts.append(''.join(f'{key}={values}: ' for key, values in sparsity.gathered(places).items()) + reason)
      aside = ' at ' if any(next(iter(reasons.values()))) else ': '
      out.append(table.warning('not_fitted', f'{what}{aside}{"; ".join(parts)}'))
    return out
