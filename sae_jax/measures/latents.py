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
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged, Unit, Value

_VALUE_EDGES = 2.0 ** np.linspace(-12, 4, 33)
_DENSITY_EDGES = np.linspace(-6, 0, 25)
_DENSE = 0.1  # of tokens
_RARE = 32  # firings: with fewer a latent can hardly be explained
_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


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
    top, drawn = _Best(n, self.contexts), _Best(n, self.contexts)
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
        hash_A = _mixed(place_A.astype(np.uint64) ^ _mixed(np.array([self.seed], np.uint64)))
        hash_A = _mixed(hash_A + latent_A.astype(np.uint64))
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


class _Best:
  """For each latent the N tokens with the lowest keys; of equal keys the first tokens."""

  def __init__(self, latents: int, contexts: int):
    shape = (latents, contexts)
    self._key_FN, self._place_FN = np.full(shape, np.inf), np.full(shape, -1, np.int64)
    self._value_FN, self._token_FN = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)

  def add(self, latent_A: np.ndarray, key_A: np.ndarray, *fields: np.ndarray) -> None:
    """Tokens that come after all that were added before. `fields`: place, value, id."""
    beats_A = key_A < self._key_FN[latent_A, -1]
    latent_A, key_A = latent_A[beats_A], key_A[beats_A]
    touched = np.unique(latent_A)
    kept = (self._key_FN, self._place_FN, self._value_FN, self._token_FN)
    given = (key_A, *(field_A[beats_A] for field_A in fields))
    both = [np.concatenate([a_FN[touched].reshape(-1), a_A]) for a_FN, a_A in zip(kept, given, strict=True)]
    latent_A = np.concatenate([np.repeat(touched, self._key_FN.shape[1]), latent_A])
    # What is there already comes first among equals.
    order_A = np.lexsort((both[0], latent_A))
    sorted_A = latent_A[order_A]
    rank_A = np.arange(len(sorted_A)) - np.searchsorted(sorted_A, sorted_A)
    wins_A = rank_A < self._key_FN.shape[1]
    for a_FN, a_A in zip(kept, both, strict=True):
      a_FN[sorted_A[wins_A], rank_A[wins_A]] = a_A[order_A][wins_A]

  def contexts(self, origin_4W: np.ndarray, window_tokens: int) -> dict[str, np.ndarray]:
    """The tokens as they are saved. `origin_4W`: of each window whether it is held out, which it is, document, offset."""
    absent_FN = self._place_FN < 0
    window_FN, position_FN = np.divmod(np.maximum(self._place_FN, 0), window_tokens)
    names = ('held_out', 'window', 'document', 'offset')
    found = dict(zip(names, origin_4W[:, window_FN], strict=True)) | {'position': position_FN}
    found = {name: np.where(absent_FN, -1, a_FN).astype(np.int32) for name, a_FN in found.items()}
    return {'value': self._value_FN, 'token': self._token_FN} | found


def _mixed(a_A: np.ndarray) -> np.ndarray:
  """Whole numbers that look random, one for each (SplitMix64)."""
  a_A = a_A + _ODD[0]
  a_A = (a_A ^ (a_A >> np.uint64(30))) * _ODD[1]
  a_A = (a_A ^ (a_A >> np.uint64(27))) * _ODD[2]
  return a_A ^ (a_A >> np.uint64(31))
