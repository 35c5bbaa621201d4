"""Patterns of tokens that say when a latent is active: a trie for each, walked from a token backwards (Foote et al. 2023).

The path from the root names the token itself, the one before it, and so on. ANY stands for any one token, START for the
beginning of the text. The first node on the way that holds a value ends the walk: that is the latent's value.
"""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

ANY, START = -1, -2


@dataclasses.dataclass
class Trie:
  """A node and what is below it.

  Attributes:
    value: what is predicted where a walk comes here; None where it goes on.
    children: by the next token backwards, ANY or START.
  """

  value: float | None = None
  children: dict[int, 'Trie'] = dataclasses.field(default_factory=dict)

  def insert(self, path: list[int], value: float) -> None:
    """Adds a pattern, from its last token backwards. A later one takes the place of an earlier one that is the same."""
    node = self
    for token in path:
      node = node.children.setdefault(token, Trie())
    node.value = value


class Text:
  """Tokens that tries are asked about.

  Args:
    ids_WT: windows, each opening with the start token, which is no part of the text.
    places_WP: the positions that are asked about, in order; none is the start token.

  Attributes:
    token_B: the tokens that are asked about.
  """

  def __init__(self, ids_WT: np.ndarray, places_WP: np.ndarray):
    self._ids = ids_WT.reshape(-1)
    self._left_B = places_WP.reshape(-1)  # tokens of the text up to each one, itself among them
    self._at_B = (np.arange(len(ids_WT))[:, None] * ids_WT.shape[1] + places_WP).reshape(-1)
    self.token_B = self._ids[self._at_B]
    self._order_B = np.argsort(self.token_B, kind='stable')
    self._sorted_B = self.token_B[self._order_B]

  def __len__(self) -> int:
    return len(self._at_B)

  def where(self, token: int) -> np.ndarray:
    """Which of the tokens are this one, in order."""
    first, last = np.searchsorted(self._sorted_B, [token, token + 1])
    return self._order_B[first:last]

  def where_any(self, tokens: np.ndarray) -> np.ndarray:
    """Which of the tokens are among these, in order."""
    among = np.zeros(max(int(self.token_B.max(initial=0)), int(tokens.max(initial=0))) + 1, bool)
    among[tokens] = True
    return np.flatnonzero(among[self.token_B])

  def before(self, where_A: np.ndarray, back: int) -> tuple[np.ndarray, np.ndarray]:
    """Of some of the tokens: the token so many before each, and whether the text has one there."""
    there_A = self._left_B[where_A] > back
    return self._ids[np.where(there_A, self._at_B[where_A] - back, 0)], there_A


def predict(trie: Trie, text: Text) -> tuple[np.ndarray, np.ndarray]:
  """Where a latent is active by its trie, in order, and its value there."""
  found: list[tuple[np.ndarray, float]] = []

  def walk(node: Trie, where_A: np.ndarray, back: int) -> None:
    if node.value is not None:
      found.append((where_A, node.value))
    elif len(where_A):
      token_A, there_A = text.before(where_A, back)
      if START in node.children:
        found.append((where_A[~there_A], node.children[START].value or 0.0))
      rest_A = there_A
      for token, child in node.children.items():
        if token >= 0:
          hit_A = there_A & (token_A == token)
          rest_A = rest_A & ~hit_A
          walk(child, where_A[hit_A], back + 1)
      if ANY in node.children:
        walk(node.children[ANY], where_A[rest_A], back + 1)

  rest_B = np.ones(len(text), bool) if ANY in trie.children else None
  for token, child in trie.children.items():
    if token >= 0:
      where_A = text.where(token)
      if rest_B is not None:
        rest_B[where_A] = False
      walk(child, where_A, 1)
  if rest_B is not None:
    walk(trie.children[ANY], np.flatnonzero(rest_B), 1)
  where_A = np.concatenate([where_A for where_A, _ in found]) if found else np.zeros(0, np.int64)
  value_A = np.concatenate([np.full(len(where_A), value, np.float32) for where_A, value in found] or [np.zeros(0)])
  order_A = np.argsort(where_A, kind='stable')
  return where_A[order_A], value_A[order_A].astype(np.float32)


class Table(NamedTuple):
  """The tries of several latents as arrays.

  Attributes:
    first_E1: where the nodes of each begin, and at last how many there are.
    token_N: what a node stands for.
    parent_N: which node it hangs from; -1 for the root.
    value_N: its value; NaN where the walk goes on.
  """

  first_E1: np.ndarray
  token_N: np.ndarray
  parent_N: np.ndarray
  value_N: np.ndarray


def table(tries: list[Trie]) -> Table:
  """Parents come before their children."""
  first, tokens, parents, values = [0], list[int](), list[int](), list[float]()

  def add(node: Trie, parent: int) -> None:
    for token, child in node.children.items():
      tokens.append(token)
      parents.append(parent)
      values.append(float('nan') if child.value is None else child.value)
      add(child, len(tokens) - 1)

  for trie in tries:
    add(trie, -1)
    first.append(len(tokens))
  return Table(
    np.array(first, np.int64), np.array(tokens, np.int32), np.array(parents, np.int32), np.array(values, np.float32)
  )


def read(of: Table) -> Iterator[Trie]:
  """The tries of a table, one after another. Raises ValueError for arrays that are no such table."""
  check(of)
  for first, last in zip(of.first_E1[:-1], of.first_E1[1:], strict=True):
    root, nodes = Trie(), dict[int, Trie]()
    for i in range(first, last):
      parent, value = int(of.parent_N[i]), float(of.value_N[i])
      nodes[i] = Trie(None if np.isnan(value) else value)
      (nodes[parent] if parent != -1 else root).children[int(of.token_N[i])] = nodes[i]
    yield root


def check(of: Table) -> None:
  """Raises ValueError for arrays that are no table. In one that is, every way up ends at a root."""
  sizes = {len(of.token_N), len(of.parent_N), len(of.value_N), *of.first_E1[-1:].tolist()}
  steps_E = np.diff(of.first_E1)
  if len(sizes) != 1 or not len(of.first_E1) or of.first_E1[0] != 0 or (steps_E < 0).any():
    raise ValueError('the tables of nodes do not fit each other')
  if (of.token_N < START).any():
    raise ValueError(f'a node stands for {of.token_N.min()}, which is no token')
  first_N = np.repeat(of.first_E1[:-1], steps_E)
  fits_N = (of.parent_N == -1) | ((first_N <= of.parent_N) & (of.parent_N < np.arange(len(of.parent_N))))
  if not fits_N.all():
    i = int(np.argmin(fits_N))
    raise ValueError(f'node {i} hangs from {of.parent_N[i]}, which is no earlier node of its trie')
