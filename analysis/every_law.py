"""Fits every law that a ledger's finished cells can carry, and names each refused one with its reason.

The laws are of one family of autoencoders each. Those of the loss are of one subject and of the longest runs of every
size; only those that are about several subjects, or about tokens, see more.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from analysis import (
  convergence,
  equal_l0,
  family_cells,
  isoflop,
  laws,
  learning_rate,
  measure_laws,
  read_ledger,
  setting,
  sparsity,
  table,
)
from analysis.allocation import allocate
from analysis.family import Family, fit_family
from analysis.findings import Findings, OneFamily, OneTarget
from analysis.fit import fit_law
from analysis.fit_result import Fit
from analysis.fitting import resample
from analysis.frontier import fit_frontier
from analysis.tries import Tries
from sae_jax import checks
from sae_jax.errors import UserError

_LEAST_SIZES = 4  # of a power law with three constants


@dataclasses.dataclass(frozen=True, eq=False)
class _Data:
  """Views of a ledger's finished cells."""

  points: pd.DataFrame  # of one subject, the best learning rate, the longest runs of every size
  best: pd.DataFrame  # the same with every token budget
  rates: pd.DataFrame  # the points with every learning rate
  every: pd.DataFrame  # the points of all subjects
  curves: pd.DataFrame  # of one subject

  def at(self, where: Mapping[str, float | str]) -> '_Data':
    return _Data(*(sparsity.at(frame, where) for frame in vars(self).values()))

  def measured(self, cells: pd.DataFrame) -> pd.DataFrame:
    """The curves of these cells."""
    return self.curves[self.curves['id'].isin(cells['id'])]


def analyse(ledger: str, bootstrap: int = 500, subject: str | None = None) -> Findings:
  """Fits every law the finished cells can carry.

  Args:
    ledger: the folder a sweep wrote.
    bootstrap: resamples behind the intervals.
    subject: whose cells the laws over n, k and C are of; by default the one with most cells.

  Raises:
    UserError: there is no ledger, or no finished cell of that subject.
  """
  resample.count(bootstrap)  # asked here, for a law that refuses it would be named as one the cells cannot carry
  if subject is not None:
    checks.text('subject', subject, 'name a language model of the ledger')
  cells = read_ledger.load_cells(ledger)
  done, curves = read_ledger.load_ledger(ledger, cells), read_ledger.load_curves(ledger, cells)
  holes, curves.attrs = curves.attrs['warnings'], {}
  best = table.best_learning_rate(done)
  useful = table.useful(done)
  done['best_learning_rate'] = done['id'].isin(best['id'])
  warnings, best.attrs['warnings'] = list(best.attrs['warnings']), []  # said once, not again with every law
  every = setting.longest(best)
  own, notes = _choose_subject(every, subject)
  curves = table.useful(curves[curves['id'].isin(own(cells)['id'])])
  data = _Data(own(every), own(best), own(setting.longest(useful)), every, curves)
  names = sorted(data.points['activation'].dropna().unique())
  parts = [data.at({'activation': name}) for name in names] if len(names) > 1 else [data]
  families = [
    _one_family(part, name, {'activation': name} if len(names) > 1 else {}, bootstrap)
    for name, part in zip(names or [''], parts, strict=True)
  ]
  about = warnings + holes + notes
  compared, among = _together(data) if len(names) > 1 else (None, [])
  measures = measure_laws.analyse(ledger, data.best, compared, bootstrap)
  return Findings(cells, done, curves, families, about, compared, among, measures)


def _together(data: _Data) -> tuple[equal_l0.Compared | None, list[dict[str, str]]]:
  """The families at equal L0, and the warnings of their cells."""
  points = data.points
  moving = convergence.unconverged_warnings(data.curves, points['id'], named=True)
  among = convergence.risen_warnings(points) + moving
  try:
    compared = equal_l0.compare(data.best)  # of every number of tokens: it takes the usual one, and shows the others
  except UserError as error:
    return None, [
      *among,
      *family_cells.suspects(points),
      table.warning('not_compared', f'families at equal L0: {error}'),
    ]
  return compared, among + compared.warnings


