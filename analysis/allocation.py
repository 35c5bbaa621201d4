"""How to split a compute budget between latents and tokens, from a fit of L = e + a n^-alpha + b T^-beta.

With C = c n T the least loss has, in closed form, n = G (C/c)^(beta/(alpha+beta)) and T = (C/c)^(alpha/(alpha+beta)) / G,
where G = (alpha a / (beta b))^(1/(alpha+beta)).
"""

import dataclasses

import numpy as np

from analysis.fit_result import Fit, fits_of
from analysis.fitting import uncertainty
from analysis.law import Array
from sae_jax import checks
from sae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Allocation:
  """The best split of one budget; (estimate, low, high) with the 90 % interval of the fit's resamples, else NaN."""

  flops: float
  n_latents: tuple[float, float, float]
  tokens: tuple[float, float, float]
  loss: tuple[float, float, float]
  exponent_n: tuple[float, float, float]  # n_opt ~ C^this
  exponent_tokens: tuple[float, float, float]


def allocate(fit: Fit, flops: float, flops_per_latent_token: float) -> Allocation:
  """The least loss for a budget.

  Args:
    fit: of additive2 over (n_latents, tokens).
    flops: the budget.
    flops_per_latent_token: c: 2 d_model in useful FLOPs when n is much larger than k, 12 d_model in dense FLOPs.

  Raises:
    UserError: another law, exponents that are not positive (more would be worse), or a budget that is not.
  """
  (fit,) = fits_of(fit)
  if fit.law.name != 'additive2' or fit.x != ('n_latents', 'tokens'):
    raise UserError(f'an allocation needs additive2 over n_latents, tokens, not {fit.law.name} over {", ".join(fit.x)}')
  for name, value in (('flops', flops), ('flops_per_latent_token', flops_per_latent_token)):
    checks.positive(name, value, 'give FLOPs')
  for name in ('alpha', 'beta'):
    if not fit.params[name]['estimate'] > 0:
      raise UserError(
        f'{name}={fit.params[name]["estimate"]:.3g} is not positive: no split is best; add sizes or budgets'
      )
  product = flops / flops_per_latent_token
  rows_5M = _split(fit, np.concatenate([fit.theta_P[None], fit.draws_BP]), product)
  ends_5M = rows_5M[:, 1:][:, np.isfinite(rows_5M[:, 1:]).all(axis=0)]  # resamples without a best split say nothing
  if ends_5M.shape[1]:
    low_5, high_5 = np.quantile(ends_5M, uncertainty.TAILS, axis=1)
  else:
    low_5 = high_5 = np.full(5, np.nan)
  found = [(float(e), float(low), float(high)) for e, low, high in zip(rows_5M[:, 0], low_5, high_5, strict=True)]
  return Allocation(flops, *found)


def _split(fit: Fit, theta_MP: Array, product: float) -> Array:
  """n, T, loss and the two exponents: [5, M], NaN where an exponent is not positive."""
  column = dict(zip(fit.law.names, theta_MP.T, strict=True))
  alpha, beta = (np.where(column[name] < 0, -column[name], np.nan) for name in ('alpha', 'beta'))
  log_g = (np.log(alpha) + column['a'] - np.log(beta) - column['b']) / (alpha + beta)
  share = beta / (alpha + beta)
  log_n = log_g + share * np.log(product)
  log_t = np.log(product) - log_n
  loss = np.exp(column['e']) + np.exp(column['a'] - alpha * log_n) + np.exp(column['b'] - beta * log_t)
  return np.stack([np.exp(log_n), np.exp(log_t), loss, share, 1 - share])
