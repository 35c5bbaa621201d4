"""Measures of cells that were never measured: records of windows with a known law from NMSE to KL."""

import dataclasses
import json
import pathlib

import numpy as np

from sae_jax import files, schema
from sae_jax.measures import results
from sae_jax.measures.downstream import Downstream
from sae_jax.measures.measure import Unit
from sae_jax.measures.names import VERSIONS
from sae_jax.measures.results import Key, Result

LEVEL, EXPONENT = 3.0, 1.3
WINDOWS, BLOCK, TOKENS = 24, 8, 127
INPUTS = 'a' * 64


def law(nmse):
  return LEVEL * nmse**EXPONENT


def records(kl, windows=WINDOWS, own=0.0, seed=0):
  """Lines of the downstream measure whose KL is about `kl`: windows differ for all alike, and a little for each cell."""
  shared, mine = np.random.default_rng(0), np.random.default_rng(seed)
  kl_W = kl * np.exp(0.3 * shared.normal(size=windows)) * np.exp(own * mine.normal(size=windows))
  clean_W = 3.5 + 0.4 * shared.normal(size=windows)
  tokens_W = np.full(windows, TOKENS)
  per_token = {
    'ce': clean_W + 0.6 * kl_W,
    'kl': kl_W,
    'clean_ce': clean_W,
    'zero_ce': clean_W + 10.0,
    'zero_kl': np.full(windows, 10.0),
    'mean_ce': clean_W + 5.0,
    'mean_kl': np.full(windows, 5.0),
  }
  sums = {name: value_W * tokens_W for name, value_W in per_token.items()} | {'tokens': tokens_W}
  return [
    {name: sum_W[start : start + BLOCK].tolist() for name, sum_W in sums.items()} for start in range(0, windows, BLOCK)
  ]


def values(some):
  return {name: dataclasses.asdict(value) for name, value in Downstream().values([Unit(one) for one in some]).items()}


def measure(cell, some, *, inputs=INPUTS, version=VERSIONS['downstream'], settings=None, weights='ema'):
  """Gives a cell folder an autoencoder's record, lines of units and measures.json."""
  cell_id, tensors = cell.rstrip('/').rsplit('/', 1)[-1], {'raw': 'r' * 64, 'ema': 'e' * 64}
  files.replace(files.join(cell, 'sae', 'sae.json'), schema.dump({'sha256': tensors}))
  key = Key('downstream', version, settings or {}, tensors[weights], weights, inputs)
  lines = results.Lines(cell, key)
  for one in some:
    lines.add(one)
  results.write(cell, cell_id, {'downstream': Result(key, values(some))})


def everywhere(ledger, own=0.01, over=None):
  """Measures all finished cells of a ledger; `over` multiplies the KL of a family."""
  for seed, path in enumerate(sorted(pathlib.Path(ledger).glob('cells/*/result.json'))):
    found = json.loads(path.read_text())
    kl = law(found['nmse']) * (over or {}).get(found['activation'], 1.0)
    measure(str(path.parent), records(kl, own=own, seed=seed))
  return str(ledger)
