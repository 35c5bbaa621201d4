"""ScalingRecipe: one named rule from a size (n, k, d, tokens) to every hyperparameter."""

import dataclasses
import math
from typing import Any

from sae_jax.errors import UserError
from sae_jax.schema import added


@dataclasses.dataclass(frozen=True)
class ScalingRecipe:
  """The rules of Gao et al. 2024 (sections 2.4, 3, A), with horizons tied to the length of the run, or to the steps so far.

  A horizon tied to the length makes every budget a curve of its own: a long run is worse in its middle than a short run
  at its end. Tied to the steps so far, the curve of a long run passes through the ends of all shorter ones that have the
  whole start-up sample, of 32,768 tokens.

  The paper's EMA horizon (1,000 steps) and dead-latent threshold (10 million tokens) are caps here: in a run of
  a few hundred steps the first makes the averaged weights far worse than the raw ones (measured: NMSE .653
  against .454 for n=4096, k=8, 240 steps) and the second never triggers AuxK.
  """

  name: str
  learning_rate_at_16k: float  # c in c / (n / 2^14)^e, with e = learning_rate_exponent
  ema_fraction: float  # EMA horizon as a fraction of the run's steps
  ema_max_steps: int  # the paper's 1,000: decay 0.999
  dead_fraction: float  # a latent is dead after this fraction of the run's tokens without firing
  dead_max_tokens: int  # the paper's 10 million
  warmup_fraction: float  # linear learning-rate warm-up; the paper uses none
  horizon: str = added('budget')  # of which the fractions are: 'budget', or 'so far'
  steer_start: float = added(0.05)  # coefficient at the first step where one is steered, in units of the NMSE
  learning_rate_exponent: float = added(0.5)  # the paper's square root

  def hyperparameters(self, *, n_latents: int, d_model: int, tokens: int, batch_tokens: int) -> dict[str, Any]:
    """Flat config keys and values for one size with `n_latents` >= 1; what else is out of range `cell` refuses later."""
    steps = max(1, tokens // max(1, batch_tokens))
    horizon = min(self.ema_max_steps, max(1.0, self.ema_fraction * steps))
    so_far = self.horizon == 'so far'
    if not -4 <= self.learning_rate_exponent <= 4:
      raise UserError(
        f'recipe.learning_rate_exponent={self.learning_rate_exponent} is not between -4 and 4; the paper has .5'
      )
    if not so_far and self.horizon != 'budget':
      raise UserError(f"recipe.horizon={self.horizon!r} is not known; use 'budget' or 'so far'")
    if so_far and self.warmup_fraction:
      raise UserError(
        f"recipe.warmup_fraction={self.warmup_fraction} is a share of the budget, and recipe.horizon='so far' wants none "
        'of it; set it to 0'
      )
    return {
      'sae.k_aux': min(n_latents, 2 ** round(math.log2(max(2, d_model) / 2))),
      # 1e-3 for inputs of standard deviation 1 (the reference code), rescaled to inputs of norm 1.
      'sae.fired_threshold': 1e-3 / math.sqrt(max(1, d_model - 1)),
      'optim.learning_rate': self.learning_rate_at_16k
      / math.sqrt(n_latents / 2**14) ** (2 * self.learning_rate_exponent),
      'optim.ema_decay': 0.0 if so_far else 1 - 1 / horizon,
      'optim.ema_width': self.ema_fraction if so_far else 0.0,
      'optim.warmup_tokens': int(self.warmup_fraction * tokens),
      'loss.steer_start': self.steer_start,
      'loss.dead_share': self.dead_fraction if so_far else 0.0,
      'loss.dead_tokens': self.dead_max_tokens
      if so_far
      else min(self.dead_max_tokens, max(batch_tokens, int(self.dead_fraction * tokens))),
    }


GAO2024 = ScalingRecipe(
  name='gao2024',
  learning_rate_at_16k=2e-4,
  ema_fraction=0.1,
  ema_max_steps=1000,
  dead_fraction=0.1,
  dead_max_tokens=10_000_000,
  warmup_fraction=0.0,
)

ONE_CURVE = dataclasses.replace(GAO2024, name='one_curve', horizon='so far')

# A recipe a family, named after it, for SmolLM2-135M at layer 12 and runs of some 1,000 steps of 512 tokens. Learning rates
# are from sweeps/grids/activations_learning_rate.py, in factors of two; the losses are in LOG.md.

TOPK = dataclasses.replace(ONE_CURVE, name='topk', learning_rate_at_16k=1e-3)
"""Half the rate is a little worse. At twice the rate the first steps leave much of a small autoencoder dead."""

BATCHTOPK = dataclasses.replace(TOPK, name='batchtopk')
"""As TopK."""

GATED = dataclasses.replace(TOPK, name='gated')
"""As TopK. At twice the rate a small one is all dead for hundreds of steps, and steering comes too late."""

JUMPRELU_STEP = dataclasses.replace(TOPK, name='jumprelu_step', steer_start=0.005)
"""The rate of TopK. Its penalty is a count, so its coefficient ends near -d NMSE / d L0, a tenth and less of where others end.
Steered from .05 it swings far below its target; from here it settles. The bandwidth is the default, .02.
"""

PROLU_RELU = dataclasses.replace(TOPK, name='prolu_relu', learning_rate_at_16k=2e-3, learning_rate_exponent=0.0)
"""One rate for all sizes. At a higher one the biases of small autoencoders fall until only a few latents are active, without any
penalty, so that no coefficient reaches the target. At a lower one large autoencoders are far from their end.
"""

RELU = dataclasses.replace(TOPK, name='relu')
"""As TopK. With and without AuxK the loss is the same, since hardly a latent dies."""
