"""The TopK autoencoder: parameters, initialisation, and the per-shard function with hand-written gradients.

    pre = (x - b_pre) W_enc^T + b_enc,   z = ReLU(TopK_k(pre)),   x_hat = z W_dec + b_pre

A per-shard function takes a `Shard`, which names the mesh axes it runs under. The default is the one-device mathematics.
Gao et al. 2024, sections 2.3, 3 and A; gradients as in their appendix D.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sae_jax import arrays, losses, sparse
from sae_jax.axes import Axes, Shard, largest, scattered, total
from sae_jax.codes import Sparse
from sae_jax.config import LossConfig, SAEConfig
from sae_jax.families import auxk, topk

Params = dict[str, jax.Array]  # w_enc_FD, w_dec_FD, b_enc_F, b_pre_D


class SAE(nnx.Module):
  """Parameters of one autoencoder. The decoder is stored with latents as rows, so that gathers are contiguous."""

  def __init__(self, params: Params, *, k: int):
    self.k = k
    self.w_enc_FD = nnx.Param(params['w_enc_FD'])
    self.w_dec_FD = nnx.Param(params['w_dec_FD'])
    self.b_enc_F = nnx.Param(params['b_enc_F'])
    self.b_pre_D = nnx.Param(params['b_pre_D'])

  def params(self) -> Params:
    return nnx.to_pure_dict(nnx.state(self, nnx.Param))

  def encode(self, x: Any) -> tuple[jax.Array, jax.Array]:
    """Values [..., K] (not negative, descending) and latent indices [..., K] for normalised inputs [..., D].

    Raises `UserError` as `arrays.activations` says; inside jit it looks at shapes and types alone.
    """
    n_latents, d_model = self.w_enc_FD.shape
    x = jnp.asarray(arrays.activations(x, d_model))
    shape = (*x.shape[:-1], min(self.k, n_latents))
    if not x.size:
      return jnp.zeros(shape, x.dtype), jnp.zeros(shape, jnp.int32)
    _, codes, _ = encode(self.params(), x.reshape(-1, d_model), self.k, Shard())
    return codes.z_BK.reshape(shape), codes.idx_BK.reshape(shape)

  def decode(self, z: Any, idx: Any) -> jax.Array:
    """Reconstruction [..., D] in the normalised space, from values and latent indices [..., K].

    Raises `UserError` as `arrays.codes` says; inside jit it looks at shapes and types alone, and a row with an index
    out of range is NaN.
    """
    n_latents, d_model = self.w_dec_FD.shape
    z, idx = (jnp.asarray(a) for a in arrays.codes(z, idx, n_latents))
    shape = (*z.shape[:-1], d_model)
    if not z.size:  # no row, or rows of no latent
      return jnp.broadcast_to(self.b_pre_D[...], shape)
    flat_BK = (-1, z.shape[-1])
    x_BD = sparse.decode(z.reshape(flat_BK), idx.reshape(flat_BK), self.w_dec_FD[...])
    return (x_BD + self.b_pre_D[...][None]).reshape(shape)


def shapes(n_latents: int, d_model: int) -> dict[str, tuple[int, ...]]:
  """Of the parameters."""
  return {
    'w_enc_FD': (n_latents, d_model),
    'w_dec_FD': (n_latents, d_model),
    'b_enc_F': (n_latents,),
    'b_pre_D': (d_model,),
  }


def init_params(key: jax.Array, b_pre_D: jax.Array, config: SAEConfig) -> Params:
  """Decoder rows random of unit norm, encoder equal to them, latent bias 0 (section 3, steps 1 to 3).

  Under jit with output shardings each device builds only its own rows, with the values of the unsharded call.
  The encoder still wants `encoder_scale`.
  """
  bound = 1 / math.sqrt(config.d_model)
  shape = (config.n_latents, config.d_model)
  w_FD = jax.random.uniform(key, shape, b_pre_D.dtype, -bound, bound)
  w_FD = w_FD / jnp.linalg.norm(w_FD, axis=-1, keepdims=True)
  return {
    'w_enc_FD': w_FD,
    'w_dec_FD': w_FD,
    'b_enc_F': jnp.zeros(config.n_latents, b_pre_D.dtype),
    'b_pre_D': b_pre_D,
  }


def encoder_scale(params: Params, probe_BD: jax.Array, k: int, axes: Axes) -> jax.Array:
  """Factor for the encoder that makes reconstructions of unit-norm probes as long as the probes (section 3, 4).

  `probe_BD` holds Gaussian vectors scaled to norm 1, the same on every shard. With b_enc = 0 the map is
  homogeneous, so one division is exact.
  """
  x_BD = probe_BD + params['b_pre_D'][None]
  _, codes, _ = encode(params, x_BD, k, Shard(axes._replace(data=None)))
  x_hat_BD = _decode(params, codes, axes)
  return 1 / jnp.mean(jnp.linalg.norm(x_hat_BD, axis=-1))


def encode(
  params: Params, x_BD: jax.Array, k: int, shard: Shard, recall_target: float | None = None
) -> tuple[jax.Array | None, Sparse, jax.Array]:
  """(x - b_pre) W_enc^T [B, F] without the bias, this shard's codes, and x - b_pre [B, D].

  The selection reads the product in the parameters' type: on bfloat16 pre-activations half the rows tie at the k-th
  value. In more than one chunk of rows None stands in the product's place.
  """
  xc_BD = x_BD - params['b_pre_D'][None]
  product_BF = _product(params, xc_BD, shard) if shard.chunks == 1 else None
  return product_BF, _codes(params, params['b_enc_F'], product_BF, xc_BD, k, shard, recall_target), xc_BD


def _product(params: Params, xc_BD: jax.Array, shard: Shard) -> jax.Array:
  dtype = shard.dtype or xc_BD.dtype
  return jnp.einsum(
    'bd,fd->bf',
    xc_BD.astype(dtype),
    params['w_enc_FD'].astype(dtype),
    preferred_element_type=xc_BD.dtype,
  )


def _codes(
  params: Params,
  bias_F: jax.Array,
  product_BF: jax.Array | None,
  xc_BD: jax.Array,
  k: int,
  shard: Shard,
  recall_target: float | None = None,
) -> Sparse:
  return topk.codes(product_BF, lambda xc_RD: _product(params, xc_RD, shard), xc_BD, bias_F, k, shard, recall_target)


def _decode(params: Params, codes: Sparse, axes: Axes) -> jax.Array:
  return total(codes.decode(params['w_dec_FD'], codes.slots(axes)), axes.latent)


def reconstruct(params: Params, x_BD: jax.Array, k: int, shard: Shard) -> tuple[jax.Array, Sparse]:
  """Reconstruction [B, D], summed over shards, and this shard's codes."""
  _, codes, _ = encode(params, x_BD, k, shard)
  return _decode(params, codes, shard.axes) + params['b_pre_D'][None], codes


