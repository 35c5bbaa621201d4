"""Each latent on its own: how often it is active, how strongly, and where.

Tokens are the positions that count of the training windows and of the held-out windows. Arrays of the cell, in
measures/latents.0.safetensors, for F latents and N contexts:

    firings           [F]      tokens where it is active
    mean, max         [F]      of its values where it is active; 0 where it never is
    value_histogram   [F, 32]  of its values; the first and the last bin hold what is beyond them too
    value_edges       [33]     of those bins: half octaves
    density_histogram [24]     how many latents have a share of tokens where they are active; not those that never are
    density_edges     [25]     of those bins, as log10
    top_*             [F, N]   the tokens with its largest values, descending; of equal ones the first
    random_*          [F, N]   tokens drawn from all where it is active, each with the same chance
      *_value         the value there; 0 where a latent has fewer contexts, with -1 in all of the following
      *_held_out      1 for a held-out window, 0 for one of the training text
      *_window        which window of these, in the order of the inputs
      *_document, *_offset   where the window begins: document of the corpus, and token of the document
      *_position      of the token in the window, whose first is the start token
      *_token         its id
"""

import dataclasses
from typing import ClassVar

import numpy as np

from sae_jax.measures.active import active
from sae_jax.measures.best import Best, mixed
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged, Unit, Value

_VALUE_EDGES = 2.0 ** np.linspace(-12, 4, 33)
_DENSITY_EDGES = np.linspace(-6, 0, 25)
_DENSE = 0.1  # of tokens
_RARE = 32  # firings: with fewer a latent can hardly be explained


@dataclasses.dataclass(frozen=True)
class Latents:
  """Settings.

  Attributes:
    contexts: N of each kind.
    seed: of the random ones.
  """

  NAME: ClassVar[str] = 'latents'

  contexts: int = 16
  seed: int = 0

  def units(self, inputs: Inputs) -> int:
    del inputs
    return 1

  def run(self, unit: int, judged: Judged, inputs: Inputs) -> Unit:
    """All blocks, one after another. Beside tables of F rows no more than one block is in memory."""
    del unit
    n, bins = judged.form.size.n_latents, len(_VALUE_EDGES) - 1
    firings_F, max_F, sum_F = np.zeros(n, np.int64), np.zeros(n, np.float32), np.zeros(n)
    histogram_FV = np.zeros((n, bins), np.int64)
    top, drawn = Best(n, self.contexts), Best(n, self.contexts)
    tokens = before = 0
    origins = []
    for held_out, stream in enumerate(('train', 'held_out')):
      for i in range(inputs.blocks(stream)):
        block = inputs.block(stream, i)
        token_A, latent_A, value_A = active(block.counted_BD.reshape(*block.places_WT.shape, -1), judged, inputs)
        firings_F += np.bincount(latent_A, minlength=n)
        sum_F += np.bincount(latent_A, value_A, n)
        np.maximum.at(max_F, latent_A, value_A)
        bin_A = np.searchsorted(_VALUE_EDGES[1:-1], value_A, side='right')
        histogram_FV += np.bincount(latent_A * bins + bin_A, minlength=n * bins).reshape(n, bins)
        some, (windows, counted) = block.windows, block.places_WT.shape
        # A token is known by its window, in the order of all, and its position.
        window_A, position_A = token_A // counted, block.places_WT.reshape(-1)[token_A]
        place_A = (before + window_A) * inputs.window_tokens + position_A
        top.add(latent_A, -value_A.astype(np.float64), place_A, value_A, some.ids_WT[window_A, position_A])
        hash_A = mixed(place_A.astype(np.uint64) ^ mixed(np.array([self.seed], np.uint64)))
        hash_A = mixed(hash_A + latent_A.astype(np.uint64))
        key_A = (hash_A >> np.uint64(11)).astype(np.float64)
        drawn.add(latent_A, key_A, place_A, value_A, some.ids_WT[window_A, position_A])
        origins.append(
          np.stack([np.full(windows, held_out), before + np.arange(windows), some.document_W, some.offset_W])
        )
        tokens, before = tokens + block.places_WT.size, before + windows
    origin_4W = np.concatenate(origins, axis=1)
    # Windows of each stream are counted from 0.
    origin_4W[1] -= np.where(origin_4W[0] == 1, inputs.count('train'), 0)
    alive_F = firings_F > 0
    log10_A = np.log10(firings_F[alive_F] / tokens)
    shares = {'alive': alive_F, 'dense_share': firings_F > _DENSE * tokens, 'rare_share': firings_F < _RARE}
    record = {name: float(which_F.mean()) for name, which_F in shares.items()}
    record |= {'median_log10_density': float(np.median(log10_A))} if len(log10_A) else {}
    arrays = {
      'firings': firings_F,
      'mean': (sum_F / np.maximum(firings_F, 1)).astype(np.float32),
      'max': max_F,
      'value_histogram': histogram_FV.astype(np.int32),
      'value_edges': _VALUE_EDGES,
      'density_histogram': np.histogram(np.clip(log10_A, *_DENSITY_EDGES[[0, -1]]), _DENSITY_EDGES)[0],
      'density_edges': _DENSITY_EDGES,
    }
    for kind, best in (('top', top), ('random', drawn)):
      arrays |= {f'{kind}_{name}': a_FN for name, a_FN in best.contexts(origin_4W, inputs.window_tokens).items()}
    return Unit(record, arrays)

  def values(self, units: list[Unit]) -> dict[str, Value]:
    return {
      name: Value(value, None, 'log10 share of tokens' if 'density' in name else 'share of latents')
      for name, value in units[0].record.items()
      if name != 'arrays_sha256'
    }

  def flops(self, judged: Judged, inputs: Inputs) -> float:
    size, windows = judged.form.size, inputs.count('train') + inputs.count('held_out')
    return windows * inputs.window_tokens * 2 * size.n_latents * size.d_model
