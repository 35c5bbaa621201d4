# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # Plan the next sweep
#
# What would larger autoencoders reach, what would they cost, and which cells would teach most? Reads a ledger (that of
# `make demo`, or `SAE_LEDGER`) and trains nothing. It plans for the family with most cells, or `SAE_FAMILY`.

# %%
# %matplotlib inline
import os

import numpy as np
import pandas as pd

import analysis
from analysis import allocation, convergence, learning_rate, predict
from sae_jax.errors import UserError

LEDGER = os.environ.get('SAE_LEDGER', 'runs/demo/ledger')
BOOTSTRAP = int(os.environ.get('SAE_BOOTSTRAP', '300'))
cells = analysis.load_ledger(LEDGER)
curves = analysis.load_curves(LEDGER)
family = os.environ.get('SAE_FAMILY', cells['activation'].mode()[0])
cells, curves = cells[cells['activation'] == family], curves[curves['activation'] == family]
asked = 'k' if cells['k'].notna().all() else 'sparsity'
best = analysis.best_learning_rate(cells)

# %% [markdown]
# ## Larger sizes at the same tokens
#
# `width` is that of the 90 % interval, relative. Where it grows fast, the law is no longer a prediction.

# %%
rows = []
for factor in (2, 4, 8):
  for value in np.sort(best[asked].unique()):
    at = {'n_latents': int(factor * best['n_latents'].max()), asked: value, 'activation': family}
    p = predict.predict(LEDGER, at, bootstrap=BOOTSTRAP)
    rows.append(
      at
      | {
        'nmse': p.nmse,
        'low': p.low,
        'high': p.high,
        'width': np.log(p.high / p.low),
        'flops_useful': p.flops_useful,
        'decades': p.beyond['n_latents'],
      }
    )
plan = pd.DataFrame(rows)
print(plan.to_string(index=False, float_format='{:.4g}'.format))
print('held out:', p.fit.holdout_text() or 'nothing')

# %% [markdown]
# ## More tokens or more latents?
#
# A law over n and T through the curves of one k or coefficient, then the split of a budget in closed form. Points of one
# run are not independent, so runs are resampled, not points. The first tenth of every run is left out.

# %%
mine = curves[(curves[asked] == best[asked].max()) & curves['id'].isin(best['id']) & np.isfinite(curves['nmse'])]
late = mine[mine['tokens'] > 0.1 * mine.groupby('id')['tokens'].transform('max')].reset_index(drop=True)
splits = []
try:
  both = analysis.fit_law(late, 'additive2', ['n_latents', 'tokens'], bootstrap=BOOTSTRAP, group='id')
  print(both.summary())
  per_latent = 2.0 * best['d_model'].iloc[0]  # useful FLOPs: one encoder pass, n much larger than k
  splits = [allocation.allocate(both, c, per_latent) for c in mine['flops_useful'].max() * np.array([1, 3, 10, 30])]
  for split in splits:
    print(
      f'C = {split.flops:.2g}: n = {split.n_latents[0]:.4g}, T = {split.tokens[0]:.3g}, NMSE {split.loss[0]:.4f}; '
      f'n grows as C^{split.exponent_n[0]:.2f} ({split.exponent_n[1]:.2f} to {split.exponent_n[2]:.2f})'
    )
except UserError as error:
  print('no allocation:', error)
analysis.plots.allocation(both, per_latent) if splits else None

# %% [markdown]
# ## What to change in the next sweep
#
# The weak points of this ledger, each with its remedy.

# %%
advice = convergence.unconverged_warnings(curves, best['id']) + convergence.risen_warnings(best)
advice += p.fit.warnings
valleys = learning_rate.valleys(cells)
for verdict, rows in valleys[valleys['verdict'] != 'minimum'].groupby('verdict'):
  advice.append(
    {
      'code': verdict,
      'message': f'learning rate at {len(rows)} of {len(valleys)} sizes: {rows["reason"].iloc[0]}',
    }
  )
for item in advice:
  print(f'- {item["code"]}: {item["message"]}')
