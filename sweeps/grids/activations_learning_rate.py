"""Learning rate of each family: c in c / sqrt(n / 2^14), at two sizes, each steered to 32 active latents a token.

python -m sweeps.launch --sweep=sweeps/grids/activations_learning_rate.py --ledger=runs/activations/learning_rate
46 cells on the store of `make demo`, three quarters of an hour on two quiet cores. The recipes in sae_jax/recipe.py follow it.

Beside the rates: where the coefficient of JumpReLU starts, its bandwidth, and ReLU without AuxK.
"""

from experiments import demo
from sweeps import grid

EXPERIMENT = demo


def _rates(families: list[str], rates: list[float]) -> list[grid.Overrides]:
  return grid.product(grid.param('sae.activation', families), grid.param('recipe.learning_rate_at_16k', rates))


def sweep() -> list[grid.Overrides]:
  sparse = grid.product(
    _rates(['jumprelu_step'], [5e-4, 1e-3, 2e-3]),
    grid.param('loss.steer_start', [0.005]),
    grid.param('sae.bandwidth', [0.02, 0.05]),
  )
  small = grid.chain(
    sparse,
    _rates(['topk', 'batchtopk', 'gated', 'relu', 'jumprelu_step', 'prolu_relu'], [2.5e-4, 5e-4, 1e-3, 2e-3]),
    _rates(['prolu_relu'], [6.25e-5, 1.25e-4]),
    grid.product(_rates(['relu'], [1e-3]), grid.param('loss.aux_coefficient', [0.0])),
  )
  large = grid.chain(
    _rates(['relu', 'gated'], [1e-3, 5e-4, 2e-3]),
    grid.product(_rates(['jumprelu_step'], [1e-3, 5e-4, 2e-3]), grid.param('loss.steer_start', [0.005])),
    _rates(['prolu_relu'], [1e-3, 2.5e-4, 5e-4, 2e-3]),
  )
  # Two epochs, since steering needs more steps than one has.
  twice = {'recipe.horizon': 'so far', 'sae.n_latents': 256, 'data.epochs': 2, 'train.tokens': 2 * 260_096}
  once = {'recipe.horizon': 'so far', 'sae.n_latents': 2048}
  return grid.chain(grid.product([twice], small), grid.product([once], large))
