"""Tables, laws and figures from a ledger; never imports jax.

In a notebook: `table = analysis.load_ledger(path)`, `fit = analysis.fit_law(table, law='joint_nk')`,
`analysis.plots.joint(fit)`; `analysis.analyse(path)` fits everything. Nothing heavy is imported before it is used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from analysis import plots
  from analysis.every_law import analyse
  from analysis.fit import fit_law
  from analysis.grouped import fit_by
  from analysis.read_ledger import load_curves, load_ledger
  from analysis.table import best_learning_rate, read_csv

__all__ = [
  'analyse',
  'best_learning_rate',
  'fit_by',
  'fit_law',
  'load_curves',
  'load_ledger',
  'plots',
  'read_csv',
]


def __dir__() -> list[str]:
  return list(__all__)  # a notebook completes what is not imported yet, too


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

  def __getattr__(name: str) -> Any:
    # Written out rather than imported by string, so that a search for a name finds its use.
    if name == 'plots':
      import analysis.plots

      return analysis.plots
    if name == 'fit_law':
      from analysis.fit import fit_law

      return fit_law
    if name == 'fit_by':
      from analysis.grouped import fit_by

      return fit_by
    if name == 'analyse':
      from analysis.every_law import analyse

      return analyse
    if name in ('load_ledger', 'load_curves'):
      from analysis import read_ledger

      return getattr(read_ledger, name)
    if name in ('best_learning_rate', 'read_csv'):
      from analysis import table

      return getattr(table, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
