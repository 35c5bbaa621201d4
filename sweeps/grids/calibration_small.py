"""The cells that predictions are made from: four small sizes x four sparsities.

python -m sweeps.launch --sweep=sweeps/grids/calibration_small.py --ledger=runs/calibration/small --executor=local
"""

from experiments import calibration
from sweeps import grid

EXPERIMENT = calibration


def sweep() -> list[grid.Overrides]:
  return grid.product(grid.param('sae.n_latents', [128, 256, 512, 1024]), grid.param('sae.k', [8, 16, 32, 64]))
