"""Neuron to Graph, simplified: a trie from the examples of a latent (Gao et al. 2024, section 4.3).

Of each example the shortest piece of text that keeps half of the activation is taken, up to a cap. Its tokens whose
replacement costs half of that are part of the pattern, and any token may stand in place of the others. Where a pad in
front costs half, the pattern holds at the beginning of a text only. No other model proposes words.
"""

from typing import NamedTuple

import numpy as np

from sae_jax.measures.bank import Bank
from sae_jax.measures.tries import ANY, START, Trie

HALF = 0.5


class Pieces(NamedTuple):
  """What was found out about N examples.

  Attributes:
    length_N: tokens of the piece of text.
    value_N: the activation at its end.
    movable_N: whether it keeps half of the activation behind a pad.
    token_NL: the tokens of the text from the last one backwards.
    matters_NL: of those within the piece, which ones cannot be replaced.
  """

  length_N: np.ndarray
  value_N: np.ndarray
  movable_N: np.ndarray
  token_NL: np.ndarray
  matters_NL: np.ndarray


def pieces(bank: Bank, place_N: np.ndarray, value_N: np.ndarray, found_NR: np.ndarray) -> Pieces:
  """The pieces of text that explain examples.

  Where no piece up to the cap keeps half, the longest is taken, with the activation that the whole text has.

  Args:
    bank: of the prompts.
    place_N: where the examples are.
    value_N: the activations there, above 0.
    found_NR: what the latent of each makes of its prompts.
  """
  tokens_NL, most_N, n = bank.tokens_before(place_N), bank.lengths(place_N), np.arange(len(place_N))
  length_N, kept_N = most_N.copy(), value_N.astype(np.float64)
  for length in range(bank.suffix, 0, -1):
    at_N = found_NR[:, bank.row(length)].astype(np.float64)
    enough_N = (length <= most_N) & (at_N / value_N >= HALF)
    length_N, kept_N = np.where(enough_N, length, length_N), np.where(enough_N, at_N, kept_N)
  rows_L = np.array([bank.row(length) for length in range(bank.suffix + 2)])
  padded_L = np.array([0] + [bank.padded_row(length) for length in range(1, bank.suffix + 1)])
  movable_N = found_NR[n, padded_L[length_N]] / value_N >= HALF
  matters_NL = np.zeros(tokens_NL.shape, bool)
  for back in range(bank.suffix):
    within_N = back < length_N
    # Replaced tokens are counted from the front of the piece.
    row_N = np.where(within_N, rows_L[length_N] + length_N - back, 0)
    matters_NL[:, back] = within_N & (1 - found_NR[n, row_N] / kept_N >= HALF)
  return Pieces(length_N, kept_N, movable_N, tokens_NL, matters_NL)


def simplified(of: Pieces) -> Trie:
  """The trie of one latent from its examples. Of two that say the same the later one counts."""
  trie = Trie()
  for i, length in enumerate(of.length_N.tolist()):
    path = np.where(of.matters_NL[i, :length], of.token_NL[i, :length], ANY).tolist()
    trie.insert(path if of.movable_N[i] else [*path, START], float(of.value_N[i]))
  return trie
