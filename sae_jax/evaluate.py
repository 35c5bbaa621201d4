"""Held-out quality: NMSE, MSE and L0, streamed, the same for any batch split and any mesh.

NMSE = sum ||x - x_hat||^2 / sum ||x - mean x||^2 over the whole held-out set, the mean taken over the same set
(Gao et al., section 1). Predicting the mean scores exactly 1. The latents of a token are its exact top k, as the
autoencoder is defined and used afterwards, also where training selects approximately: what that misses is a recall.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import sharding, sparse, topk
from sae_jax.axes import Shard, total
from sae_jax.config import Cell, SAEConfig
from sae_jax.data import soundness
from sae_jax.data.source import Source
from sae_jax.sae import Params, encode, kept_shapes, reconstruct

_KEPT = 8  # compiled programs that a process keeps for later cells of the same sizes


@dataclasses.dataclass(frozen=True)
class Quality:
  nmse: float
  mse: float  # mean over tokens and components
  l0: float  # mean number of non-zero latents a token
  topk_recall: float | None  # share of the exact top k that training finds; None where it selects exactly


class Evaluator:
  """Scores parameters on `config.eval.tokens` held-out tokens of a source."""

  def __init__(self, config: Cell, mesh: Mesh, source: Source):
    self._tokens, self._batch, self._width = config.eval.tokens, config.eval.batch_tokens, source.d_model
    self._mesh, self._source = mesh, source
    self._token_sums = _make_token_sums(config.sae, config.train.compute_dtype, config.mesh.products, mesh)
    self._k = config.sae.k
    layouts = sharding.layouts(kept_shapes(config.sae))
    whole = {name: NamedSharding(mesh, spec) for name, spec in layouts.items()}
    self._gather = jax.jit(lambda params: params, out_shardings=whole) if config.state_is_split else None
    total_D, square = np.zeros(source.d_model), 0.0
    for start in range(0, self._tokens, self._batch):
      x_BD = source.held_out(start, min(start + self._batch, self._tokens)).astype(np.float64)
      total_D += x_BD.sum(axis=0)
      square += float(np.sum(x_BD * x_BD))
    self.mean_D = total_D / self._tokens
    # The sum over the whole set of ||x - mean||^2, in float64: norms are near 1, so the difference is harmless.
    self.total_square = square - self._tokens * float(self.mean_D @ self.mean_D)
    self.rms_norm = float(np.sqrt(square / self._tokens))
    soundness.check_varies(
      f'the {self._tokens} held-out rows',
      self.total_square / self._tokens,
      square / self._tokens,
      'hold out other rows, or raise eval.tokens',
    )

  def __call__(self, *candidates: Params) -> list[Quality]:
    """One `Quality` for each set of parameters; each batch is read and placed once."""
    if self._gather:
      # Over the data axis once, not once a batch. Raw and EMA weights together are what a step holds of a latent shard
      # at its peak: gathered parameters and gradients not yet scattered.
      candidates = tuple(sharding.settled(self._mesh, self._gather(params)) for params in candidates)
    sums: list[dict[str, np.float64]] = [collections.defaultdict(np.float64) for _ in candidates]
    for start in range(0, self._tokens, self._batch):
      count = min(self._batch, self._tokens - start)
      x_BD = sharding.place_rows(
        self._mesh, (self._batch, self._width), lambda a, b, start=start: self._padded(start + a, start + b)
      )
      for params, summed in zip(candidates, sums, strict=True):
        by_token = multihost_utils.process_allgather(self._token_sums(params, x_BD), tiled=True)
        for name, values_B in by_token.items():
          summed[name] += np.sum(values_B[:count], dtype=np.float64)
    return [
      Quality(
        nmse=float(summed['error'] / self.total_square),
        mse=float(summed['error'] / (self._tokens * self._width)),
        l0=float(summed['active'] / self._tokens),
        topk_recall=float(summed['found'] / (self._tokens * self._k)) if 'found' in summed else None,
      )
      for summed in sums
    ]

  def _padded(self, start: int, stop: int) -> np.ndarray:
    x_BD = np.zeros((stop - start, self._width), np.float32)
    end = min(stop, self._tokens)
    if start < end:
      x_BD[: end - start] = self._source.held_out(start, end)
    return x_BD


@functools.lru_cache(maxsize=_KEPT)
def _make_token_sums(
  size: SAEConfig, compute_dtype: str, products: str, mesh: Mesh
) -> Callable[[Params, jax.Array], dict[str, jax.Array]]:
  """Of each token the squared error, the active latents and, of an approximate selection, the latents it found.

  Evaluation never donates.
  """
  shard = Shard(sharding.axes_of(mesh), jnp.bfloat16 if compute_dtype == 'bfloat16' else None)

  @sparse.forced(products)
  def token_sums(params: Params, x_BD: jax.Array) -> dict[str, jax.Array]:
    x_hat_BD, codes = reconstruct(params, x_BD, size, shard)
    active_B = total(codes.active(), shard.axes.latent)
    sums = {'error': jnp.sum((x_BD - x_hat_BD) ** 2, axis=-1), 'active': active_B}
    if size.selection == 'approximate':
      product_BF, _, _ = encode(params, x_BD, size, shard)  # compiled once, with the one above
      sums['found'] = topk.found(product_BF, params['b_enc_F'], size.k, size.recall_target, shard.axes.latent)
    return sums

  return jax.jit(
    jax.shard_map(
      token_sums,
      mesh=mesh,
      in_specs=(sharding.layouts(kept_shapes(size)), sharding.BATCH),
      out_specs=P('data'),
      check_vma=False,
    )
  )
