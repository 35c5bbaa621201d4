"""The record of what a ledger says: its cells, the laws of every family and target, warnings; and its JSON."""

import dataclasses
import math
import re
from typing import Any

import pandas as pd

from analysis.allocation import Allocation
from analysis.compare import Comparison
from analysis.equal_l0 import Compared
from analysis.family import Family
from analysis.fit_result import Fit, gathered, warning_lines
from analysis.measure_laws import OneMeasure


@dataclasses.dataclass(frozen=True, eq=False)
class OneTarget:
  """The laws of one family at one target of sparsity; None where one was refused or is not asked for."""

  name: str  # of the target in names of files: 'k8', 'sparsity0.05'
  where: dict[str, float | str]  # the target, as {'k': 8}, and the family where the ledger has several
  power: Fit | None = None  # L(n)
  frontier: Fit | None = None  # L(C) in useful FLOPs
  frontier_dense: Fit | None = None  # L(C) in dense FLOPs
  converged: Fit | None = None  # tokens to convergence over n
  profiles: tuple[pd.DataFrame, pd.DataFrame] | None = None  # as from `isoflop.profiles`
  best_size: Fit | None = None  # n over C
  rates: pd.DataFrame | None = None  # the cells of several learning rates
  learning_rate: Fit | None = None  # the best one over n
  tokens: Fit | None = None  # L(n, T)
  split: Allocation | None = None  # of ten times the largest budget spent
  subjects: Family | None = None  # L_s(n)


@dataclasses.dataclass(frozen=True, eq=False)
class OneFamily:
  """The laws of one family of autoencoders."""

  name: str  # its `activation`
  joint: Fit | None
  targets: list[OneTarget]
  cost: float  # useful FLOPs a latent and token, of the largest cell
  comparisons: list[Comparison]  # of joint, power and frontier with the same laws without an irreducible loss
  warnings: list[dict[str, str]]
  not_attempted: list[str]  # laws this sweep was not made for, with what it lacks

  @property
  def folder(self) -> str:
    """Its name as that of a folder: whatever a file says it is called, the name leads nowhere else."""
    return re.sub(r'\W', '', self.name, flags=re.ASCII) or 'family'

  @property
  def fits(self) -> list[Fit]:
    """All of them, law by law, those in dense FLOPs last."""
    kinds = (
      'power',
      'frontier',
      'converged',
      'best_size',
      'learning_rate',
      'tokens',
      'subjects',
      'frontier_dense',
    )
    rows = [self.joint, *(getattr(one, kind) for kind in kinds for one in self.targets)]
    pairs = [(row.common, row.separate) if isinstance(row, Family) else (row,) for row in rows]
    return [fit for pair in pairs for fit in pair if fit]

  def to_json(self) -> list[dict[str, Any]]:
    """Its entries of laws.json."""
    more: dict[int, dict[str, Any]] = {id(c.floored): {'comparison': c.to_json()} for c in self.comparisons}
    for one in self.targets:
      if one.split:
        more[id(one.tokens)] = {'allocation': _split_json(one.split, self.cost)}
      if one.subjects:
        more[id(one.subjects.separate)] = {'family': _family_json(one.subjects)}
    return [fit.to_json() | more.get(id(fit), {}) for fit in self.fits]


@dataclasses.dataclass(frozen=True, eq=False)
class Findings:
  """A ledger's cells, the laws fitted to them, and everything a reader must be warned of."""

  cells: pd.DataFrame  # all, with state and reason
  done: pd.DataFrame  # finished cells of all subjects; `best_learning_rate` marks the best rate of every setting
  curves: pd.DataFrame  # of the subject that the laws are about
  families: list[OneFamily]
  about: list[dict[str, str]]  # warnings of the ledger as a whole
  compared: Compared | None = None  # the families at equal L0; None where there is one, or nothing to compare
  among: list[dict[str, str]] = dataclasses.field(default_factory=list)  # warnings of cells, said once for all families
  measures: list[OneMeasure] = dataclasses.field(default_factory=list)

  @property
  def fits(self) -> list[Fit]:
    """Those of every family, and those of measures."""
    return [fit for one in (*self.families, *self.measures) for fit in one.fits]

  @property
  def comparisons(self) -> list[Comparison]:
    """Those of every family."""
    return [pair for one in self.families for pair in one.comparisons]

  @property
  def warnings(self) -> list[dict[str, str]]:
    """Those of the ledger, then those of its families; of several, a kind is said once."""
    if len(self.families) == 1:
      return [*self.about, *self.families[0].warnings]
    said = {w['code'] for w in self.among}
    own = [(one.name, w) for one in self.families for w in one.warnings if w['code'] not in said]
    return [*self.about, *self.among, *gathered(own, every=len(self.families))]

  @property
  def not_attempted(self) -> list[str]:
    """Laws this sweep was not made for, with what it lacks, and in which families where that is not all."""
    texts = dict.fromkeys(text for one in self.families for text in one.not_attempted)
    whose = {text: [one.name for one in self.families if text in one.not_attempted] for text in texts}
    return [
      text if len(names) == len(self.families) else f'{text} [{"; ".join(names)}]' for text, names in whose.items()
    ]

  def to_json(self) -> list[dict[str, Any]]:
    """The content of laws.json."""
    return [entry for one in (*self.families, *self.measures) for entry in one.to_json()]

  def warning_lines(self) -> list[str]:
    """Those of the ledger, then those of the fits that say something else; of several families, whose they are."""
    said = {w['code'] for w in self.warnings}
    lines = [f'{w["code"]}: {w["message"]}' for w in self.warnings]
    if len(self.families) == 1:
      return lines + [line for line in warning_lines(self.fits) if line.partition(':')[0] not in said]
    own = [(one.name, w) for one in self.families for fit in one.fits for w in fit.warnings if w['code'] not in said]
    return lines + [f'{w["code"]}: {w["message"]}' for w in gathered(own, every=len(self.families))]


def _split_json(split: Allocation, cost: float) -> dict[str, Any]:
  record: dict[str, Any] = {'flops': split.flops, 'flops_per_latent_token': cost}
  for key in ('n_latents', 'tokens', 'loss', 'exponent_n', 'exponent_tokens'):
    record[key] = dict(zip(('estimate', 'low', 'high'), map(_known, getattr(split, key)), strict=True))
  return record


def _family_json(family: Family) -> dict[str, Any]:
  rows = family.exponents().to_dict('records')
  exponents = [{str(key): _known(value) for key, value in row.items()} for row in rows]
  return {
    'subjects': list(family.subjects),
    'verdict': family.verdict,
    'p_common': _known(family.p_common),
    'exponents': exponents,
  }


def _known(value: Any) -> Any:
  return None if isinstance(value, float) and not math.isfinite(value) else value
