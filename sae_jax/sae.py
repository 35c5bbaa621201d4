"""The skeleton of every autoencoder: parameters, initialisation, and the per-shard function with hand-written gradients.

    pre = (x - b_pre) W_enc^T + b_enc,   z = the family's codes of pre,   x_hat = z W_dec + b_pre

A family (`sae_jax.families`) says how codes come from pre-activations. All else is here, and knows no family.
A per-shard function takes a `Shard`, which names the mesh axes it runs under. The default is the one-device mathematics.
Gao et al. 2024, sections 2.3, 3 and A; gradients as in their appendix D.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sae_jax import arrays, inference, losses, sparse
from sae_jax.axes import Axes, Shard, largest, scattered, smallest, total
from sae_jax.codes import Dense, Elementwise, Kind, Latents, Own, Selection, Sparse
from sae_jax.config import LossConfig, SAEConfig
from sae_jax.families import auxk, topk
from sae_jax.families.family import family
from sae_jax.topk import Preactivations

# w_enc_FD (not where it is the decoder), w_dec_FD, b_enc_F, b_pre_D, and the family's own with one number a latent.
Params = dict[str, jax.Array]
_PROBED = 4096  # latents whose products stand for those of all at the start


class SAE(nnx.Module):
  """Parameters of one autoencoder. The decoder is stored with latents as rows, so that gathers are contiguous."""

  w_dec_FD: nnx.Param
  b_enc_F: nnx.Param
  b_pre_D: nnx.Param

  def __init__(self, params: Params, size: SAEConfig):
    self.size = size
    for name, value in params.items():
      setattr(self, name, nnx.Param(value))

  def params(self) -> Params:
    return nnx.to_pure_dict(nnx.state(self, nnx.Param))

  def encode(self, x: Any, activation: inference.Activation | None = None) -> tuple[jax.Array, jax.Array]:
    """Values [..., K] (not negative, descending) and latent indices [..., K] for normalised inputs [..., D].

    Without a k there are as many slots as the fullest token needs, and inside jit one a latent. `activation` takes the
    place of the family's own. Raises `UserError` as `arrays.activations` and `inference.check` say; inside jit shapes
    and types of `x` alone are looked at.
    """
    d_model, k = self.size.d_model, self.size.k
    x = jnp.asarray(arrays.activations(x, d_model))
    inference.check(activation, self.size.n_latents)
    if not x.size:
      k = k if activation is None else getattr(activation, 'k', None)
      shape = (*x.shape[:-1], k or 0)
      return jnp.zeros(shape, x.dtype), jnp.zeros(shape, jnp.int32)
    codes = encode_as(self.params(), x.reshape(-1, d_model), self.size, activation)
    z_BK, idx_BK, _ = codes.listed()
    shape = (*x.shape[:-1], z_BK.shape[-1])
    return z_BK.reshape(shape), idx_BK.reshape(shape)

  def decode(self, z: Any, idx: Any) -> jax.Array:
    """Reconstruction [..., D] in the normalised space, from values and latent indices [..., K].

    Raises `UserError` as `arrays.codes` says; inside jit it looks at shapes and types alone, and a row with an index
    out of range is NaN.
    """
    n_latents, d_model = self.size.n_latents, self.size.d_model
    z, idx = (jnp.asarray(a) for a in arrays.codes(z, idx, n_latents))
    shape = (*z.shape[:-1], d_model)
    if not z.size:  # no row, or rows of no latent
      return jnp.broadcast_to(_output(self.b_pre_D[...], self.size), shape)
    flat_BK = (-1, z.shape[-1])
    x_BD = sparse.decode(z.reshape(flat_BK), idx.reshape(flat_BK), self.w_dec_FD[...]) + self.b_pre_D[...][None]
    return _output(x_BD, self.size).reshape(shape)


def shapes(size: SAEConfig) -> dict[str, tuple[int, ...]]:
  """Of the parameters."""
  kind, matrix, latent = kind_of(size), (size.n_latents, size.d_model), (size.n_latents,)
  matrices = ('w_dec_FD',) if kind.tied else ('w_enc_FD', 'w_dec_FD')
  own = dict.fromkeys(('b_enc_F', *kind.latents), latent)
  return dict.fromkeys(matrices, matrix) | own | {'b_pre_D': (size.d_model,)}


def kept_shapes(size: SAEConfig) -> dict[str, tuple[int, ...]]:
  """Of all that an autoencoder in use needs: parameters, and what training keeps beside them."""
  return shapes(size) | ({'threshold': ()} if kind_of(size).threshold else {})


def kept(params: Params, carried: dict[str, jax.Array]) -> Params:
  """The parameters of an autoencoder in use, from those of training and what it carries."""
  return params | {name: value for name, value in carried.items() if name == 'threshold'}


def kind_of(size: SAEConfig) -> Kind:
  """The mathematics of the family of an autoencoder."""
  return family(size.activation).mathematics()


def has_linear_decoder(size: SAEConfig) -> bool:
  """Whether a reconstruction is the sum of latents plus b_pre."""
  return not isinstance(kind_of(size), Own)


def init_params(key: jax.Array, b_pre_D: jax.Array, config: SAEConfig) -> Params:
  """Decoder rows random of unit norm, encoder equal to them, latent bias 0 (section 3, steps 1 to 3).

  Under jit with output shardings each device builds only its own rows, with the values of the unsharded call.
  The encoder still wants `encoder_scale`.
  """
  kind = kind_of(config)
  first = {'b_enc_F': 0.0} | dict(kind.latents)
  own = {name: jnp.full(config.n_latents, value, b_pre_D.dtype) for name, value in first.items()}
  if isinstance(kind, Own):
    return kind.init(key, config) | own | {'b_pre_D': jnp.zeros_like(b_pre_D)}
  bound = 1 / math.sqrt(config.d_model)
  shape = (config.n_latents, config.d_model)
  w_FD = jax.random.uniform(key, shape, b_pre_D.dtype, -bound, bound)
  w_FD = w_FD / jnp.linalg.norm(w_FD, axis=-1, keepdims=True)
  return ({} if kind.tied else {'w_enc_FD': w_FD}) | {'w_dec_FD': w_FD, 'b_pre_D': b_pre_D} | own


def scaled_to_probes(params: Params, scale: jax.Array, size: SAEConfig) -> Params:
  """Parameters whose reconstructions are `scale` times as long. A matrix that is both takes the root, for it works twice."""
  kind = kind_of(size)
  if isinstance(kind, Own):
    return params
  name, factor = ('w_dec_FD', jnp.sqrt(scale)) if kind.tied else ('w_enc_FD', scale)
  return params | {name: params[name] * factor}


def started(params: Params, sample_BD: jax.Array, size: SAEConfig) -> Params:
  """Parameters with the family's own as it starts them, by the products of a sample of tokens."""
  start = kind_of(size).start
  if start is None:
    return params
  return params | start((sample_BD - params['b_pre_D'][None]) @ params['w_enc_FD'][:_PROBED].T, size)


