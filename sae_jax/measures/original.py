"""Neuron to Graph as first proposed (Foote et al. 2023), on the same pieces of text, without words proposed by a model.

Activations are divided by the latent's largest. An example that reaches half of it gives a pattern: the token itself,
and the tokens before it, up to the last one that matters. A walk goes on below values, and the deepest value counts. A
latent is said to be active where that is at least half of its largest.

There the examples are those of the largest activations. Here they are the bank's, which come first in a random order; a
latent of which none reaches half has an empty trie.
"""

import numpy as np

from sae_jax.measures.explain import Pieces
from sae_jax.measures.tries import ANY, Text, Trie

LEAST = 0.5  # of the largest activation: what counts as active


def trie(of: Pieces, share_X: np.ndarray) -> Trie:
  """The trie of one latent. `share_X`: the activations of its examples, as shares of its largest."""
  made = Trie()
  for i in np.flatnonzero(share_X >= LEAST).tolist():
    matters_L = of.matters_NL[i].copy()
    matters_L[0] = True  # the token that activates
    length = int(np.flatnonzero(matters_L)[-1]) + 1
    made.insert(np.where(matters_L, of.token_NL[i], ANY)[:length].tolist(), float(share_X[i]))
  _merge(made)
  return made


def _merge(node: Trie) -> None:
  """Where any token may follow, what follows the other tokens may follow it too; others without a value go."""
  anything = node.children.get(ANY)
  if anything is not None:
    for token, child in list(node.children.items()):
      if token != ANY:
        _join(anything, child)
        if child.value is None:
          del node.children[token]
  for child in node.children.values():
    _merge(child)


def _join(into: Trie, other: Trie) -> None:
  for token, child in other.children.items():
    mine = into.children.setdefault(token, Trie())
    mine.value = child.value if mine.value is None else mine.value
    _join(mine, child)


def active(of: Trie, text: Text) -> np.ndarray:
  """At which tokens a latent is active by its trie, in order."""
  deepest_B = np.zeros(len(text), np.float32)

  def walk(node: Trie, where_A: np.ndarray, back: int) -> None:
    if node.value is not None:
      deepest_B[where_A] = node.value
    if node.children and len(where_A):
      token_A, there_A = text.before(where_A, back)
      rest_A = there_A
      for token, child in node.children.items():
        if token != ANY:
          hit_A = there_A & (token_A == token)
          rest_A = rest_A & ~hit_A
          walk(child, where_A[hit_A], back + 1)
      if ANY in node.children:
        walk(node.children[ANY], where_A[rest_A], back + 1)

  # The first node is the token itself, and has to be a token.
  for token, child in of.children.items():
    walk(child, text.where(token), 1)
  return np.flatnonzero(deepest_B >= LEAST)
