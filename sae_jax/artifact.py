"""The product: a trained autoencoder as safetensors and sae.json, and a small class to use it in a notebook.

No pickle is read. Sizes in sae.json must match the tensors, and inputs are normalised as in training: feeding raw
activations to an autoencoder trained on normalised ones is the commonest silent failure of published SAEs.
"""

import dataclasses
import hashlib
import io
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sae_jax import arrays, cell_state, checks, files, inference, product, schema
from sae_jax.arrays import Array
from sae_jax.config import SAEConfig
from sae_jax.data.normalize import KINDS, normalize
from sae_jax.errors import UserError
from sae_jax.families.family import family
from sae_jax.inference import Activation, Threshold
from sae_jax.sae import dense, has_linear_decoder, kept_shapes

if TYPE_CHECKING:
  from sae_jax.autoencoder import SAE

_WEIGHTS = ('raw', 'ema')
_EARLIEST = 'topk'  # the family of records that name none


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """A trained autoencoder.

  Attributes:
    sae: its parameters.
    info: sae.json: sizes, activation, normalisation, subject, site, which weights these are, and `verified`: whether
      digests covered what was read, which those of earlier versions lack.
  """

  sae: 'SAE'
  info: dict[str, Any]

  def encode(self, x: Any, activation: Activation | None = None) -> tuple[jax.Array, jax.Array]:
    """Values [..., K] and latent indices [..., K] for activations [..., D].

    Under 'center_unit' they may be raw or normalised already. Under 'scale' they are raw. An empty batch has empty
    codes. Inside jit only shapes and types are checked: there are no values to look at.

    Args:
      x: the activations.
      activation: what chooses among the codes: `sae_jax.TopK(k)`, `sae_jax.Threshold(value)`, or None for what the
        family does. Latents that a family has set to 0 itself stay 0.

    Raises:
      UserError: `x` is not an array of finite floats whose last axis is d_model, or `activation` is none of these.
    """
    return self.sae.encode(self._normalized(x)[0], activation)

  def decode(self, z: Any, idx: Any) -> jax.Array:
    """Reconstructions [..., D] in the normalised space, from values and indices [..., K].

    An empty batch is empty again. Inside jit only shapes and types are checked, and a row with an index out of range
    is NaN.

    Raises:
      UserError: `z` and `idx` differ in shape, `z` is not of finite floats, `idx` not of integers in [0, n_latents).
    """
    return self.sae.decode(z, idx)

  def reconstruct(self, x: Any, activation: Activation | None = None) -> Array:
    """Reconstructions [..., D] in the space of the input: the token's norm and mean are put back.

    Numpy, or a tracer inside jit. Raises `UserError` as `encode` does.
    """
    unit, mean, norm = self._normalized(x)
    x_hat = self.decode(*self.sae.encode(unit, activation))
    return (np.asarray(x_hat) if isinstance(unit, np.ndarray) else x_hat) * norm + mean

  def threshold_for(self, x: Any, l0: float) -> Threshold:
    """The threshold with which `l0` latents of a token are active, on average over activations [..., D].

    Take tokens that nothing was trained on. Not for use in jit.

    Raises:
      UserError: `x` as for `encode`, or empty; `l0` is not above 0, or is more than these tokens have codes above 0.
    """
    unit = self._normalized(x)[0]
    if not isinstance(unit, np.ndarray) or not unit.size:
      raise UserError(f'x has shape {unit.shape} and no values to look at; give tokens, and outside of jit')
    params, size = self.sae.params(), self.sae.size
    unit_BD = unit.reshape(-1, unit.shape[-1])
    return inference.threshold_for(lambda x_RD: dense(params, x_RD, size), unit_BD, size.n_latents, l0)

  def refine(self, x: Any, z: Any, idx: Any, steps: int = 500) -> jax.Array:
    """Values [..., K] that reconstruct activations [..., D] best from the latents of `encode`, which stay as they are.

    None is negative, and what is 0 stays 0. So it shows how far an encoder shrinks the values of latents that it chose.
    More `steps` come closer to the optimum. They matter where latents resemble each other.

    Raises:
      UserError: `x` as for `encode`, `z` and `idx` as for `decode`, not one row of them a token, `steps` below 1, or an
        autoencoder that does more to the sum of its latents than add a bias.
    """
    size = self.sae.size
    steps = checks.whole('steps', steps, 1, 2**31 - 1, 'give e.g. 500')
    unit = self._normalized(x)[0]
    z, idx = arrays.codes(z, idx, size.n_latents)
    if unit.shape[:-1] != z.shape[:-1]:
      raise UserError(
        f'x has shape {unit.shape} and z {z.shape}, not one row a token; give z and idx as encode returns them'
      )
    if not has_linear_decoder(size):
      raise UserError(f'activation={size.activation!r} has an output that is not linear; there is nothing to refine')
    if not z.size:
      return jnp.asarray(z)
    target_BD = unit.reshape(-1, unit.shape[-1]) - self.sae.b_pre_D[...][None]
    z_BK, idx_BK = (jnp.asarray(a).reshape(-1, z.shape[-1]) for a in (z, idx))
    return inference.refined(self.sae.w_dec_FD[...], target_BD, z_BK, idx_BK, steps).reshape(z.shape)

  def _normalized(self, x: Any) -> tuple[Array, Array, Array]:
    """Checked activations as the autoencoder wants them [..., D], and the mean and norm [..., 1] that undo it."""
    x = arrays.activations(x, self.info['d_model'])
    flat_BD = x.reshape(-1, x.shape[-1])
    parts = normalize(flat_BD, self.info['normalize'], self.info.get('scale'))
    return tuple(part.reshape(*x.shape[:-1], part.shape[1]) for part in parts)


