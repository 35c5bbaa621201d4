"""The skeleton of every autoencoder: parameters, initialisation, encoding and decoding on one shard.

    pre = (x - b_pre) W_enc^T + b_enc,   z = the family's codes of pre,   x_hat = z W_dec + b_pre

A family (`sae_jax.families`) says how codes come from pre-activations. All else is here, and knows no family.
A per-shard function takes a `Shard`, which names the mesh axes it runs under. The default is the one-device mathematics.
Gao et al. 2024, sections 2.3, 3 and A. The gradients of a step are in `sae_jax.gradients`.
"""

import math

import jax
import jax.numpy as jnp

from sae_jax import inference
from sae_jax.axes import Axes, Shard, total
from sae_jax.codes import Dense, Kind, Latents, Own, Selection, Sparse
from sae_jax.config import SAEConfig
from sae_jax.families import topk
from sae_jax.families.family import family
from sae_jax.topk import Preactivations

# w_enc_FD (not where it is the decoder), w_dec_FD, b_enc_F, b_pre_D, and the family's own with one number a latent.
Params = dict[str, jax.Array]
SAMPLE = 256  # rows of the first tokens that a family may start from
_PROBED = 4096  # latents whose products stand for those of all at the start


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
  xc_BD = centred(params, x_BD, size)
  product_BF = product(params, xc_BD, shard) if shard.chunks == 1 else None
  if isinstance(kind, Selection) and 'threshold' not in params:
    return product_BF, kind.select(preactivations(params, product_BF, xc_BD, size, shard, exact), size, shard), xc_BD
  kept_BF = product(params, xc_BD, shard) if product_BF is None else product_BF
  codes = Dense(_dense_codes(kind, params, kept_BF, size))
  return product_BF, codes.above(params['threshold']) if 'threshold' in params else codes, xc_BD


def dense(params: Params, x_BD: jax.Array, size: SAEConfig) -> jax.Array:
  """The codes [B, F] before any choice among them, on one device: those of a selection are ReLU of its pre-activations."""
  return _dense_codes(kind_of(size), params, product(params, centred(params, x_BD, size), Shard()), size)


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
  xc_BD = centred(params, x_BD, size)
  product_BF = product(params, xc_BD, Shard())
  return topk.codes(preactivations(params, product_BF, xc_BD, size, Shard(), exact=True), activation.k, Shard())


def _dense_codes(kind: Kind, params: Params, product_BF: jax.Array, size: SAEConfig) -> jax.Array:
  if isinstance(kind, Selection):
    return jax.nn.relu(product_BF + params['b_enc_F'][None])
  if isinstance(kind, Own):
    return kind.codes(product_BF, latents_of(params), size)
  zs, _ = kind.codes(product_BF, latents_of(params), size)
  return zs[0]


def centred(params: Params, x_BD: jax.Array, size: SAEConfig) -> jax.Array:
  kind = kind_of(size)
  return kind.input(x_BD, size) if isinstance(kind, Own) else x_BD - params['b_pre_D'][None]


def output(sum_BD: jax.Array, size: SAEConfig) -> jax.Array:
  """What leaves the autoencoder: the family's own last step after decoder and b_pre, where it has one."""
  kind = kind_of(size)
  return kind.output(sum_BD, size) if isinstance(kind, Own) else sum_BD


def product(params: Params, xc_BD: jax.Array, shard: Shard) -> jax.Array:
  dtype = shard.dtype or xc_BD.dtype
  return jnp.einsum(
    'bd,fd->bf',
    xc_BD.astype(dtype),
    encoder(params).astype(dtype),
    preferred_element_type=xc_BD.dtype,
  )


def latents_of(params: Params) -> Latents:
  return {name: value for name, value in params.items() if name.endswith('_F')}


def encoder(params: Params) -> jax.Array:
  return params.get('w_enc_FD', params['w_dec_FD'])


def preactivations(
  params: Params, product_BF: jax.Array | None, xc_BD: jax.Array, size: SAEConfig, shard: Shard, exact: bool
) -> Preactivations:
  recall_target = size.recall_target if size.selection == 'approximate' and not exact else None
  bias_F = params['b_enc_F']
  return Preactivations(product_BF, lambda xc_RD: product(params, xc_RD, shard), xc_BD, bias_F, recall_target)


def _decode(params: Params, codes: Sparse | Dense, axes: Axes) -> jax.Array:
  return total(codes.decode(params['w_dec_FD'], codes.slots(axes)), axes.latent)


def reconstruct(params: Params, x_BD: jax.Array, size: SAEConfig, shard: Shard) -> tuple[jax.Array, Sparse | Dense]:
  """Reconstruction [B, D], summed over shards, and this shard's codes."""
  _, codes, _ = encode(params, x_BD, size, shard)
  return decoded(params, codes, size, shard), codes


def decoded(params: Params, codes: Sparse | Dense, size: SAEConfig, shard: Shard) -> jax.Array:
  """Reconstruction [B, D] of this shard's codes, summed over shards."""
  return output(_decode(params, codes, shard.axes) + params['b_pre_D'][None], size)
