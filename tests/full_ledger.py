"""A planted ledger that asks every question a report can answer, with the answers known, for tests of what people see.

Two subjects; of the first, three token budgets at every size and four learning rates at the largest. Runs converge.
"""

import functools
import json
import tempfile

import numpy as np

import analysis
from analysis.findings import Findings
from sae_jax import files

SIZES, KS, SUBJECTS = (128, 256, 512, 1024, 2048, 4096), (3, 7), ('planted-a', 'planted-b')
TOKENS, RATES = (40_000, 300_000, 6_000_000), (0.1, 0.3, 1.0, 3.0)
A, ALPHA, B, BETA = 4.0, 0.45, 385.0, 0.8
D, BATCH = 13, 40
RATE_EXPONENT = 0.5


def loss(n, tokens, k, subject):
  """e + a n^-alpha + b T^-beta, with e and a smaller for a larger k, and alpha another one in the second subject."""
  alpha = ALPHA - 0.15 * SUBJECTS.index(subject)
  return 0.3 / k + A * (3 / k) ** 0.5 * n**-alpha + B * tokens**-BETA


def write(path, ks=KS, noise=0.001, seed=0):
  rng = np.random.default_rng(seed)
  cells = [
    (n, k, tokens, rate, subject)
    for n in SIZES for k in ks for tokens in TOKENS for rate in RATES for subject in SUBJECTS
    if rate == 1.0 or (tokens == TOKENS[-1] and subject == SUBJECTS[0])
    if tokens == TOKENS[-1] or subject == SUBJECTS[0]
  ]  # fmt: skip
  for i, (n, k, tokens, rate, subject) in enumerate(cells):
    learning_rate = 0.1 * n**-RATE_EXPONENT * rate
    worse = float(np.exp(0.05 * np.log(rate) ** 2 + noise * rng.normal()))
    seen = np.geomspace(1000, tokens, 24)
    lines = [
      {'step': int(t / BATCH), 'eval/nmse': worse * loss(n, t, k, subject)} | _spent(n, t)
      for t in seen.tolist()
    ]
    cell = f'{i:012x}'
    record = {
      'id': cell, 'n_latents': n, 'k': k, 'd_model': D, 'seed': 0, 'learning_rate': learning_rate, 'batch_tokens': BATCH,
      'steps': tokens // BATCH, 'nmse': worse * loss(n, tokens, k, subject), 'weights': 'ema', 'l0': float(k),
      'dead_fraction': 0.0, 'wall_s': 1.5, 'git_commit': 'c',
    } | _spent(n, tokens)  # fmt: skip
    config = {
      'sae': {'d_model': D, 'n_latents': n, 'k': k}, 'optim': {'learning_rate': learning_rate},
      'train': {'tokens': tokens, 'batch_tokens': BATCH, 'seed': 0}, 'data': {'subject': subject, 'site': 'resid_post.1'},
    }  # fmt: skip
    folder = files.join(str(path), 'cells', cell)
    files.replace(files.join(folder, 'config.json'), json.dumps(config).encode())
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    files.replace(files.join(folder, 'metrics.jsonl'), text.encode())
    files.replace(files.join(folder, 'result.json'), json.dumps(record).encode())
  return str(path)


@functools.cache
def findings() -> Findings:
  """What it says, once for all tests of a process."""
  with tempfile.TemporaryDirectory() as folder:
    return analysis.analyse(write(folder), bootstrap=0)


def _spent(n, tokens):
  return {'tokens': tokens, 'flops_useful': 2.0 * n * D * tokens, 'flops_dense': 12.0 * n * D * tokens}
