"""A source whose truth is known: tokens are sparse non-negative sums of a fixed dictionary plus noise.

Feature frequencies are heavy-tailed. Every block of 1,024 tokens is drawn from a counter-based generator keyed by
(dictionary seed, order seed, split, block), so any range of positions is a pure function of the configuration.
"""

import functools

import numpy as np

from sae_jax.config import PlantedConfig

_BLOCK = 1024
_CACHE_BYTES = 2**30
_TRAIN, _HELD_OUT, _DICTIONARY = 0, 1, 2


class Planted:
  """Implements `sae_jax.data.source.Source`. Inputs have mean square norm 1."""

  flops_per_token = 0.0

  def __init__(self, config: PlantedConfig, *, d_model: int, order_seed: int):
    self.config, self.d_model, self._order_seed = config, d_model, order_seed
    self.provenance = {'subject': '', 'site': 'planted', 'normalize': 'none', 'identity': ''}
    directions_GD = _generator(config.seed, 0, _DICTIONARY, 0).standard_normal((config.n_features, d_model))
    self.dictionary_GD = directions_GD / np.linalg.norm(directions_GD, axis=1, keepdims=True)
    weights_G = (1.0 + np.arange(config.n_features)) ** -config.exponent
    # Feature rates, scaled to the wanted mean number of active features; the most frequent saturate at 1.
    self.rate_G = np.minimum(1.0, config.active * weights_G / weights_G.sum())
    second_moment = 1 + 1 / 12  # of a magnitude uniform in [0.5, 1.5]
    signal = second_moment * self.rate_G.sum()
    self._scale = 1 / np.sqrt(signal * (1 + config.noise**2))
    self._noise = config.noise * np.sqrt(signal / d_model)
    kept = max(2, min(256, _CACHE_BYTES // (4 * _BLOCK * d_model)))
    self._block = functools.lru_cache(maxsize=kept)(self._make_block)

  def rows(self, start: int, stop: int) -> np.ndarray:
    return self._range(_TRAIN, start, stop)

  def held_out(self, start: int, stop: int) -> np.ndarray:
    return self._range(_HELD_OUT, start, stop)

  def _range(self, split: int, start: int, stop: int) -> np.ndarray:
    first, last = start // _BLOCK, -(-stop // _BLOCK)
    x_TD = np.concatenate([self._block(split, b) for b in range(first, last)])
    return x_TD[start - first * _BLOCK : stop - first * _BLOCK]

  def _make_block(self, split: int, block: int) -> np.ndarray:
    rng = _generator(self.config.seed, self._order_seed, split, block)
    shape = (_BLOCK, self.config.n_features)
    active = rng.random(shape) < self.rate_G
    z_BG = np.where(active, 0.5 + rng.random(shape), 0.0)
    x_BD = z_BG @ self.dictionary_GD + self._noise * rng.standard_normal((_BLOCK, self.d_model))
    return (self._scale * x_BD).astype(np.float32)


def _generator(seed: int, order_seed: int, split: int, block: int) -> np.random.Generator:
  return np.random.Generator(
    np.random.Philox(key=np.array([seed, order_seed], np.uint64), counter=[0, 0, block, split])
  )
