"""The codes of a batch on one shard, what the decoder makes of them, and what a family says about its own.

Codes have two forms. `Sparse` codes name their latents, K a token; `Dense` codes hold a value for every latent. The
skeleton in `sae_jax.sae` asks both for the same things. `sae_jax.gradients` has one way for each form to come back from
gradients of the codes to gradients of the parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sae_jax import sparse
from sae_jax.axes import Axes, Shard
from sae_jax.config import SAEConfig
from sae_jax.kernels.loops import Slots
from sae_jax.topk import Preactivations

Latents = dict[str, jax.Array]  # parameters with one number a latent, such as b_enc_F


class Sparse(NamedTuple):
  """K latents a token. Slots that another shard won hold value 0 and gradient 0."""

  z_BK: jax.Array  # not negative; descending along a row wherever not all slots are passed over
  idx_BK: jax.Array  # local indices
  uneven: bool = False  # whether rows use far fewer slots than there are

  def slots(self, axes: Axes) -> Slots:
    """Slots that any row uses. A shard holds k candidates and wins k / shards of them: the rest are not worth a pass."""
    return sparse.used_slots(self.z_BK) if axes.latent or self.uneven else None

  def packed(self) -> 'Sparse':
    """The same with values descending along each row, so that slots which hold 0 are not passed over."""
    return Sparse(*sparse.packed(self.z_BK, self.idx_BK), uneven=True)

  def decode(self, w_dec_FD: jax.Array, slots: Slots) -> jax.Array:
    """This shard's part [B, D] of the reconstruction, without b_pre."""
    return sparse.decode(self.z_BK, self.idx_BK, w_dec_FD, slots)

  def gradient(self, w_dec_FD: jax.Array, g_BD: jax.Array, slots: Slots) -> jax.Array:
    """Gradient [B, K] of the codes for reconstruction gradient g, 0 where a code is 0."""
    return jnp.where(self.z_BK > 0, sparse.code_gradient(self.idx_BK, w_dec_FD, g_BD, slots, uneven=self.uneven), 0)

  def add_weight_gradients(
    self,
    dw_enc_FD: jax.Array,
    dw_dec_FD: jax.Array,
    dz_BK: jax.Array,
    xc_BD: jax.Array,
    g_BD: jax.Array,
    slots: Slots,
  ) -> tuple[jax.Array, jax.Array]:
    """The gradients of encoder and decoder, added to these."""
    args = (dw_enc_FD, dw_dec_FD, self.idx_BK, dz_BK, xc_BD, self.z_BK, g_BD, slots)
    return sparse.add_weight_gradients(*args, uneven=self.uneven)

  def add_at(self, total_F: jax.Array, values_BK: jax.Array) -> jax.Array:
    """Adds a value for every code to the entry of its latent."""
    return sparse.add_at(total_F, self.idx_BK, values_BK)

  def fired(self, n_latents: int, threshold: float) -> jax.Array:
    """Which latents of this shard exceed the threshold for some token: int8 [F]."""
    above_BK = (self.z_BK > threshold).astype(jnp.int8)
    return jnp.zeros(n_latents, jnp.int8).at[self.idx_BK].max(above_BK)

  def active(self) -> jax.Array:
    """This shard's codes that are not 0, of each token: int32 [B]."""
    return jnp.sum(self.z_BK > 0, axis=-1, dtype=jnp.int32)

  def listed(self) -> 'Sparse':
    """These."""
    return self


