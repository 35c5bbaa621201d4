"""A toy language model's inputs of measures, and autoencoders of any family with random numbers to be judged on them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import config, form, sae, subjects
from sae_jax.config import SAEConfig
from sae_jax.measures import Scope
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged, Measure, Unit, Value
from sae_jax.subjects import text
from tests.test_harvest import settings, toy_subject, toy_text

D_MODEL = 6
FAMILIES = ('topk', 'batchtopk', 'relu', 'gated', 'jumprelu_step', 'cs294a')  # one of each kind


def inputs(folder: Any) -> Inputs:
  """20 held-out windows in three blocks, and 18 of the training text."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(subjects, 'load', toy_subject)
    patch.setattr(text, 'load', toy_text)
    flat = {
      'data.source': 'live',
      'data.identity': toy_subject('').provenance['subject_sha256'],
      'data.held_out_tokens': 7 * 20,
      'data.store_tokens': 7 * 18,
      'sae.d_model': D_MODEL,
      'train.tokens': 8,
      'train.batch_tokens': 4,
      'eval.tokens': 4,
      'eval.batch_tokens': 2,
    }
    return Inputs(config.resolve(config.override(settings(), flat)).data, Scope(20, 18), str(folder), {})


def judged(family: str, n_latents: int = 16, k: int = 3, normalize: str = 'center_unit', **params: Any) -> Judged:
  """Random numbers for every parameter; `params` replaces some."""
  size = SAEConfig(
    d_model=D_MODEL, n_latents=n_latents, k=k, activation=family, k_aux=0, fired_threshold=0.0, latent_bias=True
  )
  rng = np.random.default_rng(7)
  drawn = {name: 0.1 * rng.standard_normal(shape) for name, shape in sae.kept_shapes(size).items()}
  first = sae.init_params(jax.random.key(3), jnp.zeros(D_MODEL), size)
  both = {name: np.asarray(a + first.get(name, 0), np.float32) for name, a in drawn.items()}
  both |= {'threshold': np.float32(0.3)} if 'threshold' in both else {}
  made = {name: jnp.asarray(a) for name, a in (both | params).items()}
  other = {name: a + 0.01 for name, a in made.items()}
  scale = 0.5 if normalize == 'scale' else None
  return Judged('cell', form.Form(size, normalize, scale), made, 'tensors', 'ema', other)


def units(measure: Measure, of: Judged, on: Inputs) -> list[Unit]:
  return [measure.run(unit, of, on) for unit in range(measure.units(on))]


def values(measure: Measure, of: Judged, on: Inputs) -> dict[str, Value]:
  return measure.values(units(measure, of, on))


def numbers(measure: Measure, of: Judged, on: Inputs) -> dict[str, float]:
  return {name: value.value for name, value in values(measure, of, on).items()}


def counted(on: Inputs, stream: str = 'held_out') -> np.ndarray:
  """All raw activations [B, D] that count, in order."""
  return np.concatenate([on.block(stream, i).counted_BD for i in range(on.blocks(stream))])
