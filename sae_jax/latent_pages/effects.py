"""Which tokens a latent makes more and less likely: by its decoder row alone, and by taking it away where it is active."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.latent_pages.contexts import Places
from sae_jax.measures.inputs import BLOCK_WINDOWS, Inputs
from sae_jax.measures.measure import Judged
from sae_jax.subjects.site import parse

MOST = 10  # tokens each way
_LATENTS = 256  # whose logits exist at once
_EDITS, _STEP = 128, 32  # that run at once
_WRITING = ('resid_pre', 'attn_out', 'resid_mid', 'mlp_out', 'resid_post')  # sites whose activations add to the stream


class Effects(NamedTuple):
  """For each latent the tokens with the largest logits and those with the least, and these logits."""

  up_GN: np.ndarray
  up_value_GN: np.ndarray
  down_GN: np.ndarray
  down_value_GN: np.ndarray


def direct(judged: Judged, inputs: Inputs, latents: np.ndarray) -> Effects | None:
  """Logits of the decoder row as though it were the whole stream, less those of nothing, less their mean over tokens.

  The last norm makes the length of the row irrelevant. None for a site that does not write into the stream.
  """
  if inputs.site.partition('.')[0] not in _WRITING:
    return None
  subject = inputs.subject
  rest = jax.device_put({name: a for name, a in subject.params.items() if name != 'blocks'})
  w_FD = np.asarray(judged.params['w_dec_FD'])
  found = []
  for first in range(0, len(latents), _LATENTS):
    some = latents[first : first + _LATENTS]
    # Filled up, so that there is one program.
    w_GD = w_FD[np.resize(some, _LATENTS)]
    found.append([np.asarray(a)[: len(some)] for a in _direct(subject.family, subject.arch, rest, w_GD)])
  return Effects(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


@functools.partial(jax.jit, static_argnames=('family', 'arch'))
def _direct(family: Any, arch: Any, params: dict[str, Any], w_GD: jax.Array) -> tuple[jax.Array, ...]:
  both = jnp.concatenate([w_GD, jnp.zeros_like(w_GD[:1])])
  logits_GV = family.unembed(arch, params, both[None])[0]
  return _extremes(logits_GV[:-1] - logits_GV[-1:])


@jax.jit
def _extremes(x_GV: jax.Array) -> tuple[jax.Array, ...]:
  x_GV -= jnp.mean(x_GV, axis=1, keepdims=True)
  most = min(MOST, x_GV.shape[1])
  up, down = jax.lax.top_k(x_GV, most), jax.lax.top_k(-x_GV, most)
  return up[1], up[0], down[1], -down[0]


def ablated(
  some: Places, judged: Judged, inputs: Inputs, latents: np.ndarray, update: Callable[[int], None]
) -> Effects:
  """How far the next token's logits fall when a latent is taken away at one token, on average over its places.

  What it writes there is taken off the activation; the autoencoder's error stays. The mean over tokens is taken off, for
  it changes no prediction.

  Args:
    some: places of these latents.
    judged: the autoencoder.
    inputs: its windows.
    latents: [G].
    update: hears after each window how many places are done.
  """
  subject = dataclasses.replace(inputs.subject, params=jax.device_put(inputs.subject.params))
  site, w_FD = inputs.site, np.asarray(judged.params['w_dec_FD'])
  between = parse(site, subject.family.widths(subject.arch), subject.arch.n_layers).between_blocks

  @jax.jit
  def logits(params: Any, cache: Any, x_PD: jax.Array, at_P: jax.Array) -> jax.Array:
    now = dataclasses.replace(subject, params=params)
    return jax.vmap(lambda x_D, at: now.logits_from(cache, x_D[None, None], site, at)[0, 0])(x_PD, at_P)

  def run(cache: Any, x_PD: np.ndarray, at_P: np.ndarray) -> np.ndarray:
    parts = []
    for first in range(0, len(at_P), _EDITS):
      n = min(_EDITS, len(at_P) - first)
      # Filled up to one of a few lengths, for each of which a program is compiled.
      pick = first + np.minimum(np.arange(-(-n // _STEP) * _STEP), n - 1)
      parts.append(np.asarray(logits(subject.params, cache, x_PD[pick], at_P[pick]))[:n])
    return np.concatenate(parts)

  row_F = np.zeros(judged.form.size.n_latents, np.int64)
  row_F[latents] = np.arange(len(latents))
  change_GV = np.zeros((len(latents), subject.arch.vocabulary), np.float32)
  done = 0
  for held_out, stream in enumerate(('train', 'held_out')):
    of_stream_R = some.held_out_R == held_out
    for window in np.unique(some.window_R[of_stream_R]).tolist():
      rows = np.flatnonzero(of_stream_R & (some.window_R == window))
      x_TD, ids_T = _window(inputs, stream, window)
      cache = subject.prefix(jnp.asarray(x_TD[None]) if between else ids_T[None], site)
      at_P, clean_R = np.unique(some.position_R[rows], return_inverse=True)
      _, _, norm_P1 = judged.form.unit(jnp.asarray(x_TD[at_P]))
      written_RD = (some.value_R[rows, None] * np.asarray(norm_P1)[clean_R]) * w_FD[some.latent_R[rows]]
      x_RD = np.concatenate([x_TD[at_P], x_TD[at_P][clean_R] - written_RD])
      found_RV = run(cache, x_RD, np.concatenate([at_P, at_P[clean_R]]))
      clean_PV, without_RV = found_RV[: len(at_P)], found_RV[len(at_P) :]
      for i, r in enumerate(rows.tolist()):
        change_GV[row_F[some.latent_R[r]]] += clean_PV[clean_R[i]] - without_RV[i]
      done += len(rows)
      update(done)
  change_GV /= np.maximum(np.bincount(row_F[some.latent_R], minlength=len(latents)), 1)[:, None]
  parts = [map(np.asarray, _extremes(change_GV[i : i + _LATENTS])) for i in range(0, len(latents), _LATENTS)]
  return Effects(*(np.concatenate(one) for one in zip(*parts, strict=True)))


def _window(inputs: Inputs, stream: str, window: int) -> tuple[np.ndarray, np.ndarray]:
  """Raw activations [T, D] and ids [T]."""
  block = inputs.block(stream, window // BLOCK_WINDOWS)
  return block.x_WTD[window % BLOCK_WINDOWS], block.windows.ids_WT[window % BLOCK_WINDOWS]
