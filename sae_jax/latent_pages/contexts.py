"""The text around the tokens where latents are active, with each latent's activation at every token of it."""

from typing import NamedTuple

import numpy as np

from sae_jax.measures.active import active
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged

KINDS = ('top', 'random')
_BEFORE, _AFTER = 24, 10  # tokens of a context around its own


class Contexts(NamedTuple):
  """R contexts of W tokens, what lies outside of the window filled up.

  Attributes:
    id_RW: the tokens; -1 outside.
    value_RW: of the latent; 0 where it is not active, and at positions that do not count.
    held_out_R, document_R, position_R: where the token in the middle lies.
  """

  id_RW: np.ndarray
  value_RW: np.ndarray
  held_out_R: np.ndarray
  document_R: np.ndarray
  position_R: np.ndarray


MIDDLE = _BEFORE


class Places(NamedTuple):
  """Single tokens at which latents are active."""

  latent_R: np.ndarray
  held_out_R: np.ndarray
  window_R: np.ndarray
  position_R: np.ndarray
  document_R: np.ndarray
  value_R: np.ndarray


def places(arrays: dict[str, np.ndarray], kind: str, latents: np.ndarray, most: int) -> Places:
  """Those that the measure `latents` keeps of some latents, latent by latent, at most so many each."""
  fields = {name: arrays[f'{kind}_{name}'][latents, :most] for name in ('held_out', 'window', 'position', 'document')}
  there_GN = fields['position'] >= 0
  latent_GN = np.broadcast_to(latents[:, None], there_GN.shape)
  found = {f'{name}_R': a_GN[there_GN] for name, a_GN in fields.items()}
  return Places(latent_R=latent_GN[there_GN], value_R=arrays[f'{kind}_value'][latents, :most][there_GN], **found)


def around(some: Places, judged: Judged, inputs: Inputs) -> Contexts:
  """The contexts of some places. The autoencoder encodes the windows again; the language model is not run."""
  offset_W = np.arange(-_BEFORE, _AFTER + 1)
  shape = (len(some.latent_R), len(offset_W))
  id_RW, value_RW = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
  for held_out, stream in enumerate(('train', 'held_out')):
    first = 0
    for i in range(inputs.blocks(stream)):
      block = inputs.block(stream, i)
      ids_WT, counted = block.windows.ids_WT, block.places_WT.shape[1]
      here_R = (some.held_out_R == held_out) & (some.window_R >= first) & (some.window_R < first + len(ids_WT))
      rows = np.flatnonzero(here_R)
      if len(rows):
        found = active(block.counted_BD.reshape(*block.places_WT.shape, -1), judged, inputs)
        dense_WTF = np.zeros((*ids_WT.shape, judged.form.size.n_latents), np.float32)
        token_A = block.places_WT.reshape(-1)[found.token_A]
        dense_WTF[found.token_A // counted, token_A, found.latent_A] = found.value_A
        at_RW = some.position_R[rows, None] + offset_W
        inside_RW = (at_RW >= 0) & (at_RW < ids_WT.shape[1])
        place = (some.window_R[rows, None] - first, np.clip(at_RW, 0, ids_WT.shape[1] - 1))
        id_RW[rows] = np.where(inside_RW, ids_WT[place], -1)
        value_RW[rows] = np.where(inside_RW, dense_WTF[*place, some.latent_R[rows, None]], 0)
      first += len(ids_WT)
  return Contexts(id_RW, value_RW, some.held_out_R, some.document_R, some.position_R)
