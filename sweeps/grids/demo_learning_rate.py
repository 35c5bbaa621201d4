"""The valley behind the demo's learning rate: c in c / sqrt(n / 2^14), at three sizes and the two extreme k.

python -m sweeps.launch --sweep=sweeps/grids/demo_learning_rate.py --ledger=runs/demo/learning_rate --executor=local
"""

from experiments import demo
from sweeps import grid

EXPERIMENT = demo


def sweep() -> list[grid.Overrides]:
  return grid.product(
    grid.param('recipe.learning_rate_at_16k', [5e-4, 1e-3, 2e-3]),
    grid.param('sae.n_latents', [256, 1024, 4096]),
    grid.param('sae.k', [8, 64]),
  )
