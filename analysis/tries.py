"""Tries laws one after the other, and keeps what was refused, why, and for which k."""

import dataclasses
from collections.abc import Callable
from typing import Any

from analysis import table
from analysis.compare import WITHOUT, Comparison
from analysis.fit import with_holdout
from analysis.fit_result import Fit
from sae_jax.errors import UserError


class Tries:
  """Tries laws and keeps what was refused, why, and for which k."""

  def __init__(self, bootstrap: int, largest: str | None):
    self.bootstrap = bootstrap
    self.largest = largest  # the rule that holds out the largest size
    self.comparisons: list[Comparison] = []
    self._refused: dict[str, dict[str, list[int]]] = {}

  def one(self, what: str, fit: Callable[[], Any], k: int | None = None) -> Any:
    """What `fit` returns, or None when it is refused."""
    try:
      return fit()
    except UserError as error:
      self._refused.setdefault(what, {}).setdefault(str(error), []).extend([] if k is None else [k])
      return None

  def plain(self, what: str, fit: Callable[[], Fit], k: int) -> Fit | None:
    """The fit of one k without a held-out error, refused where it passes through its points whatever they are."""

    def tested() -> Fit:
      found = fit()
      if len(found.table) <= len(found.law.names):
        text = f'{len(found.table)} points for {len(found.law.names)} constants: nothing tests the law; add points'
        raise UserError(text)
      return dataclasses.replace(found, where={'k': k})

    return self.one(what, tested, k)

  def law(
    self, what: str, fit: Callable[[str | None], Fit], k: int | None = None, holdout: str | None = None
  ) -> Fit | None:
    """The fit with its held-out error where it has one, of the largest size unless told otherwise."""
    where = {} if k is None else {'k': k}
    held = holdout or self.largest
    return self.one(what, lambda: dataclasses.replace(with_holdout(fit, held), where=where), k)

  def floored(
    self,
    what: str,
    law: str,
    fit: Callable[[str, int, str | None], Fit],
    k: int | None = None,
    holdout: str | None = None,
  ) -> Fit | None:
    """The fit of (law, resamples, holdout), compared with the same law without an irreducible loss."""
    found = self.law(what, lambda h: fit(law, self.bootstrap, h), k, holdout)
    plain = found and self.law(f'{what} without e', lambda h: fit(WITHOUT[law], 0, h), k, holdout)
    if found and plain:
      self.comparisons.append(Comparison(found, plain))
    return found

  def warnings(self) -> list[dict[str, str]]:
    """One a law."""
    out = []
    for what, reasons in self._refused.items():
      parts = [(f'k={", ".join(map(str, ks))}: ' if ks else '') + reason for reason, ks in reasons.items()]
      out.append(
        table.warning('not_fitted', f'{what}{" at " if parts[0].startswith("k=") else ": "}{"; ".join(parts)}')
      )
    return out
