"""A few tokens of each latent out of all: the best by some key, or drawn at random."""

import numpy as np

_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class Best:
  """For each latent the N tokens with the lowest keys; of equal keys the first tokens.

  Attributes:
    place_FN: where the tokens are; -1 where a latent has fewer.
    value_FN: the latent's values there.
  """

  def __init__(self, latents: int, contexts: int):
    shape = (latents, contexts)
    self._key_FN, self.place_FN = np.full(shape, np.inf), np.full(shape, -1, np.int64)
    self.value_FN, self._token_FN = np.zeros(shape, np.float32), np.full(shape, -1, np.int32)

  def add(self, latent_A: np.ndarray, key_A: np.ndarray, *fields: np.ndarray) -> None:
    """Tokens that come after all that were added before. `fields`: place, value, id."""
    beats_A = key_A < self._key_FN[latent_A, -1]
    latent_A, key_A = latent_A[beats_A], key_A[beats_A]
    touched = np.unique(latent_A)
    kept = (self._key_FN, self.place_FN, self.value_FN, self._token_FN)
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
    absent_FN = self.place_FN < 0
    window_FN, position_FN = np.divmod(np.maximum(self.place_FN, 0), window_tokens)
    names = ('held_out', 'window', 'document', 'offset')
    found = dict(zip(names, origin_4W[:, window_FN], strict=True)) | {'position': position_FN}
    found = {name: np.where(absent_FN, -1, a_FN).astype(np.int32) for name, a_FN in found.items()}
    return {'value': self.value_FN, 'token': self._token_FN} | found


def mixed(a_A: np.ndarray) -> np.ndarray:
  """Whole numbers that look random, one for each (SplitMix64)."""
  a_A = a_A + _ODD[0]
  a_A = (a_A ^ (a_A >> np.uint64(30))) * _ODD[1]
  a_A = (a_A ^ (a_A >> np.uint64(27))) * _ODD[2]
  return a_A ^ (a_A >> np.uint64(31))
