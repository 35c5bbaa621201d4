"""A ledger folder of cells whose losses follow a known law, for tests of what reads ledgers."""

import json

import numpy as np

from sae_jax import files

PLOTTED = dict(
  alpha=-0.42271827, beta_k=0.2397685, beta_n=-0.02708159, gamma=-0.03828648, zeta=-1.31862432, eta=-0.0964778
)
SIZES, KS = (1024, 2048, 4096, 8192, 16384, 32768), (3, 7, 17)
D, BATCH, STEPS = 13, 11, 512


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
      for i, rate in enumerate(rates):
        cell = f'{n:05x}{k:03x}{i}'
        learning_rate = 0.1 * n**-0.5 * rate
        nmse = float(loss(n, k) * np.exp(0.05 * np.log(rate) ** 2 + noise * rng.normal()))
        folder = files.join(str(path), 'cells', cell)
        lines = []
        for step in np.unique(np.geomspace(2, STEPS, 25).astype(int)).tolist():
          excess = (n**0.5 / (BATCH * step)) ** 2 if converged else 2 * step**-0.3 - 2 * STEPS**-0.3
          lines.append({'step': step, 'eval/nmse': nmse * (1 + excess)} | _spent(n, step))
        record = {
          'id': cell, 'n_latents': n, 'k': k, 'd_model': d_model, 'seed': 0, 'learning_rate': learning_rate,
          'batch_tokens': BATCH, 'steps': STEPS, 'nmse': nmse, 'weights': 'ema', 'l0': float(k), 'git_commit': 'c',
        } | _spent(n, STEPS)  # fmt: skip
        config = {
          'sae': {'d_model': d_model, 'n_latents': n, 'k': k},
          'optim': {'learning_rate': learning_rate},
        }
        files.replace(files.join(folder, 'config.json'), json.dumps(config).encode())
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        files.replace(files.join(folder, 'metrics.jsonl'), text.encode())
        files.replace(files.join(folder, 'result.json'), json.dumps(record).encode())
  return str(path)


def _spent(n, steps):
  tokens = BATCH * steps
  return {'tokens': tokens, 'flops_useful': 2.0 * n * D * tokens, 'flops_dense': 12.0 * n * D * tokens}