class Dense(NamedTuple):
  """A value for every latent of the shard."""

  z_BF: jax.Array

  def slots(self, axes: Axes) -> Slots:
    """None: there are no slots."""
    del axes
    return None

  def decode(self, w_dec_FD: jax.Array, slots: Slots = None) -> jax.Array:
    """This shard's part [B, D] of the reconstruction, without b_pre."""
    del slots
    return self.z_BF @ w_dec_FD

  def fired(self, n_latents: int, threshold: float) -> jax.Array:
    """Which latents of this shard exceed the threshold for some token: int8 [F]."""
    del n_latents
    return jnp.max(self.z_BF > threshold, axis=0).astype(jnp.int8)

  def active(self) -> jax.Array:
    """This shard's codes that are not 0, of each token: int32 [B]."""
    return jnp.sum(self.z_BF > 0, axis=-1, dtype=jnp.int32)

  def above(self, threshold: float | jax.Array) -> 'Dense':
    """Those that exceed a threshold."""
    return Dense(jnp.where(self.z_BF > threshold, self.z_BF, 0))

  def listed(self, k: int | None = None) -> Sparse:
    """The k largest as values, descending along a row, and latents. By default as many as the fullest row has, or in jit all."""
    if k is None:
      k = self.z_BF.shape[1] if isinstance(self.z_BF, jax.core.Tracer) else int(jnp.max(self.active(), initial=0))
    return Sparse(*jax.lax.top_k(self.z_BF, k))


@dataclasses.dataclass(frozen=True)
class Head:
  """One reconstruction that a family's codes make, and its part in the loss.

  Attributes:
    weight: of its squared error.
    frozen: whether decoder and b_pre are constants in it. Its gradient then reaches the encoder alone.
  """

  weight: float = 1.0
  frozen: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
  """What families of all kinds say.

  Attributes:
    unit_norm: whether decoder rows have norm 1.
    tied: whether the encoder is the decoder.
    threshold: whether training keeps the least value that made a code, to encode single tokens by.
    latents: parameters beside b_enc_F that have one number a latent, and what that is at first.
    start: what they are when training starts, from the products [B, F] of a sample, where that differs.
  """

  unit_norm: bool = True
  tied: bool = False
  threshold: bool = False
  latents: Mapping[str, float] = dataclasses.field(default_factory=dict)
  start: Callable[[jax.Array, SAEConfig], Latents] | None = None


def _one(size: SAEConfig) -> tuple[Head, ...]:
  del size
  return (Head(),)


@dataclasses.dataclass(frozen=True)
class Selection(_Kind):
  """A family with `Sparse` codes: it chooses latents by their pre-activations.

  Attributes:
    select: the codes of an autoencoder in use.
    parts: the codes of a training step, where they are others: what each head adds to the codes of the head before.
    heads: of an autoencoder of these sizes, in the order of the parts.
    main: which of them is the reconstruction.
  """

  select: Callable[[Preactivations, SAEConfig, Shard], Sparse]
  parts: Callable[[Preactivations, SAEConfig, Shard, jax.Array], tuple[Sparse, ...]] | None = None
  heads: Callable[[SAEConfig], tuple[Head, ...]] = _one
  main: int = 0


@dataclasses.dataclass(frozen=True)
class Elementwise(_Kind):
  """A family with `Dense` codes: each code depends on its own pre-activation alone. It sees no mesh and no weight.

  Attributes:
    codes: from the product x W_enc^T [B, F], the parameters of the latents and the sizes: the codes [B, F] of each
      head, and the penalty [B] before its coefficient, of this shard's latents.
    heads: the first is the reconstruction.
  """

  codes: Callable[[jax.Array, Latents, SAEConfig], tuple[tuple[jax.Array, ...], jax.Array]]
  heads: tuple[Head, ...] = (Head(),)


class OwnSums(NamedTuple):
  """Of a step of a family with a loss of its own: sums over all tokens of all shards."""

  square_error: jax.Array
  penalty: jax.Array


@dataclasses.dataclass(frozen=True)
class Own(_Kind):
  """A family with `Dense` codes and a loss of its own.

  Attributes:
    input: what the encoder multiplies, from x [B, D].
    codes: from the product and the parameters of the latents.
    output: the reconstruction, from codes times decoder plus b_pre.
    init: the two matrices.
    gradients: from parameters, x [B, D] of this shard, sizes, coefficient, global batch and shard: reduced gradients
      and sums.
  """

  input: Callable[[jax.Array, SAEConfig], jax.Array]
  codes: Callable[[jax.Array, Latents, SAEConfig], jax.Array]
  output: Callable[[jax.Array, SAEConfig], jax.Array]
  init: Callable[[jax.Array, SAEConfig], Latents]
  gradients: Callable[..., tuple[Latents, OwnSums]]


Kind = Selection | Elementwise | Own
