"""Six planted cells, n x k, in seconds on one CPU: for tests and first tries.

python -m sweeps.launch --sweep=sweeps/grids/tiny.py --ledger=runs/tiny --executor=local
"""

from experiments import tiny
from sweeps import grid

EXPERIMENT = tiny


def sweep() -> list[grid.Overrides]:
  return grid.product(grid.param('sae.n_latents', [64, 128, 256]), grid.param('sae.k', [4, 8]))
