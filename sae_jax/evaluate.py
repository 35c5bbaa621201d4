"""Held-out quality: NMSE, MSE and L0, streamed, the same for any batch split and any mesh.

NMSE = sum ||x - x_hat||^2 / sum ||x - mean x||^2 over the whole held-out set, the mean taken over the same set
(Gao et al., section 1). Predicting the mean scores exactly 1.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from sae_jax import sharding
from sae_jax.config import Config
from sae_jax.data.source import Source
from sae_jax.sae import Params, reconstruct


@dataclasses.dataclass(frozen=True)
class Quality:
  nmse: float
  mse: float  # mean over tokens and components
  l0: float  # mean number of non-zero latents a token


class Evaluator:
  """Scores parameters on `config.eval.tokens` held-out tokens of a source."""

  def __init__(self, config: Config, mesh: Mesh, source: Source):
    self._tokens, self._batch, self._width = config.eval.tokens, config.eval.batch_tokens, source.d_model
    self._mesh, self._source = mesh, source
    self._token_errors = _make_token_errors(config, mesh)
    total_D, square = np.zeros(source.d_model), 0.0
    for start in range(0, self._tokens, self._batch):
      x_BD = source.held_out(start, min(start + self._batch, self._tokens)).astype(np.float64)
      total_D += x_BD.sum(axis=0)
      square += float(np.sum(x_BD * x_BD))
    self.mean_D = total_D / self._tokens
    # The sum over the whole set of ||x - mean||^2, in float64: norms are near 1, so the difference is harmless.
    self.total_square = square - self._tokens * float(self.mean_D @ self.mean_D)

  def __call__(self, *candidates: Params) -> list[Quality]:
    """One `Quality` for each set of parameters; each batch is read and placed once."""
    errors = np.zeros(len(candidates))
    actives = np.zeros(len(candidates))
    for start in range(0, self._tokens, self._batch):
      count = min(self._batch, self._tokens - start)
      x_BD = sharding.place_rows(
        self._mesh, (self._batch, self._width), lambda a, b, start=start: self._padded(start + a, start + b)
      )
      for i, params in enumerate(candidates):
        error_B, active_B = multihost_utils.process_allgather(self._token_errors(params, x_BD), tiled=True)
        errors[i] += np.sum(error_B[:count], dtype=np.float64)
        actives[i] += np.sum(active_B[:count], dtype=np.float64)
    return [
      Quality(
        nmse=float(error / self.total_square),
        mse=float(error / (self._tokens * self._width)),
        l0=float(active / self._tokens),
      )
      for error, active in zip(errors, actives, strict=True)
    ]

  def _padded(self, start: int, stop: int) -> np.ndarray:
    x_BD = np.zeros((stop - start, self._width), np.float32)
    end = min(stop, self._tokens)
    if start < end:
      x_BD[: end - start] = self._source.held_out(start, end)
    return x_BD


def _make_token_errors(
  config: Config, mesh: Mesh
) -> Callable[[Params, jax.Array], tuple[jax.Array, jax.Array]]:
  """Squared error and number of active latents for each token. Evaluation never donates."""
  axes = sharding.axes_of(mesh)
  dtype = jnp.bfloat16 if config.train.compute_dtype == 'bfloat16' else None

  def token_errors(params, x_BD):
    x_hat_BD, codes = reconstruct(params, x_BD, config.sae.k, axes, dtype)
    active_B = jnp.sum(codes.z_BK > 0, axis=-1, dtype=jnp.int32)
    if axes.latent:
      active_B = jax.lax.psum(active_B, axes.latent)
    return jnp.sum((x_BD - x_hat_BD) ** 2, axis=-1), active_B

  return jax.jit(
    jax.shard_map(
      token_errors,
      mesh=mesh,
      in_specs=(sharding.PARAM_SPECS, sharding.BATCH),
      out_specs=(P('data'), P('data')),
      check_vma=False,
    )
  )
