"""Activation functions on SmolLM2-135M, layer 12: six families x three sizes x four sparsities, each with its own recipe.

RUNS=DIR make activations-runs
python -m sweeps.launch --sweep=sweeps/grids/activations.py --ledger=runs/activations/ledger --executor=local
108 cells, about three hours on two quiet cores.

TopK and ReLU, the two ends of the comparison, have two sizes more, and a second seed that shows the noise. Families with a
penalty have one cell more at four times the tokens, because their L0 settles late.
"""

import dataclasses

from experiments import activations
from sae_jax import recipe
from sweeps import grid

EXPERIMENT = activations
PENALISED = [recipe.GATED, recipe.JUMPRELU_STEP, recipe.PROLU_RELU, recipe.RELU]


def _with(recipes: list[recipe.ScalingRecipe]) -> list[grid.Overrides]:
  """Each family, which its recipe is named after, with what its recipe has of its own."""
  usual = dataclasses.asdict(recipe.TOPK)
  return [
    {'sae.activation': one.name}
    | {f'recipe.{key}': value for key, value in dataclasses.asdict(one).items() if value != usual[key]}
    for one in recipes
  ]


def sweep() -> list[grid.Overrides]:
  sparsities = grid.param('sae.k', [8, 16, 32, 64])
  families, ends = _with([recipe.TOPK, recipe.BATCHTOPK, *PENALISED]), _with([recipe.TOPK, recipe.RELU])
  longer = {'sae.n_latents': 1024, 'sae.k': 32, 'data.epochs': 4, 'train.tokens': 4 * 520_192}
  return grid.chain(
    grid.product(grid.param('sae.n_latents', [256, 1024]), sparsities, families),
    grid.product(grid.param('sae.n_latents', [256, 1024]), sparsities, ends, [{'train.seed': 1}]),
    grid.product(grid.param('sae.n_latents', [512, 2048]), sparsities, ends),
    grid.product(grid.param('sae.n_latents', [4096]), sparsities, families),
    grid.product(_with(PENALISED), [longer]),
  )
