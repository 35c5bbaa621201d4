"""The product: a trained autoencoder as safetensors and sae.json, and a small class to use it in a notebook.

No pickle is read. Sizes in sae.json must match the tensors, and inputs are normalised as in training: feeding raw
activations to an autoencoder trained on normalised ones is the commonest silent failure of published SAEs.
"""

import dataclasses
import hashlib
import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from sae_jax import cell_state, files, product, schema
from sae_jax.data.normalize import KINDS, normalize
from sae_jax.errors import UserError
from sae_jax.sae import SAE

_WEIGHTS = ('raw', 'ema')
TENSORS = ('w_enc_FD', 'w_dec_FD', 'b_enc_F', 'b_pre_D')


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """A trained autoencoder.

  Attributes:
    sae: its parameters.
    info: sae.json: sizes, activation, normalisation, subject, site, which weights these are, and `verified`: whether
      digests covered what was read, which those of earlier versions lack.
  """

  sae: SAE
  info: dict[str, Any]

  def encode(self, x: Any) -> tuple[jax.Array, jax.Array]:
    """Values [..., K] and latent indices [..., K] for activations [..., D].

    Under 'center_unit' they may be raw or normalised already. Under 'scale' they are raw.
    """
    x = np.asarray(x, np.float32)
    flat_BD = self._normalize(x)[0]
    codes = self.sae.encode(jnp.asarray(flat_BD))
    return tuple(a.reshape(*x.shape[:-1], -1) for a in codes)

  def decode(self, z: Any, idx: Any) -> jax.Array:
    """Reconstructions [..., D] in the normalised space, from values and indices [..., K]."""
    z, idx = jnp.asarray(z), jnp.asarray(idx)
    x_BD = self.sae.decode(z.reshape(-1, z.shape[-1]), idx.reshape(-1, idx.shape[-1]))
    return x_BD.reshape(*z.shape[:-1], -1)

  def reconstruct(self, x: Any) -> np.ndarray:
    """Reconstructions [..., D] in the space of the input: the token's norm and mean are put back."""
    x = np.asarray(x, np.float32)
    _, mean_B1, norm_B1 = self._normalize(x)
    x_hat_BD = np.asarray(self.decode(*self.encode(x))).reshape(-1, self.info['d_model'])
    return (x_hat_BD * norm_B1 + mean_B1).reshape(x.shape)

  def _normalize(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return normalize(x.reshape(-1, self.info['d_model']), self.info['normalize'], self.info.get('scale'))


def save(workdir: str, weights: dict[str, dict[str, np.ndarray]], info: dict[str, Any]) -> dict[str, Any]:
  """Writes `<workdir>/sae/{raw,ema}.safetensors` and then sae.json, each atomically; returns what the result says of them.

  sae.json holds the SHA-256 of the tensor files, and a digest over itself.
  """
  digests, sizes = {}, {}
  for name, params in weights.items():
    data = safetensors.numpy.save({key: np.ascontiguousarray(params[key]) for key in TENSORS})
    files.replace(files.join(workdir, schema.ARTIFACT, f'{name}.safetensors'), data)
    digests[name], sizes[name] = hashlib.sha256(data).hexdigest(), len(data)
  record = schema.dump(info | {'sha256': digests})
  schema.check(schema.parse(record), schema.ARTIFACTS)
  files.replace(files.join(workdir, schema.ARTIFACT, schema.ARTIFACT_INFO), record)
  return product.facts(record, sizes)


def load(cell: str, weights: str | None = None) -> Autoencoder:
  """The autoencoder of a finished cell folder.

  Args:
    cell: a cell folder (holding `sae/`).
    weights: 'raw' or 'ema'; None takes the better on held-out tokens.

  Raises:
    UserError: nothing there, changed since it was written, of another cell, or sizes that do not agree.
  """
  folder = files.join(str(cell), schema.ARTIFACT)
  data = io.BytesIO()
  try:
    info = product.info(str(cell))
    _check_normalisation(info)
    weights = weights or str(info.get('weights'))
    if weights not in _WEIGHTS:
      raise UserError(f'weights={weights!r} is not one of {", ".join(_WEIGHTS)}')
    product.tensors(str(cell), info, weights, data.write)
    params = safetensors.numpy.load(data.getvalue())
  except FileNotFoundError:
    raise UserError(f'{folder} holds no trained autoencoder; is the cell finished?') from None
  except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
    why = cell_state.printable(product.why(error))[:120]
    raise UserError(
      f'{cell} is damaged ({why}); python -m sweeps.retry with its id has it trained again'
    ) from None
  n, d, k = info['n_latents'], info['d_model'], info['k']
  expected = {'w_enc_FD': (n, d), 'w_dec_FD': (n, d), 'b_enc_F': (n,), 'b_pre_D': (d,)}
  found = {name: tensor.shape for name, tensor in params.items()}
  if found != expected or not all(np.isfinite(t).all() for t in params.values()):
    raise UserError(f'{folder}: tensors {found} are not finite arrays of {expected}; train the cell again')
  facts = schema.content(info) | {'weights': weights, 'verified': schema.verified(info)}
  return Autoencoder(SAE({name: jnp.asarray(t) for name, t in params.items()}, k=k), facts)


def _check_normalisation(info: dict[str, Any]) -> None:
  """Raises `schema.Broken` where it is not known what inputs must go through: any guess encodes to plausible numbers."""
  kind, scale = info.get('normalize'), info.get('scale')
  if kind not in KINDS:
    raise schema.Broken(f'normalize={kind!r} is not one of {", ".join(KINDS)}')
  if (kind == 'scale') != (scale is not None and scale > 0):
    raise schema.Broken(f'scale={scale} does not go with normalize={kind!r}')