def _one_family(data: _Data, name: str, family: dict[str, str], bootstrap: int) -> OneFamily:
  """The laws of one family; `family` is what they say of it."""
  points = data.points
  risen = convergence.risen_warnings(points)
  warnings = _mixed_settings(points) + risen + convergence.unconverged_warnings(data.curves, points['id'])
  asked, not_attempted = _asked(data)
  tries = Tries(bootstrap, _largest(points), family)
  targets = sparsity.targets(points)
  # Where more latents are active than were asked for, k is a wish: it was steered for, and what came of it is the L0.
  missed = points['k'].isna() | (points['l0'] > sparsity.ALIKE * points['k'])
  sparse = sparsity.MEASURED if missed.any() else 'k'

  def all_targets(law: str, b: int, holdout: str | None) -> Fit:
    if sparse == sparsity.MEASURED and len(targets) < 2:
      raise UserError(f'{sparsity.said(targets[0])} alone; a law over n and {laws.SYMBOLS[sparse]} needs another one')
    return fit_law(points, law, ['n_latents', sparse], bootstrap=b, holdout=holdout).warned(*risen)

  joint = tries.floored(f'L(n,{laws.SYMBOLS[sparse]})', 'joint_nk', all_targets, {})
  last = points.sort_values('n_latents').iloc[-1:]  # none in an empty ledger
  cost = float((last['flops_useful'] / last['n_latents'] / last['tokens']).sum())
  found = [_one_target(tries, data.at(target), target, asked, cost) for target in targets]
  return OneFamily(name, joint, found, cost, tries.comparisons, warnings + tries.warnings(), not_attempted)


def _one_target(tries: Tries, data: _Data, target: dict[str, float], asked: set[str], cost: float) -> OneTarget:
  points, curves, b = data.points, data.curves, tries.bootstrap
  unequal = _unequal_sparsity(points, target)
  found: dict[str, Any] = {}

  def size(law: str, bootstrap: int, holdout: str | None) -> Fit:
    count = points['n_latents'].nunique()
    if count < _LEAST_SIZES:
      raise UserError(f'{count} sizes, a power law with a floor needs {_LEAST_SIZES}; add sizes')
    return fit_law(points, law, bootstrap=bootstrap, holdout=holdout).warned(*unequal)

  found['power'] = tries.floored('L(n)', 'power', size, target)
  for x, name in (('flops_useful', 'frontier'), ('flops_dense', 'frontier_dense')):

    def compute(law: str, bootstrap: int, holdout: str | None, x: str = x) -> Fit:
      return fit_frontier(curves, x, law=law, bootstrap=bootstrap, holdout=holdout).warned(*unequal)

    # Held out in the variable one extrapolates in: the envelope of the last factor of five.
    far = f'{x}>{curves[x].max() / 5:.2g}'
    if name == 'frontier':
      found[name] = tries.floored('L(C)', 'power', compute, target, far)
    else:
      found[name] = tries.law('L(C) in dense FLOPs', lambda h, fit=compute: fit('power', b, h), target, far)

  if 'converged' in asked:
    found['converged'] = tries.plain(
      'T(n)', lambda: convergence.fit_convergence(data.measured(points), bootstrap=b), target
    )
  if 'best_size' in asked:
    runs = data.measured(data.best)
    found['profiles'] = profiles = tries.one('n(C)', lambda: _profiles(runs), target)
    if profiles:
      spent = profiles[1]['budget'].tolist()
      found['best_size'] = tries.plain(
        'n(C)', lambda: isoflop.fit_best_size(runs, spent, bootstrap=b).warned(*unequal), target
      )
  if 'learning_rate' in asked and _several(data.rates, 'learning_rate'):
    found['rates'] = data.rates
    found['learning_rate'] = tries.plain(
      'lr(n)', lambda: learning_rate.fit_learning_rate(data.rates, bootstrap=b), target
    )
  if 'tokens' in asked and _several_budgets(data.best):
    fit = tries.law('L(n,T)', lambda h: fit_law(data.best, 'additive2', bootstrap=b, holdout=h), target)
    most = 10 * float(data.best['flops_useful'].max())
    found['tokens'] = fit
    found['split'] = fit and tries.one('best split of a budget', lambda: allocate(fit, most, cost), target)
  if 'family' in asked:
    found['subjects'] = tries.one('L_s(n)', lambda: _family(data.every, tries.family | target), target)
  return OneTarget(sparsity.said(target).replace('=', ''), tries.family | target, **found)