def encoder_scale(params: Params, probe_BD: jax.Array, size: SAEConfig, axes: Axes) -> jax.Array:
  """Factor for the encoder that makes reconstructions of unit-norm probes as long as the probes (section 3, 4).

  `probe_BD` holds Gaussian vectors scaled to norm 1, the same on every shard. With b_enc = 0 the map is
  homogeneous, so one division is exact.
  """
  x_BD = probe_BD + params['b_pre_D'][None]
  _, codes, _ = encode(params, x_BD, size, Shard(axes._replace(data=None)))
  x_hat_BD = _decode(params, codes, axes)
  return 1 / jnp.mean(jnp.linalg.norm(x_hat_BD, axis=-1))


def encode(
  params: Params, x_BD: jax.Array, size: SAEConfig, shard: Shard, *, exact: bool = True
) -> tuple[jax.Array | None, Sparse | Dense, jax.Array]:
  """(x - b_pre) W_enc^T [B, F] without the bias, this shard's codes, and x - b_pre [B, D].

  A family reads the product in the parameters' type: of bfloat16 pre-activations half the rows tie at the k-th value.
  In more than one chunk of rows None stands in the product's place. Where `exact` is false a selection may be that of
  `sae.selection`.
  """
  kind = kind_of(size)
  xc_BD = _centred(params, x_BD, size)
  product_BF = _product(params, xc_BD, shard) if shard.chunks == 1 else None
  if isinstance(kind, Selection) and 'threshold' not in params:
    return product_BF, kind.select(_preactivations(params, product_BF, xc_BD, size, shard, exact), size, shard), xc_BD
  kept_BF = _product(params, xc_BD, shard) if product_BF is None else product_BF
  codes = Dense(_dense_codes(kind, params, kept_BF, size))
  return product_BF, codes.above(params['threshold']) if 'threshold' in params else codes, xc_BD


