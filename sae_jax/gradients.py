"""The training step of an autoencoder on one shard: the loss and its hand-written gradients, for every family.

What a batch leaves behind on its way forward, and the way back, differ between sparse and dense codes. Reductions over
shards and tokens, dead latents, AuxK and the projection of the decoder's gradient are the same for both.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sae_jax import losses
from sae_jax.axes import Shard, largest, scattered, smallest, total
from sae_jax.codes import Dense, Elementwise, Latents, Own, Selection, Sparse
from sae_jax.config import LossConfig, SAEConfig
from sae_jax.families import auxk, topk
from sae_jax.families.family import family
from sae_jax.sae import Params, centred, encoder, kind_of, latents_of, preactivations, product
from sae_jax.topk import Preactivations


class StepSums(NamedTuple):
  """What one step learns about the batch: sums over all tokens of all shards, replicated."""

  square_error: jax.Array  # sum ||x - x_hat||^2
  active: jax.Array  # number of non-zero codes
  aux_loss: jax.Array  # AuxK before its coefficient; 0 when nothing is dead
  n_dead: jax.Array  # dead latents
  penalty: jax.Array  # before its coefficient
  least: jax.Array  # least value that made a code, infinite without one; 0 in families that keep none


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
  listed: auxk.Listed | None  # candidates of AuxK, where a pass over chunks of rows found them
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
  lister: auxk.Lister | None,
) -> _Pass:
  w_dec_FD = params['w_dec_FD']
  pre, listed = preactivations(params, product_BF, xc_BD, size, shard, exact=False), None
  if lister:
    pre, listed = pre.beside(family(size.activation).offered * size.k, shard.chunks, lister)
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
  return _Pass(decoded_BDs, fired_F, _each(jnp.add, (part.active() for part in main)), zero, listed, least, back)


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
  lister: auxk.Lister | None,
) -> _Pass:
  """`weight` is that of a token's penalty in the loss. In chunks of rows all is computed again on the way back."""
  w_dec_FD = params['w_dec_FD']
  latents = latents_of(params)

  def pulled(
    xc_RD: jax.Array, product_RF: jax.Array | None
  ) -> tuple[jax.Array, tuple[jax.Array, ...], jax.Array, Callable]:
    # Local mathematics only. Through a sum over shards autodiff would count a gradient once for every shard.
    made = product(params, xc_RD, shard) if product_RF is None else product_RF
    (zs, penalty_R), pull = jax.vjp(lambda product_RF, own: kind.codes(product_RF, own, size), made, latents)
    return made, zs, penalty_R, pull

  def ahead(xc_RD: jax.Array, product_RF: jax.Array | None = None) -> tuple[Any, ...]:
    made, zs, penalty_R, _ = pulled(xc_RD, product_RF)
    main = Dense(zs[0])
    fired_F = main.fired(len(w_dec_FD), size.fired_threshold)
    listed = lister(made) if lister else None
    return tuple(Dense(z).decode(w_dec_FD) for z in zs), fired_F, main.active(), jnp.sum(penalty_R), listed

  def behind(so_far: _Latent, xc_RD: jax.Array, g_RDs: Sequence[jax.Array], product_RF: jax.Array | None) -> _Latent:
    _, zs, penalty_R, pull = pulled(xc_RD, product_RF)
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
  decoded, fired_CF, active_CR, penalty_C, listed = jax.lax.map(ahead, in_chunks(xc_BD))
  whole, listed = jax.tree.map(lambda a_CRK: a_CRK.reshape(-1, a_CRK.shape[-1]), (decoded, listed))
  zero = jnp.zeros((), xc_BD.dtype)
  return _Pass(whole, jnp.max(fired_CF, axis=0), active_CR.reshape(-1), jnp.sum(penalty_C), listed, zero, back)


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
    shard: where and how this runs.
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
    if not sae.latent_bias:
      grads = grads | {'b_enc_F': jnp.zeros_like(grads['b_enc_F'])}
    return grads, jnp.ones_like(idle_F), sums
  # Counted in steps, and held at a ceiling no dead threshold reaches, so that no run is long enough to overflow.
  waited_F = jnp.minimum(idle_F, 2**30) + 1
  at_risk_F = waited_F > _dead_after(loss, batch, step)
  xc_BD = centred(params, x_BD, sae)
  product_BF, lister = product(params, xc_BD, shard) if shard.chunks == 1 else None, None
  has_auxk = loss.aux_coefficient > 0 and sae.k_aux > 0
  if has_auxk and shard.chunks > 1:
    lister = auxk.lister(at_risk_F, params['b_enc_F'], sae.k_aux, axes)
  if isinstance(kind, Selection):
    heads, made = kind.heads(sae), _selected(kind, params, product_BF, xc_BD, sae, shard, jnp.asarray(step), lister)
    decoded_BDs = list(itertools.accumulate(total(made.decoded_BDs, axes.latent)))
    error_BDs = [x_BD - (decoded_BD + params['b_pre_D'][None]) for decoded_BD in decoded_BDs]
    error_BD = error_BDs[kind.main]
  else:
    heads, made = kind.heads, _elementwise(kind, params, product_BF, xc_BD, sae, coefficient / batch, shard, lister)
    decoded_BDs = total(made.decoded_BDs, axes.latent)
    error_BDs = [x_BD - (decoded_BD + params['b_pre_D'][None]) for decoded_BD in decoded_BDs]
    error_BD = error_BDs[0]

  fired_F = largest(made.fired_F, axes.data)
  idle_F = jnp.where(fired_F > 0, 1, waited_F)
  dead_F = at_risk_F & (fired_F == 0)
  n_dead = total(jnp.sum(dead_F.astype(jnp.int32)), axes.latent)

  if has_auxk:

    def select(bias_F: jax.Array) -> Sparse:
      pre = Preactivations(product_BF, lambda xc_RD: product(params, xc_RD, shard), xc_BD, bias_F)
      return topk.codes(pre, sae.k_aux, shard)

    aux = auxk.gradients(
      params,
      dead_F,
      n_dead,
      error_BD,
      xc_BD,
      product_BF,
      select,
      made.listed,
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
  through_encoder_D = latent.product_F @ encoder(params)
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
