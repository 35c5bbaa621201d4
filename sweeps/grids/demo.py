"""The demo's grid: five sizes x four sparsities on SmolLM2-135M, layer 12.

python -m sweeps.launch --sweep=sweeps/grids/demo.py --ledger=runs/demo/ledger --executor=local
"""

from experiments import demo
from sweeps import grid

EXPERIMENT = demo


def sweep() -> list[grid.Overrides]:
  return grid.product(grid.param('sae.n_latents', [256, 512, 1024, 2048, 4096]), grid.param('sae.k', [8, 16, 32, 64]))