def save(workdir: str, weights: dict[str, dict[str, np.ndarray]], info: dict[str, Any]) -> dict[str, Any]:
  """Writes `<workdir>/sae/{raw,ema}.safetensors` and then sae.json, each atomically; returns what the result says of them.

  sae.json holds the SHA-256 of the tensor files, and a digest over itself.
  """
  digests, sizes = {}, {}
  for name, params in weights.items():
    data = safetensors.numpy.save({key: np.asarray(params[key], order='C') for key in params})
    files.replace(files.join(workdir, schema.ARTIFACT, f'{name}.safetensors'), data)
    digests[name], sizes[name] = hashlib.sha256(data).hexdigest(), len(data)
  record = schema.dump(info | {'sha256': digests})
  schema.check(schema.parse(record), schema.ARTIFACTS)
  files.replace(files.join(workdir, schema.ARTIFACT, schema.ARTIFACT_INFO), record)
  return product.facts(record, sizes)


def load(cell: str | os.PathLike[str], weights: str | None = None) -> Autoencoder:
  """The autoencoder of a finished cell folder.

  Args:
    cell: a cell folder (holding `sae/`).
    weights: 'raw' or 'ema'; None takes the better on held-out tokens.

  Raises:
    UserError: nothing there, changed since it was written, of another cell, or sizes that do not agree.
  """
  cell = checks.path('cell', cell)
  if weights is not None and not (isinstance(weights, str) and weights in _WEIGHTS):
    raise UserError(f'weights={checks.shown(weights)} is not one of {", ".join(_WEIGHTS)}; None takes the better')
  folder = files.join(cell, schema.ARTIFACT)
  try:
    info = product.info(cell)
    _check_known(info)
    weights = info.get('weights') if weights is None else weights
    if weights not in _WEIGHTS:
      raise schema.Broken(f'weights={weights!r} is not one of {", ".join(_WEIGHTS)}')
    data = io.BytesIO()
    product.tensors(cell, info, weights, data.write)
    params = safetensors.numpy.load(data.getvalue())
  except FileNotFoundError:
    raise UserError(f'{cell_state.printable(folder)} holds no trained autoencoder; is the cell finished?') from None
  except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
    why = cell_state.printable(product.why(error))[:120]
    raise UserError(
      f'{cell_state.printable(cell)} is damaged ({why}); python -m sweeps.retry with its id has it trained again'
    ) from None
  size = size_of(info)
  expected = kept_shapes(size)
  if names := sorted(params.keys() ^ expected.keys()):
    wrong = ', '.join(f'{name} is {"not of it" if name in params else "missing"}' for name in names)
    raise UserError(
      f'{cell_state.printable(folder)}: activation={size.activation!r} has other tensors than these: '
      f'{cell_state.printable(wrong)[:200]}; train the cell again'
    )
  found = {name: tensor.shape for name, tensor in params.items()}
  if found != expected or not all(np.isfinite(t).all() for t in params.values()):
    raise UserError(
      f'{cell_state.printable(folder)}: tensors {found} are not finite arrays of {expected}; train the cell again'
    )
  from sae_jax.autoencoder import SAE  # loads flax, which training does without

  facts = schema.content(info) | {'weights': weights, 'verified': schema.verified(info)}
  return Autoencoder(SAE({name: jnp.asarray(t) for name, t in params.items()}, size), facts)


def size_of(info: Mapping[str, Any]) -> SAEConfig:
  """What of a configuration the use of an autoencoder needs; the rest concerns its training. `info`: a sae.json."""
  return SAEConfig(
    d_model=info['d_model'],
    n_latents=info['n_latents'],
    k=info['k'],
    activation=info.get('activation', _EARLIEST),
    k_aux=0,
    fired_threshold=0.0,
    latent_bias=True,
  )


def _check_known(info: dict[str, Any]) -> None:
  """Raises for what this version would compute wrongly: another family, another normalisation, one without its number."""
  remedy = 'install the version of sae_jax that wrote the autoencoder'
  try:
    family(info.get('activation', _EARLIEST))
  except UserError:
    raise UserError(
      f'activation={checks.shown(info["activation"])} is none that this version knows; {remedy}'
    ) from None
  if info.get('normalize', KINDS[0]) not in KINDS:
    raise UserError(
      f'normalize={checks.shown(info["normalize"])} is none that this version knows ({", ".join(KINDS)}); {remedy}'
    )
  kind, scale = info.get('normalize'), info.get('scale')
  if (kind == 'scale') != (scale is not None and scale > 0):
    raise schema.Broken(f'scale={scale} does not go with normalize={kind!r}')
