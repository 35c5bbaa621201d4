"""A planted ledger that asks every question a report can answer, with the answers known, for tests of what people see.

Two subjects; of the first, three token budgets at every size and four learning rates at the largest. Runs converge.
"""

import functools
import tempfile

import numpy as np

import analysis
from analysis.findings import Findings
from sae_jax.cell import log_spaced
from tests import cells

SIZES, KS, SUBJECTS = (128, 256, 512, 1024, 2048, 4096), (3, 7), ('planted-a', 'planted-b')
TOKENS, RATES = (40_000, 300_000, 6_000_000), (0.1, 0.3, 1.0, 3.0)
A, ALPHA, B, BETA = 4.0, 0.45, 385.0, 0.8
D, BATCH, PER_DECADE = 13, 40, 6
RATE_EXPONENT = 0.5


def loss(n, tokens, k, subject):
  """e + a n^-alpha + b T^-beta, with e and a smaller for a larger k, and alpha another one in the second subject."""
  alpha = ALPHA - 0.15 * SUBJECTS.index(subject)
  return 0.3 / k + A * (3 / k) ** 0.5 * n**-alpha + B * tokens**-BETA


def write(path, ks=KS, noise=0.001, seed=0):
  rng = np.random.default_rng(seed)
  sizes = [
    (n, k, tokens, rate, subject)
    for n in SIZES
    for k in ks
    for tokens in TOKENS
    for rate in RATES
    for subject in SUBJECTS
    if rate == 1.0 or (tokens == TOKENS[-1] and subject == SUBJECTS[0])
    if tokens == TOKENS[-1] or subject == SUBJECTS[0]
  ]
  for n, k, tokens, rate, subject in sizes:
    c = cells.cell(
      **{
        'sae.n_latents': n,
        'sae.k': k,
        'sae.d_model': D,
        'sae.k_aux': 0,
        'train.batch_tokens': BATCH,
        'train.tokens': tokens,
        'optim.learning_rate': 0.1 * n**-RATE_EXPONENT * rate,
        'data.subject': subject,
        'data.site': 'resid_post.1',
        'eval.per_decade': PER_DECADE,
      }
    )
    worse = float(np.exp(0.05 * np.log(rate) ** 2 + noise * rng.normal()))
    lines = [
      cells.line(c, step, worse * loss(n, step * BATCH, k, subject), **_spent(n, step * BATCH))
      for step in sorted(log_spaced(c.train.steps, PER_DECADE))  # when a cell is evaluated
    ]
    cells.write(path, c, lines, nmse=worse * loss(n, tokens, k, subject), **_spent(n, tokens))
  return str(path)


@functools.cache
def findings() -> Findings:
  """What it says, once for all tests of a process."""
  with tempfile.TemporaryDirectory() as folder:
    return analysis.analyse(write(folder), bootstrap=0)


def _spent(n: int, tokens: float) -> dict[str, float]:
  return {'tokens': round(tokens), 'flops_useful': 2.0 * n * D * tokens, 'flops_dense': 12.0 * n * D * tokens}
