"""Learning rate of each family: c in c / sqrt(n / 2^14), at two sizes, each steered to 32 active latents a token.

python -m sweeps.launch --sweep=sweeps/grids/activations_learning_rate.py --ledger=runs/activations/learning_rate
46 cells on the store of `make demo`, three quarters of an hour on two quiet cores. The recipes in sae_jax/recipe.py follow it.

NMSE and, where it is far from 32, the L0 that came of it (2026-11-29):
  n=256          c = 2.5e-4      5e-4         1e-3             2e-3
  topk                          .251         .247             .347 (41 % dead)
  batchtopk                     .236         .233             .286 (25 % dead)
  gated                         .247         .242             .254 at 101
  relu                          .288         .284             .291 at 38
  jumprelu_step                 .239         .229             .276 (25 % dead)
  prolu_relu     .294 at 20     .348 at 10   .431 at 3        .666 at 1; .283 at 27 for 1.25e-4, .312 at 30 for 6.25e-5
  n=2,048
  gated                         .207 at 35   .193 at 34       .231 at 38 (53 % dead)
  relu                          .246         .229             .239 (52 % dead)
  jumprelu_step                 .204 at 28   .203 at 20       .196 at 26 (25 % dead)
  prolu_relu     .248           .209 at 29   .208 at 23       .293 (79 % dead)

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
