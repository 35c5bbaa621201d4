"""The codes of a stream of windows by latent, and its text: what predictions of single latents are held against."""

from typing import NamedTuple

import numpy as np

from sae_jax.measures.active import active
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged
from sae_jax.measures.tries import Text


class Codes(NamedTuple):
  """Codes that are not 0, by latent.

  Attributes:
    text: the tokens that count.
    first_F1: the codes of latent f are those from first_F1[f] to first_F1[f + 1].
    where_A: at which token each code is; ascending for one latent.
    value_A: its value.
  """

  text: Text
  first_F1: np.ndarray
  where_A: np.ndarray
  value_A: np.ndarray

  def of(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a latent is active, in order, and its values there."""
    some = slice(self.first_F1[latent], self.first_F1[latent + 1])
    return self.where_A[some], self.value_A[some]


def codes(stream: str, judged: Judged, inputs: Inputs) -> Codes:
  """Those of 'train' or 'held_out'. They stay in memory while this autoencoder is measured."""
  return inputs.once(f'codes of {stream}', judged, lambda: _read(stream, judged, inputs))


def _read(stream: str, judged: Judged, inputs: Inputs) -> Codes:
  blocks = [inputs.block(stream, i) for i in range(inputs.blocks(stream))]
  text = Text(
    np.concatenate([block.windows.ids_WT for block in blocks]), np.concatenate([block.places_WT for block in blocks])
  )
  parts, before = [], 0
  for block in blocks:
    token_A, latent_A, value_A = active(block.counted_BD.reshape(*block.places_WT.shape, -1), judged, inputs)
    parts.append((latent_A, token_A + before, value_A))
    before += block.places_WT.size
  latent_A, where_A, value_A = (np.concatenate(column) for column in zip(*parts, strict=True))
  order_A = np.argsort(latent_A, kind='stable')
  first_F1 = np.searchsorted(latent_A[order_A], np.arange(judged.form.size.n_latents + 1))
  return Codes(text, first_F1, where_A[order_A], value_A[order_A])
