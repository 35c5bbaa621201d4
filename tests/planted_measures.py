"""Measures of cells that were never measured: records of windows with a known law from NMSE to KL."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np
import safetensors.numpy

from sae_jax import files, schema
from sae_jax.measures import results
from sae_jax.measures.downstream import Downstream
from sae_jax.measures.measure import Unit
from sae_jax.measures.names import VERSIONS
from sae_jax.measures.results import Key, Result

LEVEL, EXPONENT = 3.0, 1.3
# Of explained latents at n = 1,024 and L0 = 7, by family; how recall, F1 and the rest move is the same in all.
RECALL, PRECISION = {'topk': 0.3, 'relu': 0.15}, {'topk': 0.72, 'relu': 0.8}
RECALL_N, RECALL_L0 = 0.25, -0.3  # powers
SIMULATED, BIGRAM, LATENT, CHANNEL = 0.9, 2.0, 0.2, 0.4
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


def explain(ledger, latents=300, units=3, precision=None, recall=None):
  """Gives all finished cells of a ledger explained latents, and what simulating and ablating them would say.

  `precision` and `recall` replace those of families.
  """
  for seed, path in enumerate(sorted(pathlib.Path(ledger).glob('cells/*/result.json'))):
    found, rng = json.loads(path.read_text()), np.random.default_rng(seed)
    size, sparse = found['n_latents'] / 1024, found['l0'] / 7
    share = (RECALL | (recall or {}))[found['activation']] * size**RECALL_N * sparse**RECALL_L0
    true_E = rng.integers(40, 400, latents)
    hits_E = rng.binomial(true_E, np.clip(share * rng.uniform(0.5, 1.5, latents), 0, 1))
    right = (PRECISION | (precision or {}))[found['activation']] * rng.uniform(0.8, 1.2, latents)
    of = {'true_E': true_E, 'predicted_E': np.ceil(hits_E / np.minimum(right, 1)).astype(np.int64), 'hits_E': hits_E}
    _explained(str(path.parent), of, units)
    simulated = SIMULATED * size**-0.1 * sparse**0.2
    for name, said in (
      (
        'simulate',
        {'kl': simulated, 'true_kl': simulated / 3, 'bigram_kl': BIGRAM, 'kl_over_bigram': simulated - BIGRAM},
      ),
      (
        'ablation',
        {
          'latent_once': LATENT,
          'latent_over_channel_once': LATENT / CHANNEL,
          'latent_over_channel_all': 1.0,
          'left_out': 0.0,
        },
      ),
    ):
      finished(str(path.parent), name, {key: (value, abs(0.02 * value)) for key, value in said.items()}, [{'x': 1}])
  return str(ledger)


def _explained(cell, of, units):
  """The n2g of a cell. Its first unit has no arrays."""
  lines = [{'tokens': 1}]
  for unit, some in enumerate(np.array_split(np.arange(len(of['true_E'])), units), 1):
    data = safetensors.numpy.save({name: count_E[some] for name, count_E in of.items()})
    files.replace(results.path(cell, f'n2g.{unit}.safetensors'), data)
    lines.append({'arrays_sha256': hashlib.sha256(data).hexdigest()})
  predicted_E = np.where(of['predicted_E'], of['predicted_E'], np.nan)
  score = {
    'precision': of['hits_E'] / predicted_E,
    'recall': of['hits_E'] / of['true_E'],
    'f1': 2 * of['hits_E'] / (of['true_E'] + of['predicted_E']),
  }
  means = {name: (np.nanmean(s_E), np.nanstd(s_E) / np.isfinite(s_E).sum() ** 0.5) for name, s_E in score.items()}
  finished(cell, 'n2g', means | {'eligible': (0.5, None)}, lines)


def finished(cell, name, said, lines):
  """Adds a measure to those of a cell; `said` has values with their errors."""
  cell_id, tensors = cell.rstrip('/').rsplit('/', 1)[-1], 'e' * 64
  files.replace(files.join(cell, 'sae', 'sae.json'), schema.dump({'sha256': {'ema': tensors}}))
  key = Key(name, VERSIONS[name], {}, tensors, 'ema', INPUTS)
  made = results.Lines(cell, key)
  for line in lines:
    made.add(line)
  values = {
    value: {'value': float(x), 'se': None if se is None else float(se), 'units': 'share'}
    for value, (x, se) in said.items()
  }
  results.write(cell, cell_id, results.read(cell, cell_id) | {name: Result(key, values)})


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
