"""The trie of a latent as words and as a picture.

A trie is walked from the token where the latent is active to the tokens before it. In the picture that token stands on the
right, so that each line is read as the text is.
"""

from typing import Any, NamedTuple

import numpy as np

from sae_jax.latent_pages.words import Words
from sae_jax.measures.measure import Unit
from sae_jax.measures.tries import ANY, START, Table, check

_LETTERS = 90  # of the patterns in a line
_LEAVES = 24  # of a picture
_ROW, _GAP, _LETTER, _LONGEST = 26, 34, 7.6, 16  # heights and widths in pixels, and letters of a node


class Trie(NamedTuple):
  """What explains one latent.

  Attributes:
    token_N, parent_N, value_N: its nodes. A parent is a place in these arrays, -1 for none.
    scores: precision, recall and f1 on held-out tokens; None where a denominator is 0.
    true, predicted, hits: the counts that these come from.
  """

  token_N: np.ndarray
  parent_N: np.ndarray
  value_N: np.ndarray
  scores: dict[str, float | None]
  true: int
  predicted: int
  hits: int

  def path(self, node: int) -> list[int]:
    """The nodes from the last token to this one."""
    found = []
    while node >= 0:
      found.append(node)
      node = int(self.parent_N[node])
    return found[::-1]

  def leaves(self) -> list[int]:
    """The nodes that predict, the largest activation first."""
    ends = np.flatnonzero(np.isfinite(self.value_N))
    return ends[np.argsort(-self.value_N[ends], kind='stable')].tolist()


def tries(units: list[Unit], deepest: bool = False) -> dict[int, Trie]:
  """By latent, from the arrays of the measure `n2g`. Raises ValueError and LookupError for others.

  `deepest`: walks go on below values, as by the original rule. Otherwise what is below one is never reached, and no
  pattern.
  """
  found = {}
  for a in (unit.arrays for unit in units if unit.arrays):  # the first units make the bank and have none
    check(Table(*(a[name] for name in Table._fields)))
    for e, latent in enumerate(a['latent_E'].tolist()):
      first, last = a['first_E1'][e : e + 2].tolist()
      parent_N = a['parent_N'][first:last]
      true, predicted, hits = (int(a[f'{name}_E'][e]) for name in ('true', 'predicted', 'hits'))
      scores = {
        'precision': hits / predicted if predicted else None,
        'recall': hits / true if true else None,
        'f1': 2 * hits / (true + predicted) if true + predicted else None,
      }
      parent_N, value_N = np.where(parent_N < 0, -1, parent_N - first), a['value_N'][first:last].copy()
      ended_N = np.zeros(len(value_N) + 1, bool)  # the last is that of the root, which -1 names
      for node, parent in enumerate(parent_N.tolist() if not deepest else []):
        if ended_N[parent]:
          value_N[node] = np.nan
        ended_N[node] = ended_N[parent] or np.isfinite(value_N[node])
      nodes = a['token_N'][first:last], parent_N, value_N
      found[latent] = Trie(*nodes, scores, true, predicted, hits)
  return found


def sentence(trie: Trie, node: int, words: Words) -> str:
  """A pattern in words: "' the' after ANY after ' of'"."""
  return ' after '.join(_said(int(trie.token_N[one]), words) for one in trie.path(node))


def summary(trie: Trie, words: Words) -> str:
  """As many patterns as fit into a line, those with the largest activations first, and how many are left out."""
  leaves, said = trie.leaves(), ''
  for i, leaf in enumerate(leaves):
    more = sentence(trie, leaf, words)
    if i and len(said) + len(more) > _LETTERS:
      return f'{said}; and {len(leaves) - i} more'
    said = f'{said}; {more}' if i else more
  return said


def _said(token: int, words: Words) -> str:
  return {ANY: 'ANY', START: 'START'}.get(token) or f"'{words.plain(token)}'"


def drawn(trie: Trie, words: Words) -> dict[str, Any]:
  """The picture of the patterns with the largest activations: nodes and edges, in pixels."""
  shown = trie.leaves()[:_LEAVES]
  paths = {leaf: trie.path(leaf) for leaf in shown}
  children: dict[int, list[int]] = {}
  for path in paths.values():
    for parent, child in zip([-1, *path], path, strict=False):
      if child not in children.setdefault(parent, []):
        children[parent].append(child)
  depth = {node: i for path in paths.values() for i, node in enumerate(path)}
  text = {node: _short(int(trie.token_N[node]), words) for node in depth}
  wide = [
    max(len(text[node]) for node in depth if depth[node] == i) for i in range(max(depth.values(), default=-1) + 1)
  ]
  wide_px = [letters * _LETTER + 14 for letters in wide]
  # The last token is the column on the right; on the left is room for the activations.
  left = [68 + sum(wide_px[i + 1 :]) + _GAP * (len(wide) - 1 - i) for i in range(len(wide))]
  row: dict[int, float] = {}
  order = []  # children before parents
  stack = children.get(-1, [])[::-1]
  while stack:
    node = stack.pop()
    order.append(node)
    stack += children.get(node, [])[::-1]
  for i, leaf in enumerate(node for node in order if node in paths):
    row[leaf] = i
  for node in order[::-1]:
    if node not in row:
      row[node] = float(np.mean([row[child] for child in children[node]]))
  top = max((float(trie.value_N[leaf]) for leaf in shown), default=1.0) or 1.0
  nodes, edges = [], []
  for node in order:
    x, y, w = left[depth[node]], row[node] * _ROW + 4, len(text[node]) * _LETTER + 14
    x += wide_px[depth[node]] - w
    token = int(trie.token_N[node])
    value = float(trie.value_N[node])
    is_leaf = node in paths
    nodes.append({
      'x': x, 'y': y, 'w': w, 'text': text[node], 'kind': {ANY: 'any', START: 'start'}.get(token, 'token'),
      'value': f'{value:.3g}' if is_leaf else '', 'level': 1 + round(4 * max(0.0, value) / top) if is_leaf else 0,
      'full': _said(token, words),
    })  # fmt: skip
    for child in children.get(node, []):
      end = left[depth[child]] + wide_px[depth[child]]
      edges.append({'x1': end, 'y1': row[child] * _ROW + 14, 'x2': x, 'y2': row[node] * _ROW + 14})
  width = left[0] + wide_px[0] + 4 if wide else 0
  return {
    'width': round(width), 'height': len(shown) * _ROW + 4, 'nodes': nodes, 'edges': edges,
    'shown': len(shown), 'total': len(trie.leaves()),
  }  # fmt: skip


def _short(token: int, words: Words) -> str:
  text = {ANY: 'any', START: 'start'}.get(token) or words.chip(token)
  return text if len(text) <= _LONGEST else f'{text[: _LONGEST - 1]}…'