def dense(params: Params, x_BD: jax.Array, size: SAEConfig) -> jax.Array:
  """The codes [B, F] before any choice among them, on one device: those of a selection are ReLU of its pre-activations."""
  return _dense_codes(kind_of(size), params, _product(params, _centred(params, x_BD, size), Shard()), size)


def encode_as(
  params: Params, x_BD: jax.Array, size: SAEConfig, activation: inference.Activation | None
) -> Sparse | Dense:
  """The codes with another activation, on one device; None is the family's own."""
  if activation is None:
    return encode(params, x_BD, size, Shard())[1]
  if isinstance(activation, inference.Threshold):
    return Dense(dense(params, x_BD, size)).above(activation.value)
  if not isinstance(kind_of(size), Selection):
    return Dense(dense(params, x_BD, size)).listed(activation.k)
  xc_BD = _centred(params, x_BD, size)
  product_BF = _product(params, xc_BD, Shard())
  return topk.codes(_preactivations(params, product_BF, xc_BD, size, Shard(), exact=True), activation.k, Shard())


def _dense_codes(kind: Kind, params: Params, product_BF: jax.Array, size: SAEConfig) -> jax.Array:
  if isinstance(kind, Selection):
    return jax.nn.relu(product_BF + params['b_enc_F'][None])
  if isinstance(kind, Own):
    return kind.codes(product_BF, _latents(params), size)
  zs, _ = kind.codes(product_BF, _latents(params), size)
  return zs[0]


def _centred(params: Params, x_BD: jax.Array, size: SAEConfig) -> jax.Array:
  kind = kind_of(size)
  return kind.input(x_BD, size) if isinstance(kind, Own) else x_BD - params['b_pre_D'][None]


def _output(sum_BD: jax.Array, size: SAEConfig) -> jax.Array:
  kind = kind_of(size)
  return kind.output(sum_BD, size) if isinstance(kind, Own) else sum_BD


def _product(params: Params, xc_BD: jax.Array, shard: Shard) -> jax.Array:
  dtype = shard.dtype or xc_BD.dtype
  return jnp.einsum(
    'bd,fd->bf',
    xc_BD.astype(dtype),
    _encoder(params).astype(dtype),
    preferred_element_type=xc_BD.dtype,
  )


def _latents(params: Params) -> Latents:
  return {name: value for name, value in params.items() if name.endswith('_F')}


def _encoder(params: Params) -> jax.Array:
  return params.get('w_enc_FD', params['w_dec_FD'])


def _preactivations(
  params: Params, product_BF: jax.Array | None, xc_BD: jax.Array, size: SAEConfig, shard: Shard, exact: bool
) -> Preactivations:
  recall_target = size.recall_target if size.selection == 'approximate' and not exact else None
  bias_F = params['b_enc_F']
  return Preactivations(product_BF, lambda xc_RD: _product(params, xc_RD, shard), xc_BD, bias_F, recall_target)


def _decode(params: Params, codes: Sparse | Dense, axes: Axes) -> jax.Array:
  return total(codes.decode(params['w_dec_FD'], codes.slots(axes)), axes.latent)


def reconstruct(params: Params, x_BD: jax.Array, size: SAEConfig, shard: Shard) -> tuple[jax.Array, Sparse | Dense]:
  """Reconstruction [B, D], summed over shards, and this shard's codes."""
  _, codes, _ = encode(params, x_BD, size, shard)
  return _output(_decode(params, codes, shard.axes) + params['b_pre_D'][None], size), codes


class StepSums(NamedTuple):
  """What one step learns about the batch: sums over all tokens of all shards, replicated."""

  square_error: jax.Array  # sum ||x - x_hat||^2
  active: jax.Array  # number of non-zero codes
  aux_loss: jax.Array  # AuxK before its coefficient; 0 when nothing is dead
  n_dead: jax.Array  # dead latents
  penalty: jax.Array  # before its coefficient
  least: jax.Array  # least value that made a code; infinite where nobody asks


