"""How every public name is called, and what every parameter must refuse: what `test_surface` walks over."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

import analysis
import sae_jax
from analysis import family, frontier, isoflop
from tests import test_artifact

N = np.array([100, 200, 400, 800, 1600, 3200])
TIMES = np.geomspace(1e3, 1e7, 12)


@dataclasses.dataclass(frozen=True)
class Table:
  """A good table, and the columns of numbers that a function reads; of some, NaN says that nothing was measured."""

  frame: pd.DataFrame
  reads: tuple[str, ...]
  missing: bool = False

  def broken(self) -> list[Any]:
    """The table without a column or with what is no number in one, or something else in its place."""
    out: list[Any] = ['text', b'x', 3, [], {}, np.zeros((3, 3)), pd.DataFrame(), self.frame.iloc[:0]]
    for column in self.reads:
      out += [
        self.frame.drop(columns=column),
        pd.concat([self.frame, self.frame[[column]]], axis=1),
        self.frame.assign(**{column: 'many'}),
        self.frame.assign(**{column: self.frame[column] * 1j}),
        self.frame.assign(**{column: pd.Timestamp('2024-01-01')}),
        self.frame.assign(**{column: np.where(np.arange(len(self.frame)) == 1, np.inf, self.frame[column])}),
      ]
      if not self.missing:
        out.append(self.frame.assign(**{column: np.where(np.arange(len(self.frame)) == 1, np.nan, self.frame[column])}))
    return out


def runs():
  """Curves of L = 0.1 + 4 n^-0.5 + (b / T)^0.5, which have a valley over n at equal n T."""
  frames = [
    pd.DataFrame(
      {
        'id': f'n{n}',
        'state': 'done',
        'n_latents': n,
        'k': 5,
        'tokens': TIMES,
        'flops_useful': n * TIMES,
        'nmse': 0.1 + 4 * n**-0.5 + (3e5 / TIMES) ** 0.5,
      }
    )
    for n in N.tolist()
  ]
  return pd.concat(frames, ignore_index=True)


def cells():
  """Six sizes at three k, the middle one of three learning rates best."""
  rows = [
    {
      'id': f'{n}-{k}-{rate}',
      'n_latents': n,
      'k': k,
      'learning_rate': rate,
      'subject': f'm{k}',
      'tokens': 100 * n,
      'nmse': (0.1 + 4 * n**-0.5) * k**-0.1 * (1 + 0.1 * np.log(rate / 1e-3) ** 2),
    }
    for n in N.tolist()
    for k in (3, 7, 17)
    for rate in (3e-4, 1e-3, 3e-3)
  ]
  return pd.DataFrame(rows)


CELLS, RUNS = cells(), runs()
BEST = CELLS[CELLS['learning_rate'] == 1e-3]
CURVES = Table(RUNS, ('n_latents', 'flops_useful', 'nmse'), missing=True)
PREDICTIONS = pd.DataFrame(
  {
    'n_latents': [128, 256],
    'k': [3, 3],
    'predicted': [0.3, 0.25],
    'low': [0.28, 0.24],
    'high': [0.32, 0.26],
    'measured': [0.31, 0.25],
  }
)
fit = functools.partial(analysis.fit_law, bootstrap=0)


@functools.cache
def power():
  return fit(BEST[BEST['k'] == 3], 'power')


@functools.cache
def joint():
  return fit(BEST, 'joint_nk_no_floor')


@functools.cache
def tokens():
  late = RUNS[RUNS['tokens'] > 3e4]
  return fit(late, 'additive2', ['n_latents', 'tokens'], group='id')


@functools.cache
def budgets():
  return isoflop.budgets(RUNS).tolist()


@functools.cache
def profiles():
  return isoflop.profiles(RUNS, budgets())


AT = {'n_latents': 8192, 'k': 3}
X_BD = np.ones((3, test_artifact.D), np.float32)
Z_BK, IDX_BK = np.ones((3, 2), np.float32), np.zeros((3, 2), np.int32)


def autoencoder():
  return test_artifact.autoencoder('center_unit')


# How each name is called; `LEDGER` stands for the path of one. Left out is what has a default and is checked elsewhere.
LEDGER = object()
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
  'sae_jax.load': lambda: {'cell': LEDGER, 'weights': 'ema'},
  'sae_jax.Threshold': lambda: {'value': 0.5},
  'sae_jax.TopK': lambda: {'k': 3},
  'Autoencoder.encode': lambda: {'self': autoencoder(), 'x': X_BD, 'activation': None},
  'Autoencoder.reconstruct': lambda: {'self': autoencoder(), 'x': X_BD, 'activation': None},
  'Autoencoder.threshold_for': lambda: {'self': autoencoder(), 'x': X_BD, 'l0': 2},
  'Autoencoder.refine': lambda: {'self': autoencoder(), 'x': X_BD, 'z': Z_BK, 'idx': IDX_BK, 'steps': 3},
  'Autoencoder.decode': lambda: {'self': autoencoder(), 'z': Z_BK, 'idx': IDX_BK},
  'SAE.encode': lambda: {'self': autoencoder().sae, 'x': X_BD, 'activation': None},
  'SAE.decode': lambda: {'self': autoencoder().sae, 'z': Z_BK, 'idx': IDX_BK},
  'Fit.predict': lambda: {'self': joint(), 'at': AT},
  'Fit.band': lambda: {'self': joint(), 'at': AT},
  'Fit.interval': lambda: {'self': joint(), 'at': AT},
  'Fit.logs': lambda: {'self': joint(), 'at': AT},
  'analysis.analyse': lambda: {'ledger': LEDGER, 'bootstrap': 0, 'subject': None},
  'analysis.best_learning_rate': lambda: {'table': Table(CELLS, ('n_latents', 'k', 'learning_rate', 'nmse'))},
  'analysis.fit_law': lambda: {
    'points': Table(BEST, ('n_latents', 'k', 'nmse')),
    'law': 'joint_nk_no_floor',
    'x': ['n_latents', 'k'],
    'y': 'nmse',
    'objective': 'logls',
    'delta': 1e-3,
    'bootstrap': 0,
    'holdout': 'n_latents>1600',
    'group': None,
    'seed': 0,
  },
  'analysis.fit_by': lambda: {
    'points': Table(BEST, ('n_latents', 'nmse')),
    'by': 'subject',
    'law': 'power_no_floor',
    'x': ['n_latents'],
    'y': 'nmse',
    'objective': 'logls',
    'delta': 1e-3,
    'bootstrap': 0,
    'holdout': 'n_latents>1600',
    'group': None,
    'seed': 0,
  },
  'analysis.load_curves': lambda: {'path': LEDGER, 'cells': None},
  'analysis.load_ledger': lambda: {'path': LEDGER, 'cells': None},
  'analysis.read_csv': lambda: {
    'path': 'nowhere.csv',
    'sep': ',',
    'decimal': '.',
    'thousands': '',
    'encoding': 'utf-8',
  },
  'allocation.allocate': lambda: {'fit': tokens(), 'flops': 1e12, 'flops_per_latent_token': 26.0},
  'compare.Comparison': lambda: {'floored': power(), 'plain': fit(power().table, 'power_no_floor')},
  'convergence.tokens_to_convergence': lambda: {
    'curves': Table(RUNS, ('n_latents', 'k', 'tokens', 'nmse'), missing=True),
    'eps': 0.01,
  },
  'convergence.fit_convergence': lambda: {
    'curves': Table(RUNS, ('n_latents', 'k', 'tokens', 'nmse'), missing=True),
    'eps': 0.2,
    'bootstrap': 0,
  },
  'convergence.unconverged_warnings': lambda: {
    'curves': Table(RUNS, ('n_latents', 'k', 'tokens', 'nmse'), missing=True),
    'ids': RUNS['id'],
    'eps': 0.01,
    'named': False,
  },
  'convergence.risen_cells': lambda: {'best': Table(BEST, ('n_latents', 'k', 'nmse'))},
  'convergence.risen_warnings': lambda: {'best': Table(BEST, ('n_latents', 'k', 'nmse'))},
  'family.fit_family': lambda: {
    'points': Table(BEST, ('n_latents', 'nmse')),
    'by': 'subject',
    'x': 'n_latents',
    'y': 'nmse',
    'floor': False,
    'seed': 0,
  },
  'frontier.envelope': lambda: {'curves': CURVES, 'x': 'flops_useful', 'y': 'nmse', 'burn_in': 0.05},
  'frontier.fit_frontier': lambda: {
    'curves': CURVES,
    'x': 'flops_useful',
    'y': 'nmse',
    'law': 'power',
    'bootstrap': 0,
    'holdout': None,
    'burn_in': 0.05,
    'seed': 0,
  },
  'isoflop.profiles': lambda: {'curves': CURVES, 'budgets': budgets(), 'x': 'flops_useful', 'y': 'nmse', 'flat': 0.003},
  'isoflop.fit_best_size': lambda: {
    'curves': CURVES,
    'budgets': budgets(),
    'x': 'flops_useful',
    'y': 'nmse',
    'flat': 0.003,
    'bootstrap': 2,
    'seed': 0,
  },
  'learning_rate.valleys': lambda: {'cells': Table(CELLS, ('n_latents', 'k', 'learning_rate', 'nmse')), 'flat': 0.003},
  'learning_rate.fit_learning_rate': lambda: {
    'cells': Table(CELLS, ('n_latents', 'k', 'learning_rate', 'nmse')),
    'flat': 0.003,
    'bootstrap': 0,
  },
  'plots.allocation': lambda: {'fit': tokens(), 'flops_per_latent_token': 26.0},
  'plots.calibration': lambda: {'predictions': Table(PREDICTIONS, tuple(PREDICTIONS.columns))},
  'plots.family': lambda: {'found': family.fit_family(BEST), 'codes': ['few_points']},
  'plots.frontier': lambda: {'fits': frontier.fit_frontier(RUNS, bootstrap=0), 'curves': CURVES},
  'plots.growth': lambda: {'fits': power(), 'refused': [50.0]},
  'plots.isoflop': lambda: {
    'points': Table(profiles()[0], ('budget', 'n_latents', 'nmse')),
    'best': Table(profiles()[1], ('budget', 'n_latents', 'nmse')),
    'where': {'k': 5},
    'codes': ['few_points'],
  },
  'plots.joint': lambda: {'fit': joint()},
  'plots.learning_rates': lambda: {
    'cells': Table(CELLS[CELLS['k'] == 3], ('n_latents', 'k', 'learning_rate', 'nmse')),
    'fit': None,
    'codes': ['few_points'],
    'where': {'k': 3},
  },
  'plots.power': lambda: {'fits': [power()]},
  'plots.residuals': lambda: {'fit': joint()},
  'predict.predict': lambda: {'ledger': LEDGER, 'at': AT, 'bootstrap': 0},
  'predict.interval': lambda: {'fit': joint(), 'at': AT},
  'predict.parse_at': lambda: {'text': 'n_latents=8192,k=32'},
  'isoflop.budgets': lambda: {'curves': Table(RUNS, ('n_latents', 'flops_useful'), missing=True), 'x': 'flops_useful'},
  'table.finished_runs': lambda: {'curves': CURVES, 'x': 'flops_useful', 'y': 'nmse'},
  'table.held_out': lambda: {'table': Table(BEST, ()), 'rule': 'n_latents>1600'},
  'read_ledger.load_cells': lambda: {'path': LEDGER},
  'table.matching': lambda: {'table': Table(BEST, ()), 'rule': 'n_latents>1600'},
  'table.positive': lambda: {'table': Table(BEST, ('n_latents',)), 'columns': ['n_latents']},
  'table.useful': lambda: {'rows': Table(BEST, ())},
  'table.useless_warnings': lambda: {'table': Table(BEST, ())},
  'table.version_warnings': lambda: {'table': Table(BEST, ())},
}

NOT_WHOLE = (-1, 2.5, True, 'many', '', [], None, np.nan, 10**30, 10**5000, np.ones(3))
NOT_POSITIVE = (0, -1.0, True, 'many', '', [], None, np.nan, np.inf, 10**400, 1j)
NO_COLUMN = ('', 'nothing', 3, None, ['nmse'], np.ones(2))
NO_PATH = ('', ' ', 3, None, ['x'], b'x', np.ones(2), 'nowhere/at/all', 'two\nlines')
NO_FIT = ('text', 3, None, [], {}, np.ones(3), pd.DataFrame())
NO_X = (
  X_BD.T,
  X_BD[:, :2],
  np.float32(1),
  X_BD * np.nan,
  X_BD * np.inf,
  X_BD.astype(int),
  X_BD > 0,
  X_BD * 1j,
  'text',
  [],
  None,
  X_BD.astype(str),
  X_BD.astype(object),
  np.full(X_BD.shape, 1e300),
  [[1.0], [1.0, 2.0]],
  {},
  np.ma.masked_array(X_BD, X_BD > 0),
)
NO_PLACE = (
  'text',
  3,
  None,
  [],
  {},
  {'n_latents': 8},
  {'n_latents': 8, 'k': 'many'},
  {'n_latents': 8, 'k': np.nan},
  {'n_latents': 8, 'k': 0},
  {'n_latents': 8, 'k': -3},
  {'n_latents': 8, 'k': np.inf},
  {'n_latents': 8, 'k': True},
  {'n_latents': [8, 9], 'k': [1, 2, 3]},
  {'n_latents': 8, 'k': np.ones((2, 2))},
  {'n_latents': 8, 'k': None},
)
BAD: dict[str, tuple[Any, ...]] = {
  'path': NO_PATH,
  'ledger': NO_PATH,
  'cell': NO_PATH,
  'cells': ('text', 3, [], {}, pd.DataFrame(), BEST),
  'weights': ('', 'best', 3, ['raw'], np.ones(2), b'raw'),
  'x': NO_COLUMN,
  'y': NO_COLUMN,
  'by': NO_COLUMN,
  'floor': (1, 'yes', None, [], np.ones(2)),
  'named': (1, 'yes', None, [], np.ones(2)),
  'analysis.fit_law.x': (
    'n_latents',
    '',
    [],
    ['nothing', 'k'],
    ['n_latents'],
    [3],
    3,
    ['nmse', 'k'],
    ['k', 'k'],
    np.ones(2),
  ),
  'analysis.fit_by.x': ('n_latents', '', [], ['nothing'], ['n_latents', 'k'], [3], 3, ['nmse'], np.ones(2)),
  'sep': ('', 'ab', '7', '#', 3, None, [','], b','),
  'decimal': ('', ';', 3, None, ['.'], b'.'),
  'thousands': ('..', '7', '.', 3, None, [','], b','),
  'encoding': ('', 'klingon', 3, None, ['utf-8'], b'utf-8'),
  'law': ('joint', '', 3, None, ['power'], np.ones(2)),
  'objective': ('least', '', 3, None, ['logls'], np.ones(2)),
  'delta': NOT_POSITIVE,
  'bootstrap': NOT_WHOLE,
  'seed': NOT_WHOLE,
  'holdout': (
    '',
    'n_latents',
    'n_latents>',
    'n_latents>many',
    'nothing>3',
    'id>3',
    'n_latents>1e9',
    'n_latents>0',
    3,
    ['x'],
    np.ones(2),
  ),
  'rule': ('', 'n_latents', 'nothing>3', 'id>3', 3, None, np.ones(2)),
  'group': ('', 'nothing', 3, ['id'], np.ones(2)),
  'subject': ('', 'nobody', 3, ['x'], np.ones(2)),
  'burn_in': (-0.1, 1.0, 2, True, 'many', None, np.nan, [], np.ones(2)),
  'eps': (0, 1, -1, True, 'many', None, np.nan, [], np.ones(2)),
  'flat': (-0.1, True, 'many', None, np.nan, np.inf, [], np.ones(2)),
  'budgets': ('many', 3, None, [0.0], [-1.0], [np.nan], ['many'], [1e9, 1e9], np.ones((2, 2)), [True]),
  'refused': ('many', 3, None, [-1.0], [np.nan], ['many'], np.ones((2, 2))),
  'flops': NOT_POSITIVE,
  'flops_per_latent_token': NOT_POSITIVE,
  'fit': NO_FIT,
  'fits': (*NO_FIT, ['text']),
  'floored': NO_FIT,
  'plain': NO_FIT,
  'found': NO_FIT,
  'codes': ('few_points', 3, None, [3], np.ones(2)),
  'where': ('k', 3, [5], {'k': 'many'}, {'k': np.nan}, {3: 3}, {'activation': 7}),
  'Fit.at': NO_PLACE,
  'predict.interval.at': (*NO_PLACE, {'n_latents': [8, 9], 'k': 3}),
  'predict.predict.at': (
    *NO_PLACE,
    {'n_latents': 8, 'k': 9},
    {'n_latents': 8, 'k': 2.5},
    {'n_latents': 8, 'k': 3, 'tokens': 5},
    {'n_latents': 8, 'k': 3, 'l0': 3},
    {'n_latents': 8, 'l0': 'many'},
    {'n_latents': 8, 'sparsity': 0.0},
    {'n_latents': 8, 'k': 3, 'activation': 'nobody'},
    {'n_latents': 8, 'k': 3, 'activation': 3},
  ),
  'text': (
    '',
    'n_latents',
    'n_latents=8',
    'n_latents=8,k=many',
    'n_latents=8,k=nan',
    'n_latents=8,l0=-1',
    'n_latents=8,k=3,activation=',
    3,
    None,
    [],
    b'x',
  ),
  'ids': ('n100', 3, None, {}),
  'columns': ('n_latents', ['nothing'], [3]),
  'z': (*NO_X[2:6], *NO_X[7:], Z_BK[:, :1], Z_BK[:2]),
  'idx': (
    IDX_BK + 10**6,
    IDX_BK - 1,
    IDX_BK + test_artifact.F,
    IDX_BK[:, :1],
    Z_BK,
    IDX_BK > 0,
    'text',
    None,
    [],
    {},
    np.ones(()),
    IDX_BK.astype(str),
    IDX_BK.astype(object),
    np.full(IDX_BK.shape, 2**40),
  ),
  'activation': ('topk', '', 3, True, [], {}, sae_jax.TopK, sae_jax.TopK(test_artifact.F + 1), np.ones(2)),
  'l0': (*NOT_POSITIVE, test_artifact.F + 1),
  'steps': NOT_WHOLE,
  'sae_jax.TopK.k': (*NOT_WHOLE, 0),
  'value': (-1, -0.1, np.nan, np.inf, 'many', None, True, [], np.ones(2)),
  'Autoencoder.x': NO_X,
  'SAE.x': NO_X,
}
# Fits that a function takes no number from, beside what is no fit at all.
OTHER = {
  'allocation.allocate.fit': power,
  'compare.Comparison.plain': tokens,
  'plots.allocation.fit': power,
  'plots.frontier.fits': lambda: [power(), joint()],
  'plots.growth.fits': joint,
  'plots.joint.fit': power,
  'plots.power.fits': lambda: [power(), joint()],
}
# Whose good call other tests make: they train, fit everything or read what is not there.
SLOW = {'analysis.analyse', 'predict.predict', 'analysis.read_csv', 'sae_jax.load', 'plots.allocation'}
