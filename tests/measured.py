"""A finished cell on a tiny language model, for tests of measures."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import artifact, config, files, form, sae, schema
from sae_jax.axes import Shard
from sae_jax.measures import Scope
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged
from tests import cells
from tests.test_harvest import settings

SCOPE = Scope(held_out=11, train=9)  # neither is a whole number of blocks
D, F = 6, 32


def cell(**changes: Any) -> config.Cell:
  """A cell of the toy subject, live, of any family."""
  flat = {
    'data.source': 'live',
    'data.identity': 'none',
    'data.held_out_tokens': 11 * 7,
    'sae.d_model': D,
    'sae.n_latents': F,
    'sae.k': 3,
    'train.batch_tokens': 16,
    'train.tokens': 160,
    'eval.tokens': 43,
    'eval.batch_tokens': 16,
  }
  return config.resolve(config.override(settings(), flat | changes))


def of_family(name: str) -> config.Cell:
  own = cells.family_keys(name)
  return cell(**own | {'sae.k': min(3, own.get('sae.k') or 3) if own.get('sae.k', 3) else None})


def params(c: config.Cell, seed: int = 0) -> sae.Params:
  """Parameters as training starts them, with dead latents and biases."""
  key = jax.random.key(seed)
  made = sae.init_params(key, 0.1 * jax.random.normal(key, (D,)), c.sae)
  made = sae.started(made, jax.random.normal(key, (sae.SAMPLE, D)), c.sae)
  made['b_enc_F'] = made['b_enc_F'] + 0.1 * jax.random.normal(key, (F,)).at[:2].set(-50.0)
  return made | {name: jnp.full(shape, 0.05) for name, shape in sae.kept_shapes(c.sae).items() if name == 'threshold'}


def judged(c: config.Cell, seed: int = 0) -> Judged:
  made = form.Form(c.sae, 'center_unit', None)
  return Judged(c.id, made, params(c, seed), 'f' * 64, 'ema', params(c, seed + 1))


def inputs(folder: pathlib.Path, scope: Scope = SCOPE) -> Inputs:
  return Inputs(cell().data, scope, str(folder), {'subject': 'toy', 'subject_sha256': 'none'})


def finished(folder: pathlib.Path, c: config.Cell, seed: int = 0) -> str:
  """The folder of a cell that looks trained."""
  path = str(folder)
  weights = {
    name: {key: np.asarray(a) for key, a in params(c, s).items()} for name, s in (('raw', seed + 1), ('ema', seed))
  }
  sizes = {
    'id': c.id,
    'n_latents': F,
    'k': c.sae.k,
    'd_model': D,
    'activation': c.sae.activation,
    'weights': 'ema',
    'subject': 'toy',
    'subject_sha256': 'none',
    'site': c.data.site,
    'text': 'toy',
    'normalize': 'center_unit',
    'identity': '',
    'device_kind': 'cpu',
    'versions': {},
  }
  files.replace(files.join(path, schema.CONFIG), c.to_json())
  written = artifact.save(path, weights, sizes)
  files.replace(files.join(path, schema.RESULT), schema.dump(cells.result(c) | written))
  return path


def normalised(x_BD: np.ndarray) -> np.ndarray:
  centred_BD = x_BD - x_BD.mean(axis=1, keepdims=True)
  return centred_BD / np.linalg.norm(centred_BD, axis=1, keepdims=True)


def rebuilt(of: Judged, x_BD: np.ndarray) -> np.ndarray:
  """Reconstructions of raw activations, spelled out: normalised, through the skeleton, and back."""
  mean_B1 = x_BD.mean(axis=1, keepdims=True)
  norm_B1 = np.linalg.norm(x_BD - mean_B1, axis=1, keepdims=True)
  unit_BD = jnp.asarray(normalised(x_BD))
  x_hat_BD, _ = sae.reconstruct(of.params, unit_BD, of.form.size, Shard())
  return np.asarray(x_hat_BD) * norm_B1 + mean_B1


def replaced(of: Judged, **changes: Any) -> Judged:
  return dataclasses.replace(of, **changes)
