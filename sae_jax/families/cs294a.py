"""The sparse autoencoder of the CS294A notes: sigmoid units, and a penalty on how active each is on average (Ng 2011).

    y = x scaled into [.1, .9],   a = sigmoid(y W_enc^T + b_enc),   h = sigmoid(a W_dec + b_pre)
    J = mean |h - y|^2 / 2 + weight_decay / 2 (|W_enc|^2 + |W_dec|^2) + coefficient * sum_F KL(rho, mean a)

Every latent is a little active for every token, so L0 is n. The batch stands for all examples in the mean of a.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sae_jax.axes import Shard, scattered, total
from sae_jax.codes import Latents, Own, OwnSums
from sae_jax.config import SAEConfig

_Params = dict[str, jax.Array]


def _range(size: SAEConfig) -> float:
  """Three standard deviations of a component of a vector of norm 1: what lies beyond is cut off."""
  return 3 / math.sqrt(size.d_model)


def scaled(x_BD: jax.Array, size: SAEConfig) -> jax.Array:
  """y."""
  return 0.5 + 0.4 * jnp.clip(x_BD / _range(size), -1, 1)


def output(sum_BD: jax.Array, size: SAEConfig) -> jax.Array:
  """x_hat from a W_dec + b_pre: the scaling of y is undone."""
  return (jax.nn.sigmoid(sum_BD) - 0.5) * (_range(size) / 0.4)


def codes(product_BF: jax.Array, latents: Latents, size: SAEConfig) -> jax.Array:
  """a."""
  del size
  return jax.nn.sigmoid(product_BF + latents['b_enc_F'][None])


def init(key: jax.Array, size: SAEConfig) -> dict[str, jax.Array]:
  """Uniform weights as in the notes; biases start at 0."""
  bound = math.sqrt(6 / (size.n_latents + size.d_model + 1))
  keys = dict(zip(('w_enc_FD', 'w_dec_FD'), jax.random.split(key), strict=True))
  shape = (size.n_latents, size.d_model)
  return {name: jax.random.uniform(one, shape, minval=-bound, maxval=bound) for name, one in keys.items()}


def divergence(mean_F: jax.Array, rho: float) -> jax.Array:
  """KL(rho, mean a) of each latent."""
  return rho * jnp.log(rho / mean_F) + (1 - rho) * jnp.log((1 - rho) / (1 - mean_F))


def gradients(
  params: _Params, x_BD: jax.Array, size: SAEConfig, coefficient: float | jax.Array, batch: int, shard: Shard
) -> tuple[_Params, OwnSums]:
  """Gradients of J over the global batch, reduced, and sums for the metrics.

  The mean of a is that of all shards, and the gradient needs it: so tokens are encoded once for it and, in chunks of
  rows, once more for the gradient.
  """
  axes, w_dec_FD = shard.axes, params['w_dec_FD']
  y_BD = scaled(x_BD, size)

  def chunked(f: Callable, *arrays_BD: jax.Array) -> tuple[jax.Array, ...]:
    """Sums of what `f` gives over the chunks, after its first result, which is of each row."""
    parts = tuple(a_BD.reshape(shard.chunks, -1, a_BD.shape[1]) for a_BD in arrays_BD)
    rows_CRD, *sums = jax.lax.map(lambda rows: f(*rows), parts)
    return rows_CRD.reshape(len(x_BD), -1), *(jnp.sum(one, axis=0) for one in sums)

  def encoded(y_RD: jax.Array) -> jax.Array:
    return codes(y_RD @ params['w_enc_FD'].T, params, size)

  def ahead(y_RD: jax.Array) -> tuple[jax.Array, jax.Array]:
    a_RF = encoded(y_RD)
    return a_RF @ w_dec_FD, jnp.sum(a_RF, axis=0)

  decoded_BD, sum_F = chunked(ahead, y_BD)
  h_BD = jax.nn.sigmoid(total(decoded_BD, axes.latent) + params['b_pre_D'][None])
  mean_F = total(sum_F, axes.data) / batch
  dh_BD = (h_BD - y_BD) * h_BD * (1 - h_BD) / batch
  pull_F = coefficient / batch * ((1 - size.rho) / (1 - mean_F) - size.rho / mean_F)

  def behind(y_RD: jax.Array, dh_RD: jax.Array) -> tuple[jax.Array, ...]:
    a_RF = encoded(y_RD)
    da_RF = (dh_RD @ w_dec_FD.T + pull_F[None]) * a_RF * (1 - a_RF)
    return y_RD, da_RF.T @ y_RD, a_RF.T @ dh_RD, jnp.sum(da_RF, axis=0)

  _, dw_enc_FD, dw_dec_FD, db_enc_F = chunked(behind, y_BD, dh_BD)
  decay = size.weight_decay / total(1, axes.data)  # each data shard adds its part
  dw_enc_FD, dw_dec_FD = dw_enc_FD + decay * params['w_enc_FD'], dw_dec_FD + decay * w_dec_FD
  reduce = scattered if shard.scatter else total
  dw_enc_FD, dw_dec_FD, db_enc_F = reduce((dw_enc_FD, dw_dec_FD, db_enc_F), axes.data)
  error_BD = x_BD - (h_BD - 0.5) * (_range(size) / 0.4)
  db_pre_D, square_error = total((jnp.sum(dh_BD, axis=0), jnp.sum(error_BD**2)), axes.data)
  penalty = total(jnp.sum(divergence(mean_F, size.rho)), axes.latent)
  grads = {'w_enc_FD': dw_enc_FD, 'w_dec_FD': dw_dec_FD, 'b_enc_F': db_enc_F, 'b_pre_D': db_pre_D}
  return grads, OwnSums(square_error, penalty * batch)


CS294A = Own(scaled, codes, output, init, gradients, unit_norm=False)
