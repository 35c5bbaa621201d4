# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Fit the laws to a ledger
#
# A sweep leaves a ledger: one folder a cell, with its configuration, its curve and its result. This notebook reads one
# and fits what it can carry. It runs as it is on the ledger of `make demo`; set `SAE_LEDGER` for another.

# %%
# %matplotlib inline
import os

import numpy as np

import analysis
from analysis import convergence, frontier, isoflop, learning_rate, predict
from sae_jax.errors import UserError

LEDGER = os.environ.get('SAE_LEDGER', 'runs/demo/ledger')
BOOTSTRAP = int(os.environ.get('SAE_BOOTSTRAP', '500'))

# %% [markdown]
# ## The cells
#
# One row a finished cell. What is not finished is listed, never filled in. A law is of one family of autoencoders: here of
# the one with most cells, or of `SAE_FAMILY`. What sparsity was asked for is k or the coefficient of a penalty. A law
# over n and the sparsity takes k or, where there is none, the measured L0.

# %%
table = analysis.load_ledger(LEDGER)
curves = analysis.load_curves(LEDGER)
print(f'{len(table)} finished cells; not finished: {table.attrs["not_done"] or "none"}')
family = os.environ.get('SAE_FAMILY', table['activation'].mode()[0])
table, curves = table[table['activation'] == family], curves[curves['activation'] == family]
asked, sparse = ('k', 'k') if table['k'].notna().all() else ('sparsity', 'l0')
print(family)
print(table.pivot_table('nmse', 'n_latents', asked).round(4))

# %% [markdown]
# ## The joint law
#
# Of every size only the best learning rate is fitted. The largest n is predicted from the others, which is the error to
# expect one size further on. Read the warnings before the constants.

# %%
best = analysis.best_learning_rate(table)
sizes = np.sort(best['n_latents'].unique())
joint = analysis.fit_law(best, 'joint_nk', ['n_latents', sparse], bootstrap=BOOTSTRAP, holdout=f'n_latents>{sizes[-2]}')
print(joint.summary())
for warning in joint.warnings:
  print('warning:', warning['message'])
analysis.plots.joint(joint)

# %%
analysis.plots.residuals(joint)

# %% [markdown]
# The exponent of n at a given k, or L0, is `beta_n + gamma ln k`, not `beta_n`: that one is for k = 1.

# %%
for value, level in best.groupby(asked)[sparse].mean().items():
  exponent = joint.params['beta_n']['estimate'] + joint.params['gamma']['estimate'] * np.log(level)
  print(f'{asked} = {value:g}: the reducible loss falls as n^{exponent:.3f}')

# %% [markdown]
# ## Is this at convergence?
#
# A run has converged where a doubling of its tokens improves NMSE by less than 1 %. Runs that never do are named. If most
# do not, the law above is one of this training budget.

# %%
for warning in convergence.risen_warnings(best) + convergence.unconverged_warnings(curves, best['id']):
  print('warning:', warning['message'])
growth = None
try:
  growth = convergence.fit_convergence(curves[curves['id'].isin(best['id'])], bootstrap=BOOTSTRAP)
  print(growth.summary())
except UserError as error:
  print('tokens to convergence:', error)
growth and analysis.plots.growth(growth)

# %% [markdown]
# ## Loss against compute, at one target
#
# A larger k lowers every loss, so runs of one k are compared, or of one coefficient.

# %%
value = best[asked].max()
mine = curves[curves[asked] == value]
envelope = None
try:
  envelope = frontier.fit_frontier(mine, bootstrap=BOOTSTRAP)
  print(envelope.summary())
except UserError as error:
  print('L(C):', error)
envelope and analysis.plots.frontier(envelope, mine[mine['state'] == 'done'])

# %% [markdown]
# ## The best size for a budget
#
# At equal compute, loss over size is a valley: small autoencoders stop learning, large ones have not begun. A best value
# at the edge of those tried is no minimum and is refused; the figure says which and why.

# %%
runs = mine[mine['id'].isin(best['id'])]
budgets = isoflop.budgets(runs).tolist()
measured, profiles = isoflop.profiles(runs, budgets)
print(profiles[['budget', 'sizes', 'n_latents', 'verdict', 'reason']].to_string(index=False))
analysis.plots.isoflop(measured, profiles, {asked: value}) if budgets else None

# %%
best_size = None
try:
  best_size = isoflop.fit_best_size(runs, budgets, bootstrap=BOOTSTRAP)
  print(best_size.summary())
except UserError as error:
  print('best size:', error)
refused = profiles.loc[profiles['verdict'] != 'minimum', 'budget'].tolist()
best_size and analysis.plots.growth(best_size, refused)

# %% [markdown]
# ## The best learning rate for a size
#
# The same valleys over learning rates, where the sweep tried several.

# %%
cells = table[table[asked] == value]
valleys = learning_rate.valleys(cells)
tried = valleys[valleys['rates'] > 1]
print(tried[['n_latents', asked, 'rates', 'learning_rate', 'verdict', 'reason']].to_string(index=False))
rate = None
if len(tried):
  try:
    rate = learning_rate.fit_learning_rate(cells, bootstrap=BOOTSTRAP)
    print(rate.summary())
  except UserError as error:
    print('best learning rate:', error)
analysis.plots.learning_rates(cells, rate) if len(tried) else print('one learning rate a size')

# %% [markdown]
# ## One size further
#
# The interval is of one new cell trained like these. It holds noise and the law's uncertainty, not the law being wrong
# there: that is what the held-out error is for. The same from a shell:
# `python -m analysis.predict --ledger=DIR --at "n_latents=8192,k=32"`

# %%
at = {'n_latents': 2 * sizes[-1], asked: value, 'activation': family}
found = predict.predict(LEDGER, at, bootstrap=BOOTSTRAP)
print(found.summary())
for warning in found.warnings:
  print('warning:', warning['message'])
