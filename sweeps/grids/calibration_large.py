"""The cells that are predicted before they are trained: one, two and three doublings beyond the small ones.

python -m sweeps.launch --sweep=sweeps/grids/calibration_large.py --ledger=runs/calibration/large --executor=local
"""

from experiments import calibration
from sweeps import grid

EXPERIMENT = calibration


def sweep() -> list[grid.Overrides]:
  return grid.product(grid.param('sae.n_latents', [2048, 4096, 8192]), grid.param('sae.k', [8, 16, 32, 64]))