class _Latent(NamedTuple):
  """Gradients of this shard's latents before any reduction over tokens."""

  w_enc_FD: jax.Array
  w_dec_FD: jax.Array  # not projected
  own: Latents  # of every parameter with one number a latent
  along_F: jax.Array  # <gradient of w_dec, w_dec>, the part that the projection removes
  product_F: jax.Array  # of the pre-activations, summed over tokens: what b_pre gets through the encoder


class _Pass(NamedTuple):
  """The forward pass of a batch on one shard, and the way back."""

  decoded_BDs: tuple[jax.Array, ...]  # of each head, this shard's part; of parts, what each adds
  fired_F: jax.Array  # int8
  active_B: jax.Array
  penalty: jax.Array  # summed over this shard's tokens and latents
  least: jax.Array
  # From the gradients [B, D] of the heads' reconstructions, added to those of AuxK.
  back: Callable[[Sequence[jax.Array], auxk.Gradients], _Latent]


def _selected(
  kind: Selection,
  params: Params,
  product_BF: jax.Array | None,
  xc_BD: jax.Array,
  size: SAEConfig,
  shard: Shard,
  step: jax.Array,
) -> _Pass:
  w_dec_FD = params['w_dec_FD']
  pre = _preactivations(params, product_BF, xc_BD, size, shard, exact=False)
  parts = kind.parts(pre, size, shard, step) if kind.parts else (kind.select(pre, size, shard),)
  slots = [part.slots(shard.axes) for part in parts]
  main = parts[: kind.main % len(parts) + 1]

  def back(g_BDs: Sequence[jax.Array], aux: auxk.Gradients) -> _Latent:
    dw_enc_FD, dw_dec_FD, db_enc_F, along_F = aux.w_enc_FD, aux.w_dec_FD, aux.b_enc_F, aux.along_F
    for i, (part, used) in enumerate(zip(parts, slots, strict=True)):
      g_BD = sum(g_BDs[i + 1 :], g_BDs[i])  # every later head has this part too
      dz_BK = part.gradient(w_dec_FD, g_BD, used)
      dw_enc_FD, dw_dec_FD = part.add_weight_gradients(dw_enc_FD, dw_dec_FD, dz_BK, xc_BD, g_BD, used)
      db_enc_F = part.add_at(db_enc_F, dz_BK)
      along_F = part.add_at(along_F, part.z_BK * dz_BK)
    return _Latent(dw_enc_FD, dw_dec_FD, {'b_enc_F': db_enc_F}, along_F, db_enc_F)

  fired_F = _each(jnp.maximum, (part.fired(len(w_dec_FD), size.fired_threshold) for part in main))
  decoded_BDs = tuple(part.decode(w_dec_FD, used) for part, used in zip(parts, slots, strict=True))
  zero = jnp.zeros((), xc_BD.dtype)
  least = zero
  if kind.threshold:
    z_BK = parts[0].z_BK
    least = smallest(jnp.min(jnp.where(z_BK > 0, z_BK, jnp.inf)), shard.axes.both)
  return _Pass(decoded_BDs, fired_F, _each(jnp.add, (part.active() for part in main)), zero, least, back)


def _each(combine: Callable[[jax.Array, jax.Array], jax.Array], values: Iterable[jax.Array]) -> jax.Array:
  return functools.reduce(combine, values)


