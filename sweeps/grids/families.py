"""Families of autoencoders on a planted dictionary, compared at equal measured L0.

python -m sweeps.launch --sweep=sweeps/grids/families.py --ledger=runs/families --executor=local
python -m analysis.report --ledger=runs/families --out=runs/families/report
44 cells, a quarter of an hour on two cores busy with other work.
"""

from experiments import tiny
from sweeps import grid

EXPERIMENT = tiny


def sweep() -> list[grid.Overrides]:
  families = ['topk', 'multitopk', 'batchtopk', 'matryoshka', 'ksparse', 'relu', 'prolu_relu', 'prolu_ste', 'gated']
  return grid.product(
    grid.param('sae.activation', [*families, 'jumprelu_step', 'jumprelu_tanh']),
    grid.param('sae.n_latents', [64, 128]),
    grid.param('sae.k', [3, 6]),
    grid.param('train.tokens', [256 * 800]),
  )