def _profiles(runs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
  spent = isoflop.budgets(runs)
  if not len(spent):
    raise UserError('at no compute had three sizes been measured; evaluate more often or train small sizes longer')
  return isoflop.profiles(runs, spent.tolist())


def _family(points: pd.DataFrame, where: dict[str, float | str]) -> Family:
  """With an irreducible loss of each subject where all have the sizes for one."""
  least = points.groupby('subject')['n_latents'].nunique().min()
  family = fit_family(points, floor=bool(least >= _LEAST_SIZES))
  common, separate = (dataclasses.replace(fit, where=where) for fit in (family.common, family.separate))
  return Family(family.subjects, common, separate)


def _asked(data: _Data) -> tuple[set[str], list[str]]:
  """The laws beside those of the loss that this sweep was made for, and the others with what they lack.

  What a sweep holds fixed is a question it does not ask, not a law that failed.
  """
  sizes = data.points['n_latents'].nunique()
  subjects = data.every['subject'].nunique() if 'subject' in data.every else 0
  conditions = (
    ('converged', sizes > 1, 'T(n), tokens to convergence: one size'),
    ('best_size', sizes > 2, 'n(C), the best size for a budget: fewer than three sizes'),
    (
      'learning_rate',
      _several(data.rates, 'learning_rate'),
      'lr(n), the best learning rate: one rate a size',
    ),
    ('tokens', _several_budgets(data.best), 'L(n,T), latents against tokens: one token budget a size'),
    ('family', subjects > 1, 'L_s(n), several subjects: one subject'),
  )
  if data.points.empty:
    return set(), []
  return {name for name, on, _ in conditions if on}, [text for _, on, text in conditions if not on]


def _several(cells: pd.DataFrame, column: str) -> bool:
  """Whether some size was trained with more than one value of the column."""
  return bool((cells.groupby(['n_latents', *sparsity.TARGETS], dropna=False)[column].nunique() > 1).any())


def _several_budgets(cells: pd.DataFrame) -> bool:
  """Whether some size was trained on several numbers of tokens, and not just until its seeds converged."""
  return _several(cells.assign(tokens=setting.longest_run(cells)), 'tokens')


def _choose_subject(
  points: pd.DataFrame, wanted: str | None
) -> tuple[Callable[[pd.DataFrame], pd.DataFrame], list[dict[str, str]]]:
  """What keeps the rows of one subject, and a warning when there are others."""
  counts = points['subject'].astype(str).value_counts() if 'subject' in points else pd.Series(dtype=int)
  names = sorted(counts.index)
  if wanted is not None and wanted not in names:
    raise UserError(f'no finished cell of subject {wanted[:40]!r}; the ledger has {", ".join(names)[:200] or "none"}')
  if len(names) < 2:
    return lambda frame: frame, []
  chosen = wanted or min(names, key=lambda name: (-counts[name], name))
  text = (
    f'cells of {len(names)} subjects are in one ledger; laws but L_s(n) are of the {counts[chosen]} of {chosen[:40]!r} alone; '
    '--subject chooses another'
  )
  return lambda frame: frame[frame['subject'].astype(str) == chosen], [table.warning('several_subjects', text)]


def _mixed_settings(points: pd.DataFrame) -> list[dict[str, str]]:
  columns = ('d_model', 'batch_tokens', 'tokens', 'source', 'site', 'text')
  mixed = [c for c in columns if c in points and points[c].nunique(dropna=False) > 1]
  if not mixed:
    return []
  text = f'cells with different {", ".join(mixed)} are in one ledger; laws over n and k ignore that'
  return [table.warning('mixed_settings', text)]


def _unequal_sparsity(points: pd.DataFrame, target: dict[str, float]) -> list[dict[str, str]]:
  """A warning where the cells of one target do not have one L0: a coefficient decides none, and steering may miss it."""
  low, high = points['l0'].min(), points['l0'].max()
  if not high > sparsity.ALIKE * low:
    return []
  text = (
    f'at {sparsity.said(target)} L0 runs from {low:.3g} to {high:.3g}: a law over n there is of autoencoders of unequal '
    'sparsity; one over n_latents and l0 compares them at equal L0'
  )
  return [table.warning('unequal_sparsity', text)]


def _largest(points: pd.DataFrame) -> str | None:
  sizes = sorted(points['n_latents'].unique())
  return f'n_latents>{sizes[-2]:g}' if len(sizes) > 1 else None