def _elementwise(
  kind: Elementwise,
  params: Params,
  product_BF: jax.Array | None,
  xc_BD: jax.Array,
  size: SAEConfig,
  weight: float | jax.Array,
  shard: Shard,
) -> _Pass:
  """`weight` is that of a token's penalty in the loss. In chunks of rows all is computed again on the way back."""
  w_dec_FD = params['w_dec_FD']
  latents = _latents(params)

  def pulled(xc_RD: jax.Array, product_RF: jax.Array | None) -> tuple[tuple[jax.Array, ...], jax.Array, Callable]:
    # Local mathematics only. Through a sum over shards autodiff would count a gradient once for every shard.
    made = _product(params, xc_RD, shard) if product_RF is None else product_RF
    (zs, penalty_R), pull = jax.vjp(lambda product_RF, own: kind.codes(product_RF, own, size), made, latents)
    return zs, penalty_R, pull

  def ahead(xc_RD: jax.Array, product_RF: jax.Array | None = None) -> tuple[Any, ...]:
    zs, penalty_R, _ = pulled(xc_RD, product_RF)
    main = Dense(zs[0])
    fired_F = main.fired(len(w_dec_FD), size.fired_threshold)
    return tuple(Dense(z).decode(w_dec_FD) for z in zs), fired_F, main.active(), jnp.sum(penalty_R)

  def behind(so_far: _Latent, xc_RD: jax.Array, g_RDs: Sequence[jax.Array], product_RF: jax.Array | None) -> _Latent:
    zs, penalty_R, pull = pulled(xc_RD, product_RF)
    dzs = tuple(g_RD @ w_dec_FD.T for g_RD in g_RDs)
    dproduct_RF, downs = pull((dzs, jnp.full_like(penalty_R, weight)))
    learning = [(z, dz, g) for z, dz, g, head in zip(zs, dzs, g_RDs, kind.heads, strict=True) if not head.frozen]
    return _Latent(
      so_far.w_enc_FD + dproduct_RF.T @ xc_RD,
      sum((z.T @ g for z, _, g in learning), so_far.w_dec_FD),
      {name: so_far.own[name] + down for name, down in downs.items()},
      sum((jnp.sum(z * dz, axis=0) for z, dz, _ in learning), so_far.along_F),
      so_far.product_F + jnp.sum(dproduct_RF, axis=0),
    )

  def back(g_BDs: Sequence[jax.Array], aux: auxk.Gradients) -> _Latent:
    own = {name: jnp.zeros_like(value) for name, value in latents.items()} | {'b_enc_F': aux.b_enc_F}
    start = _Latent(aux.w_enc_FD, aux.w_dec_FD, own, aux.along_F, aux.b_enc_F)
    if shard.chunks == 1:
      return behind(start, xc_BD, g_BDs, product_BF)

    def one(so_far: _Latent, rows: tuple[jax.Array, ...]) -> tuple[_Latent, None]:
      return behind(so_far, rows[0], rows[1:], None), None

    return jax.lax.scan(one, start, tuple(map(in_chunks, (xc_BD, *g_BDs))))[0]

  def in_chunks(a_BD: jax.Array) -> jax.Array:
    return a_BD.reshape(shard.chunks, -1, a_BD.shape[1])

  if shard.chunks == 1:
    return _Pass(*ahead(xc_BD, product_BF), jnp.zeros((), xc_BD.dtype), back)
  decoded, fired_CF, active_CR, penalty_C = jax.lax.map(ahead, in_chunks(xc_BD))
  whole = tuple(a_CRD.reshape(xc_BD.shape) for a_CRD in decoded)
  zero = jnp.zeros((), xc_BD.dtype)
  return _Pass(whole, jnp.max(fired_CF, axis=0), active_CR.reshape(-1), jnp.sum(penalty_C), zero, back)


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
  step: jax.Array | int = 0,
  coefficient: jax.Array | float = 0.0,
) -> tuple[Params, jax.Array, StepSums]:
  """Gradients of the loss over the global batch, the new idle counters, and sums for the metrics.

  Args:
    params: this shard's latents; b_pre replicated.
    idle_F: int32, steps since each latent fired.
    x_BD: this shard's tokens.
    scale: 1 / mean (x - mean x)^2, once for the run (section 1, "constant in the training loss").
    batch: tokens in the global batch.
    shard: where and how this runs. In more than one chunk of rows AuxK encodes again.
    step: steps done, for families and thresholds that follow it.
    coefficient: of a penalty.

  The decoder's gradient is projected: the component along each unit-norm row is removed (section 4), so that Adam
  does not spend itself on what the renormalisation undoes. Row j of it is sum z g, so <g_j, w_j> is the sum of z dz
  over the tokens that use j: B k numbers instead of another pass over two [F, D] arrays.

  Firing is combined over the whole batch before the dead mask is taken. Gradients are reduced over the data axis
  once, after the loops over k; nothing of size B x n leaves the shard.

  `sae.selection` is that of the main codes; AuxK, which looks at dead latents only, selects exactly.
  """
  axes, kind = shard.axes, kind_of(sae)
  if isinstance(kind, Own):
    grads, own_sums = kind.gradients(params, x_BD, sae, coefficient, batch, shard)
    zero = jnp.zeros((), x_BD.dtype)
    active = jnp.asarray(batch * sae.n_latents, x_BD.dtype)
    sums = StepSums(own_sums.square_error, active, zero, jnp.zeros((), jnp.int32), own_sums.penalty, zero)
    return grads, jnp.ones_like(idle_F), sums
  xc_BD = _centred(params, x_BD, sae)
  product_BF = _product(params, xc_BD, shard) if shard.chunks == 1 else None
  if isinstance(kind, Selection):
    heads, made = kind.heads(sae), _selected(kind, params, product_BF, xc_BD, sae, shard, jnp.asarray(step))
    decoded_BDs = list(itertools.accumulate(total(made.decoded_BDs, axes.latent)))
    error_BDs = [x_BD - (decoded_BD + params['b_pre_D'][None]) for decoded_BD in decoded_BDs]
    error_BD = error_BDs[kind.main]
  else:
    heads, made = kind.heads, _elementwise(kind, params, product_BF, xc_BD, sae, coefficient / batch, shard)
    decoded_BDs = total(made.decoded_BDs, axes.latent)
    error_BDs = [x_BD - (decoded_BD + params['b_pre_D'][None]) for decoded_BD in decoded_BDs]
    error_BD = error_BDs[0]

  fired_F = largest(made.fired_F, axes.data)
  # Counted in steps, and held at a ceiling no dead threshold reaches, so that no run is long enough to overflow.
  idle_F = jnp.where(fired_F > 0, 0, jnp.minimum(idle_F, 2**30)) + 1
  dead_F = idle_F > _dead_after(loss, batch, step)
  n_dead = total(jnp.sum(dead_F.astype(jnp.int32)), axes.latent)

  if loss.aux_coefficient > 0 and sae.k_aux > 0:

    def select(bias_F: jax.Array) -> Sparse:
      pre = Preactivations(product_BF, lambda xc_RD: _product(params, xc_RD, shard), xc_BD, bias_F)
      return topk.codes(pre, sae.k_aux, shard)

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

  g_BDs = [
    losses.mse_gradient(one_BD, scale, batch) * head.weight for one_BD, head in zip(error_BDs, heads, strict=True)
  ]
  latent = made.back(g_BDs, aux)
  dw_dec_FD = latent.w_dec_FD - latent.along_F[:, None] * params['w_dec_FD'] if kind.unit_norm else latent.w_dec_FD
  # Summing over the batch first turns [B, F] x [F, D] into one vector-matrix product.
  through_encoder_D = latent.product_F @ _encoder(params)
  reduce = scattered if shard.scatter else total
  dw_enc_FD, dw_dec_FD, own = reduce((latent.w_enc_FD, dw_dec_FD, latent.own), axes.data)
  db_pre_D, square_error, active, through_encoder_D, penalty = total(
    (
      sum(jnp.sum(g_BD, axis=0) for g_BD, head in zip(g_BDs, heads, strict=True) if not head.frozen),
      jnp.sum(error_BD * error_BD),
      jnp.sum(made.active_B),
      through_encoder_D,
      made.penalty,
    ),
    axes.data,
  )
  through_encoder_D, active, penalty = total((through_encoder_D, active, penalty), axes.latent)
  if not sae.latent_bias:
    own['b_enc_F'] = jnp.zeros_like(own['b_enc_F'])
  matrices = {'w_dec_FD': dw_enc_FD + dw_dec_FD} if kind.tied else {'w_enc_FD': dw_enc_FD, 'w_dec_FD': dw_dec_FD}
  grads = matrices | {'b_pre_D': db_pre_D - through_encoder_D} | own
  return grads, idle_F, StepSums(square_error, active, aux.loss, n_dead, penalty, made.least)


def _dead_after(loss: LossConfig, batch: int, step: jax.Array | int) -> jax.Array | int:
  """Idle steps beyond which a latent is dead."""
  if not loss.dead_share:
    return max(1, loss.dead_tokens // batch)
  return jnp.maximum(1, jnp.floor(loss.dead_share * (step + 1)).astype(jnp.int32))
