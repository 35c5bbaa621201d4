"""From what was measured to the files of a site: findings become plain data, and templates make these markup.

Templates escape every text they are given. A page says in its head what it was made from; it is kept while that holds.
"""

import functools
import hashlib
import json
import pathlib
import re
from typing import Any

import numpy as np

from sae_jax import files, sae, schema, templates
from sae_jax.errors import UserError
from sae_jax.latent_pages import contexts, effects, graph
from sae_jax.latent_pages.words import Words
from sae_jax.measure import Shown
from sae_jax.measures import run
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged

_VERSION = 4  # of the pages; a page of another is written again
_NUMBERS = 2**28  # logits that are gathered at once
_NEAREST, _ROWS = 8, 512
_SENTENCES = 12  # on a page
_MARK = b'<meta name="made-of" content="%s">'
_PAGES = 'latents'  # the folder of all pages but the list

TEMPLATES = templates.environment(pathlib.Path(__file__).parent / 'templates')


class Site:
  """The pages of some latents of a cell.

  Args:
    of: the cell.
    inputs: what it was measured on.
    latents: ascending.
    ablate: contexts in which each is taken away.
    out: the folder of the pages.

  Raises `UserError` where the measure `latents` is missing, and where a measure is of something else.
  """

  def __init__(self, of: run.Target, inputs: Inputs, latents: np.ndarray, ablate: int, out: str):
    # What no sum of latents makes cannot have one taken off.
    ablate = ablate if sae.has_linear_decoder(of.config.sae) else 0
    self._of, self._inputs, self._latents, self._ablate, self._out = of, inputs, latents, ablate, out
    found = run.finished(of, 'latents', inputs)
    if found is None:
      raise UserError(f'{of.folder} lacks the measure latents; take it with {run.command(of, "latents", inputs)}')
    explained = run.finished(of, 'n2g', inputs)
    (unit,) = found.units
    self._arrays = unit.arrays
    # By that rule activations are shares of the largest, and those from half on count.
    self._of_largest = explained is not None and explained.settings.get('rule') == 'original'
    try:
      self._tries = None if explained is None else graph.tries(explained.units, deepest=self._of_largest)
    except (LookupError, ValueError) as error:
      raise UserError(f'n2g of {of.id} cannot be believed ({error}); delete its n2g.jsonl and take it again') from None
    self.said_of_n2g = 'without explanations: the measure n2g was not taken' if explained is None else 'with n2g'
    self._words = Words(inputs.subject.tokenizer)
    made_of = [_VERSION, ablate, latents.tolist(), *(one and one.digest for one in (found, explained))]
    self._stamp = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]

  def _path(self, latent: int) -> str:
    return files.join(self._out, self._name(latent))

  def _name(self, latent: int) -> str:
    return f'{_PAGES}/{latent:0{self._digits}}.html'

  @functools.cached_property
  def _digits(self) -> int:
    return len(str(self._of.config.sae.n_latents - 1))

  def missing(self) -> np.ndarray:
    """The latents without a page that was made from the same."""
    mark = _MARK % self._stamp.encode()

    def lacks(latent: int) -> bool:
      try:
        return mark not in files.read(self._path(latent), schema.LARGE)
      except (FileNotFoundError, schema.Broken):
        return True

    return np.array([latent for latent in self._latents.tolist() if lacks(latent)], int)

  def left_over(self) -> list[str]:
    """The pages of earlier runs that the list does not name. A file that does not say what it was made from is none."""
    own, mark = {self._name(latent) for latent in self._latents.tolist()}, re.compile(_MARK % b'[0-9a-f]{32}')

    def is_page(name: str) -> bool:
      path = files.join(self._out, name)
      try:
        return not files.is_link(path) and mark.search(files.read(path, schema.LARGE)) is not None
      except (OSError, schema.Broken):
        return False

    names = [f'{_PAGES}/{name}' for name in files.listdir(files.join(self._out, _PAGES))]
    return [n for n in names if n not in own and re.fullmatch(rf'{_PAGES}/[0-9]+\.html', n) and is_page(n)]

  def write(self, progress: Shown) -> int:
    """Writes the pages that are missing, then the list, and removes what is left over; the bytes of the folder."""
    judged = run.judged(self._of)
    direct = effects.direct(judged, self._inputs, self._latents)
    missing = self.missing()
    at_once = max(1, _NUMBERS // self._inputs.subject.arch.vocabulary)
    for first in range(0, len(missing), at_once):
      self._write_some(missing[first : first + at_once], judged, direct, progress)
    files.write_output(files.join(self._out, 'index.html'), self._index(direct).encode(), '--out')
    try:
      for name in self.left_over():
        files.remove(files.join(self._out, name))
    except OSError as error:
      raise UserError(f'cannot tidy {self._out} ({error.strerror}); choose another --out') from None
    return files.size(self._out)

  def _write_some(self, some: np.ndarray, judged: Judged, direct: effects.Effects | None, progress: Shown) -> None:
    """The pages of some latents, for which logits are in memory at once."""
    text = {}
    for kind in contexts.KINDS:
      places = contexts.places(self._arrays, kind, some, self._arrays[f'{kind}_value'].shape[1])
      first_G, last_G = (np.searchsorted(places.latent_R, some, side=side).tolist() for side in ('left', 'right'))
      text[kind] = contexts.around(places, judged, self._inputs), list(map(range, first_G, last_G))
    ablated = None
    if self._ablate:
      places = contexts.places(self._arrays, 'top', some, self._ablate)
      progress.restart(f'{self._of.id} ablation', max(1, len(places.latent_R)))
      ablated = effects.ablated(
        places, judged, self._inputs, some, lambda done: progress.update(done, 'latents taken away')
      )
    nearest_GN, cosine_GN = nearest(np.asarray(judged.params['w_dec_FD']), some)
    progress.restart(f'{self._of.id} pages', len(some))
    for g, latent in enumerate(some.tolist()):
      row = int(np.searchsorted(self._latents, latent))
      lists = [('By its decoder row', None if direct is None else self._effect(direct, row))]
      if ablated is not None and text['top'][1][g]:
        lists.append(('Measured, by taking it away', self._effect(ablated, g)))
      page = self._page(
        latent,
        lists=lists,
        contexts=[
          {'title': f'{kind.capitalize()} contexts', 'rows': self._contexts(latent, around, rows_G[g])}
          for kind, (around, rows_G) in text.items()
        ],
        nearest=[
          {'latent': f, 'cosine': f'{c:.2f}', 'link': self._link(f) if f in self._latents else ''}
          for f, c in zip(nearest_GN[g].tolist(), cosine_GN[g], strict=True)
        ],
      )
      files.write_output(self._path(latent), page.encode(), '--out')
      progress.update(g + 1, 'pages written')

  def _link(self, latent: int) -> str:
    return self._name(latent).rpartition('/')[2]

  @functools.cached_property
  def _tokens(self) -> int:
    inputs = self._inputs
    per_window = inputs.block('train', 0).places_WT.shape[1]
    return per_window * (inputs.count('train') + inputs.count('held_out'))

  def _effect(self, found: effects.Effects, row: int) -> list[dict[str, Any]]:
    """The tokens that are voted up, and those that are voted down."""
    sides = (
      ('up', found.up_GN[row], found.up_value_GN[row]), ('down', found.down_GN[row], found.down_value_GN[row]),
    )  # fmt: skip
    return [
      {
        'side': side,
        'tokens': [(self._words.chip(int(t)), f'{v:+.2f}') for t, v in zip(ids_N, values_N, strict=True)],
      }
      for side, ids_N, values_N in sides
    ]

  def _contexts(self, latent: int, some: contexts.Contexts, rows: range) -> list[dict[str, Any]]:
    """Contexts as runs of text: each has a level of shade from 0 to 5, a value, and whether it is the token itself."""
    shown = []
    top = float(self._arrays['max'][latent])
    for r in rows:
      runs: list[dict[str, Any]] = []

      def add(text: str, runs: list[dict[str, Any]] = runs) -> None:
        if runs and not runs[-1]['level'] and not runs[-1]['middle']:
          runs[-1]['text'] += text
        elif text := text if runs else text.lstrip(' '):
          runs.append({'text': text, 'level': 0, 'middle': False, 'value': ''})

      for w, (token, value) in enumerate(zip(some.id_RW[r].tolist(), some.value_RW[r].tolist(), strict=True)):
        if token < 0:
          continue
        level, middle = min(5, 1 + int(5 * value / top)) if value > 0 else 0, w == contexts.MIDDLE
        text = self._words.plain(token)
        if level or middle:
          # The space before a word is not shaded. A token of spaces alone is, and shows them.
          bare = text.lstrip(' ') or '␣' * len(text)
          add(' ' * (len(text) - len(bare)))
          runs.append({'text': bare, 'level': level, 'middle': middle, 'value': f'{value:.3g}'})
        else:
          add(text)
      where = f'document {some.document_R[r]}, position {some.position_R[r]}'
      if some.held_out_R[r]:
        where += ', held out'
      shown.append({'value': f'{some.value_RW[r, contexts.MIDDLE]:.3g}', 'where': where, 'runs': runs})
    return shown

  def _facts(self, latent: int) -> tuple[int, float]:
    firings = int(self._arrays['firings'][latent])
    return firings, firings / self._tokens

  def _page(self, latent: int, **parts: Any) -> str:
    firings, density = self._facts(latent)
    at = int(np.searchsorted(self._latents, latent))
    before, after = (self._link(int(self._latents[i])) if 0 <= i < len(self._latents) else '' for i in (at - 1, at + 1))
    trie = None if self._tries is None else self._tries.get(latent)
    return TEMPLATES.get_template('latent.html').render(
      stamp=self._stamp,
      latent=latent,
      about=self._about,
      before=before,
      after=after,
      firings=firings,
      tokens=self._tokens,
      density=f'{100 * density:.3g}',
      mean=f'{self._arrays["mean"][latent]:.3g}',
      max=f'{self._arrays["max"][latent]:.3g}',
      bars=bars(self._arrays['value_histogram'][latent], self._arrays['value_edges']),
      n2g=self._tries is not None,
      of_largest=self._of_largest,
      trie=None if trie is None else self._explanation(trie),
      ablate=self._ablate,
      **parts,
    )

  def _explanation(self, trie: graph.Trie) -> dict[str, Any]:
    leaves = trie.leaves()
    return {
      'scores': {name: '\u2013' if value is None else f'{value:.2f}' for name, value in trie.scores.items()},
      'true': trie.true, 'predicted': trie.predicted, 'hits': trie.hits,
      'sentences': [
        (graph.sentence(trie, leaf, self._words), f'{trie.value_N[leaf]:.3g}') for leaf in leaves[:_SENTENCES]
      ],
      'more': max(0, len(leaves) - _SENTENCES),
      'picture': graph.drawn(trie, self._words),
    }  # fmt: skip

  @functools.cached_property
  def _about(self) -> str:
    sae, data = self._of.config.sae, self._of.config.data
    l0 = self._arrays['firings'].sum() / self._tokens
    return f'{sae.activation}, n = {sae.n_latents:,}, L0 = {l0:.3g}, on {data.subject} at {data.site} ({self._of.id})'

  def _index(self, direct: effects.Effects | None) -> str:
    rows = []
    for i, latent in enumerate(self._latents.tolist()):
      _, density = self._facts(latent)
      trie = (self._tries or {}).get(latent)
      scores = trie.scores if trie else {}
      rows.append([
        latent, float(f'{density:.4g}'), float(f'{self._arrays["max"][latent]:.4g}'),
        *(None if scores.get(name) is None else round(scores[name], 2) for name in ('precision', 'recall')),
        '' if direct is None else self._words.chip(int(direct.up_GN[i, 0])),
        '' if trie is None else graph.summary(trie, self._words),
      ])  # fmt: skip
    return TEMPLATES.get_template('index.html').render(
      about=self._about,
      tokens=self._tokens,
      n2g=self._tries is not None,
      of_largest=self._of_largest,
      data={'digits': self._digits, 'rows': rows},
      count=len(rows),
    )


def bars(count_V: np.ndarray, edges: np.ndarray) -> list[dict[str, Any]]:
  """The bars of a histogram between its first and last bin that is not empty; heights from 0 to 100."""
  there = np.flatnonzero(count_V)
  if not len(there):
    return []
  return [
    {'low': f'{edges[i]:.2g}', 'high': f'{edges[i + 1]:.2g}', 'count': int(count_V[i]),
     'height': round(100 * int(count_V[i]) / int(count_V.max()), 1)}
    for i in range(there[0], there[-1] + 1)
  ]  # fmt: skip


def nearest(w_FD: np.ndarray, latents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """For some latents the others with the largest cosines between decoder rows, and these cosines."""
  unit_FD = w_FD / np.maximum(np.linalg.norm(w_FD, axis=1, keepdims=True), 1e-30)
  most = min(_NEAREST, len(w_FD) - 1)
  found, cosines = [], []
  for first in range(0, len(latents), _ROWS):
    some = latents[first : first + _ROWS]
    cosine_GF = unit_FD[some] @ unit_FD.T
    cosine_GF[np.arange(len(some)), some] = -2
    best_GN = np.argpartition(-cosine_GF, most - 1, axis=1)[:, :most] if most else np.zeros((len(some), 0), int)
    value_GN = np.take_along_axis(cosine_GF, best_GN, axis=1)
    order_GN = np.argsort(-value_GN, axis=1, kind='stable')
    found.append(np.take_along_axis(best_GN, order_GN, axis=1))
    cosines.append(np.take_along_axis(value_GN, order_GN, axis=1))
  return np.concatenate(found), np.concatenate(cosines)
