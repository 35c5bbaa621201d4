"""A ledger folder of cells whose losses follow a known law, for tests of what reads ledgers."""

from typing import Any

import numpy as np

from sae_jax import config
from sae_jax.cell import log_spaced
from tests import cells

PLOTTED = dict(
  alpha=-0.42271827, beta_k=0.2397685, beta_n=-0.02708159, gamma=-0.03828648, zeta=-1.31862432, eta=-0.0964778
)
SIZES, KS = (1024, 2048, 4096, 8192, 16384, 32768), (3, 7, 17)
D, BATCH, STEPS, PER_DECADE = 13, 11, 512, 9
COEFFICIENTS, WORSE = (0.01, 0.03, 0.1), 1.2  # of a penalised family


def loss(n, k):
  """The joint law of the published figure."""
  p, u, v = PLOTTED, np.log(n), np.log(k)
  reducible = p['alpha'] + p['beta_k'] * v + p['beta_n'] * u + p['gamma'] * u * v
  return np.exp(reducible) + np.exp(p['zeta'] + p['eta'] * v)


def write(path, sizes=SIZES, ks=KS, noise=0.001, rates=(1.0,), converged=True, d_model=D, seed=0):
  """One cell a size, k and learning rate.

  `rates` are multiples of the best learning rate, 0.1 n^-0.5; a cell at another rate is worse by its squared log
  distance. Curves reach their loss at n^0.5 tokens, or still fall when not `converged`.
  """
  rng = np.random.default_rng(seed)
  for n in sizes:
    for k in ks:
      for rate in rates:
        c = cell(n, k, 0.1 * n**-0.5 * rate, d_model)
        nmse = float(loss(n, k) * np.exp(0.05 * np.log(rate) ** 2 + noise * rng.normal()))
        curve = {}
        for step in sorted(log_spaced(STEPS, PER_DECADE)):  # when a cell is evaluated
          excess = (n**0.5 / (BATCH * step)) ** 2 if converged else 2 * step**-0.3 - 2 * STEPS**-0.3
          curve[step] = nmse * (1 + excess)
        lines = [cells.line(c, step, value, **_spent(n, step)) for step, value in curve.items()]
        cells.write(path, c, lines, nmse=nmse, **_spent(n, STEPS))
  return str(path)


def l0(n, coefficient):
  """What a penalty leaves active: more where it is smaller, and a little more of more latents."""
  return 0.8 * coefficient**-0.6 * (n / SIZES[0]) ** 0.05


def write_penalised(path, sizes=SIZES, coefficients=COEFFICIENTS, noise=0.001, worse=WORSE, rates=(1.0,), seed=1):
  """One cell a size and coefficient of a family without a k, `worse` times the loss of the others at its L0."""
  rng = np.random.default_rng(seed)
  for n in sizes:
    for coefficient in coefficients:
      for rate in rates:
        c = cell(n, None, 0.1 * n**-0.5 * rate, **{'sae.activation': 'relu', 'loss.sparsity': coefficient})
        active = float(l0(n, coefficient) * np.exp(0.01 * rng.normal()))
        nmse = float(worse * loss(n, active) * np.exp(0.05 * np.log(rate) ** 2 + noise * rng.normal()))
        curve = {step: nmse * (1 + (n**0.5 / (BATCH * step)) ** 2) for step in sorted(log_spaced(STEPS, PER_DECADE))}
        lines = [cells.line(c, step, value, l0=active, **_spent(n, step)) for step, value in curve.items()]
        cells.write(path, c, lines, nmse=nmse, l0=active, **_spent(n, STEPS))
  return str(path)


def cell(n: int, k: int | None, learning_rate: float, d_model: int = D, **more: Any) -> config.Cell:
  return cells.cell(
    **{
      'sae.n_latents': n,
      'sae.k': k,
      'sae.d_model': d_model,
      'sae.k_aux': 0,
      'optim.learning_rate': learning_rate,
      'train.batch_tokens': BATCH,
      'train.tokens': BATCH * STEPS,
      'eval.per_decade': PER_DECADE,
    }
    | more
  )


def _spent(n: int, steps: int) -> dict[str, float]:
  tokens = BATCH * steps
  return {'flops_useful': 2.0 * n * D * tokens, 'flops_dense': 12.0 * n * D * tokens}