class StepSums(NamedTuple):
  """What one step learns about the batch: sums over all tokens of all shards, replicated."""

  square_error: jax.Array  # sum ||x - x_hat||^2
  active: jax.Array  # number of non-zero codes
  aux_loss: jax.Array  # AuxK before its coefficient; 0 when nothing is dead
  n_dead: jax.Array  # dead latents


def loss_and_grads(
  params: Params,
  idle_F: jax.Array,
  x_BD: jax.Array,
  scale: jax.Array,
  *,
  sae: SAEConfig,
  loss: LossConfig,
  batch: int,
  shard: Shard,
) -> tuple[Params, jax.Array, StepSums]:
  """Gradients of the loss over the global batch, the new idle counters, and sums for the metrics.

  Args:
    params: this shard's latents; b_pre replicated.
    idle_F: int32, steps since each latent fired.
    x_BD: this shard's tokens.
    scale: 1 / mean (x - mean x)^2, once for the run (section 1, "constant in the training loss").
    batch: tokens in the global batch.
    shard: where and how this runs. In more than one chunk of rows AuxK encodes again.

  The decoder's gradient is projected: the component along each unit-norm row is removed (section 4), so that Adam
  does not spend itself on what the renormalisation undoes. Row j of it is sum z g, so <g_j, w_j> is the sum of z dz
  over the tokens that use j: B k numbers instead of another pass over two [F, D] arrays.

  Firing is combined over the whole batch before the dead mask is taken. Gradients are reduced over the data axis
  once, after the loops over k; nothing of size B x n leaves the shard.

  `sae.selection` is that of the main codes; AuxK, which looks at dead latents only, selects exactly.
  """
  axes = shard.axes
  recall_target = sae.recall_target if sae.selection == 'approximate' else None
  product_BF, codes, xc_BD = encode(params, x_BD, sae.k, shard, recall_target)
  slots = codes.slots(axes)
  x_hat_BD = total(codes.decode(params['w_dec_FD'], slots), axes.latent) + params['b_pre_D'][None]
  error_BD = x_BD - x_hat_BD

  fired_F = largest(codes.fired(len(idle_F), sae.fired_threshold), axes.data)
  # Counted in steps, and held at a ceiling no dead threshold reaches, so that no run is long enough to overflow.
  idle_F = jnp.where(fired_F > 0, 0, jnp.minimum(idle_F, 2**30)) + 1
  dead_F = idle_F > max(1, loss.dead_tokens // batch)
  n_dead = total(jnp.sum(dead_F.astype(jnp.int32)), axes.latent)

  if loss.aux_coefficient > 0 and sae.k_aux > 0:

    def select(bias_F: jax.Array) -> Sparse:
      return _codes(params, bias_F, product_BF, xc_BD, sae.k_aux, shard)

    aux = auxk.gradients(
      params,
      dead_F,
      n_dead,
      error_BD,
      xc_BD,
      select,
      k_aux=sae.k_aux,
      coefficient=loss.aux_coefficient,
      batch=batch,
      shard=shard,
      room=len(dead_F) // 2 if shard.chunks == 1 else 0,  # no more than the product already takes
    )
  else:
    aux = auxk.none(params)

  g_BD = losses.mse_gradient(error_BD, scale, batch)
  dz_BK = codes.gradient(params['w_dec_FD'], g_BD, slots)
  dw_enc_FD, dw_dec_FD = codes.add_weight_gradients(aux.w_enc_FD, aux.w_dec_FD, dz_BK, xc_BD, g_BD, slots)
  db_enc_F = codes.add_at(aux.b_enc_F, dz_BK)
  along_F = codes.add_at(aux.along_F, codes.z_BK * dz_BK)

  dw_dec_FD = dw_dec_FD - along_F[:, None] * params['w_dec_FD']
  # Summing over the batch first turns [B, F] x [F, D] into one vector-matrix product.
  through_encoder_D = db_enc_F @ params['w_enc_FD']
  reduce = scattered if shard.scatter else total
  dw_enc_FD, dw_dec_FD, db_enc_F = reduce((dw_enc_FD, dw_dec_FD, db_enc_F), axes.data)
  db_pre_D, square_error, active, through_encoder_D = total(
    (
      jnp.sum(g_BD, axis=0),
      jnp.sum(error_BD * error_BD),
      jnp.sum(codes.active()),
      through_encoder_D,
    ),
    axes.data,
  )
  through_encoder_D, active = total((through_encoder_D, active), axes.latent)
  grads = {
    'w_enc_FD': dw_enc_FD,
    'w_dec_FD': dw_dec_FD,
    'b_enc_F': db_enc_F if sae.latent_bias else jnp.zeros_like(db_enc_F),
    'b_pre_D': db_pre_D - through_encoder_D,
  }
  return grads, idle_F, StepSums(square_error, active, aux.loss, n_dead)
