"""What the model makes of short pieces of text and of changed ones, at many tokens: kept once for all autoencoders.

Explaining a latent takes its activation on shortened and changed prompts. The model's part of that does not depend on
the autoencoder. So the bank keeps activations of the model at the last token of the prompts, and an autoencoder costs
no more than encoding them.

For each token in the bank, and each length L up to the cap: its last L tokens, and the same with one of them, each in
turn, replaced by the pad. Where the text has fewer tokens, pads stand in front of it. At last its last tokens up to the
cap with one pad in front.

A token is added when some autoencoder needs it, and never changed. The examples of a latent are the tokens where it is
active that come first in one random order of all tokens. So they do not depend on what else is in the bank, and
autoencoders often want the same ones.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from sae_jax import files, schema
from sae_jax.data import windows
from sae_jax.errors import UserError
from sae_jax.measures.active import active
from sae_jax.measures.best import Best, mixed
from sae_jax.measures.inputs import BLOCK_WINDOWS, Inputs
from sae_jax.measures.kept import Arrays, Kept
from sae_jax.measures.measure import Judged
from sae_jax.subjects.subject import Branches

EXAMPLES = 16
SEGMENT = 64  # tokens of the bank that are kept together
_AT_ONCE = 16  # of these, in one call of the model
_VERSION = 1
_LARGEST = 2**28  # bytes of a list of tokens
_LONGEST = 20  # tokens of a piece of text: the scores of attention grow with the sixth power of it


@dataclasses.dataclass(frozen=True)
class Asked:
  """What decides what is in a bank.

  Attributes:
    windows: of the training text; examples are taken from their tokens.
    suffix: the longest piece of text that is tried.
    firings: a latent that is active at fewer of these tokens is not explained.
    pad: the text of the token that takes the place of others.
  """

  windows: int = 512
  suffix: int = 7
  firings: int = 32
  pad: str = ' _'


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
  """The latents of an autoencoder that can be explained, those that are active most often first.

  Attributes:
    latent_E: which.
    firings_E: at how many tokens each is active.
    place_EX: its examples, by window and position: window * T + position.
    value_EX: its values there.
    max_E: its largest value at any token.
    seen_first_E1, seen_token_S: the ids of all tokens where it is active, each once: seen_token_S[first:next].
  """

  latent_E: np.ndarray
  firings_E: np.ndarray
  place_EX: np.ndarray
  value_EX: np.ndarray
  max_E: np.ndarray
  seen_first_E1: np.ndarray
  seen_token_S: np.ndarray

  def seen(self, i: int) -> np.ndarray:
    """The ids of all tokens at which the i-th of them is active."""
    return self.seen_token_S[self.seen_first_E1[i] : self.seen_first_E1[i + 1]]


class Bank:
  """The bank of one subject, site and text.

  Args:
    inputs: names these.
    asked: what is in it.

  Raises `UserError` for a pad that is not one token, for pieces of text that are too long, and for windows of one token.
  """

  def __init__(self, inputs: Inputs, asked: Asked):
    if asked.suffix > _LONGEST:
      raise UserError(
        f'suffix={asked.suffix} is above {_LONGEST}: the prompts would not fit into memory; lower --suffix'
      )
    if inputs.window_tokens < 3:
      raise UserError(
        f'data.window_tokens={inputs.window_tokens} leaves no room for a pad; explain latents of 3 or more'
      )
    (pad_N,) = inputs.subject.encode([asked.pad])
    if len(pad_N) != 1:
      raise UserError(f'pad={asked.pad!r} is {len(pad_N)} tokens of this model; name a text that is one with --pad')
    self._inputs, self._asked, self._pad = inputs, asked, int(pad_N[0])
    self.suffix = min(asked.suffix, inputs.window_tokens - 2)
    self._prompts = _prompts(self.suffix)
    self.windows = inputs.text_windows[: asked.windows]
    facts = inputs.place | {
      'version': _VERSION,
      'corpus': self.windows.corpus,
      'ids': hashlib.sha256(self.windows.ids_WT.astype('<i4').tobytes()).hexdigest(),
      'suffix': self.suffix,
      'pad': self._pad,
    }
    self.identity = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    self._kept = Kept(files.join(inputs.folder, f'bank-{self.identity[:16]}'), self.identity)

  @property
  def rows(self) -> int:
    """Prompts of a token."""
    return self.row(self.suffix + 1) + 1

  @property
  def size(self) -> int:
    """Tokens that belong to the bank."""
    return sum(len(places) for places in self._plans())

  def row(self, length: int) -> int:
    """Where the prompts of a length begin. The first is the text itself, the others have a token replaced, in order."""
    return sum(1 + shorter for shorter in range(1, length))

  def padded_row(self, length: int) -> int:
    """The prompt of a length with one pad in front."""
    return self.row(length + 1) + (1 if length < self.suffix else 0)

  def examples(self, judged: Judged) -> Examples:
    """What an autoencoder wants explained, from its codes of the training text. Kept beside the bank."""
    settings = [self.identity, self._asked.firings]
    found = self._inputs.kept_of(judged, 'examples', settings, lambda: self._examples(judged), self._kept)
    return Examples(**found)

  def tokens_before(self, place_N: np.ndarray) -> np.ndarray:
    """The last tokens of the text at some places, from the place backwards: [N, suffix]; -1 where there are none."""
    window_N, position_N = np.divmod(place_N, self._inputs.window_tokens)
    at_NL = position_N[:, None] - np.arange(self.suffix)
    return np.where(at_NL > 0, self.windows.ids_WT[window_N[:, None], np.maximum(at_NL, 0)], -1)

  def lengths(self, place_N: np.ndarray) -> np.ndarray:
    """How many tokens of text there are up to some places, up to the cap."""
    return np.minimum(place_N % self._inputs.window_tokens, self.suffix)

  def extend(self, place_N: np.ndarray) -> None:
    """Adds tokens to those that belong to the bank. Several workers may do so at once."""
    while True:
      plans = self._plans()
      new = np.setdiff1d(place_N, np.concatenate([*plans, np.zeros(0, np.int64)]))
      if not len(new):
        return
      new = new[np.argsort(rank(new), kind='stable')]
      try:
        record = schema.dump({'places': new.tolist()}, self.identity)
        files.create(self._plan_path(len(plans)), record)
      except FileExistsError:
        continue

  def fill(self, place_N: np.ndarray, part: int, parts: int) -> None:
    """Makes a part of the segments that hold some tokens, as far as no other worker is at it."""
    segments = self._segments(place_N)
    for name in list(segments)[part::parts]:
      self._kept.make(name, functools.partial(self.computed, segments[name][0]))

  def activations(self, judged: Judged, place_N: np.ndarray, latent_N: np.ndarray) -> np.ndarray:
    """What some latents make of the prompts of some tokens, all of which belong to the bank: [N, rows]."""
    found_NR = np.zeros((len(place_N), self.rows), np.float32)
    held: list[tuple[int, np.ndarray]] = []

    def encode() -> None:
      x_PRD = np.stack([x_RD for _, x_RD in held] + [held[-1][1]] * (_AT_ONCE - len(held)))
      token_A, latent_A, value_A = active(x_PRD, judged, self._inputs)
      # Codes are sorted by token: a pair of token and latent is looked up by one number.
      size = judged.form.size.n_latents
      code_A = token_A * size + latent_A
      order_A = np.argsort(code_A)
      code_A, value_A = code_A[order_A], value_A[order_A]
      for p, (place, _) in enumerate(held):
        of_N = by_place[place]
        wanted_NR = (p * self.rows + np.arange(self.rows))[None] * size + latent_N[of_N][:, None]
        at_NR = np.minimum(np.searchsorted(code_A, wanted_NR), max(0, len(code_A) - 1))
        if len(code_A):
          found_NR[of_N] = np.where(code_A[at_NR] == wanted_NR, value_A[at_NR], 0)
      held.clear()

    if not len(place_N):
      return found_NR
    order_N = np.argsort(place_N, kind='stable')
    places, first = np.unique(place_N[order_N], return_index=True)
    by_place = dict(zip(places.tolist(), np.split(order_N, first[1:]), strict=True))
    for name, (all_P, wanted) in self._segments(places).items():
      x_PRD = self._kept.get(name, functools.partial(self.computed, all_P))['x_PRD']
      for p in wanted:
        held.append((int(all_P[p]), x_PRD[p]))
        if len(held) == _AT_ONCE:
          encode()
    if held:
      encode()
    return found_NR

  def strong(self, judged: Judged, examples: Examples, share: float) -> list[np.ndarray]:
    """Of each latent that can be explained, the ids of all tokens at which it reaches a share of its largest value."""
    least_F = np.full(judged.form.size.n_latents, np.inf)
    least_F[examples.latent_E] = share * examples.max_E
    pairs = [
      self._pairs(latent_A[strong_A], token_A[strong_A])
      for latent_A, _, value_A, token_A in self._firings(judged)
      if (strong_A := value_A >= least_F[latent_A]).any()
    ]
    return self._split(pairs, examples.latent_E)

  def _examples(self, judged: Judged) -> Arrays:
    n = judged.form.size.n_latents
    firings_F, max_F, best, seen = np.zeros(n, np.int64), np.zeros(n, np.float32), Best(n, EXAMPLES), []
    for latent_A, place_A, value_A, token_A in self._firings(judged):
      firings_F += np.bincount(latent_A, minlength=n)
      np.maximum.at(max_F, latent_A, value_A)
      best.add(latent_A, rank(place_A), place_A, value_A, token_A)
      seen.append(self._pairs(latent_A, token_A))
    least = max(self._asked.firings, EXAMPLES)
    latent_E = np.flatnonzero(firings_F >= least)
    latent_E = latent_E[np.argsort(-firings_F[latent_E], kind='stable')]
    parts = self._split(seen, latent_E)
    return {
      'latent_E': latent_E.astype(np.int32),
      'firings_E': firings_F[latent_E],
      'place_EX': best.place_FN[latent_E],
      'value_EX': best.value_FN[latent_E],
      'max_E': max_F[latent_E],
      'seen_first_E1': np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64),
      'seen_token_S': np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int32),
    }

  def _firings(self, judged: Judged) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Where latents are active in the text, a block at a time: latent_A, place_A, value_A, and the ids token_A."""
    for i in range(-(-len(self.windows) // BLOCK_WINDOWS)):
      some = self.windows[i * BLOCK_WINDOWS : (i + 1) * BLOCK_WINDOWS]
      x_WTD = self._kept.get(
        f'windows.{i:04d}', lambda ids_WT=some.ids_WT: {'x_WTD': self._inputs.activations(ids_WT)}
      )['x_WTD']
      places_WT = np.asarray(windows.places(x_WTD, self._inputs.positions))
      counted_WTD = np.take_along_axis(x_WTD, places_WT[..., None], axis=1)
      token_A, latent_A, value_A = active(counted_WTD, judged, self._inputs)
      window_A, position_A = token_A // places_WT.shape[1], places_WT.reshape(-1)[token_A]
      place_A = (i * BLOCK_WINDOWS + window_A) * self._inputs.window_tokens + position_A
      yield latent_A, place_A, value_A, some.ids_WT[window_A, position_A]

  def _pairs(self, latent_A: np.ndarray, token_A: np.ndarray) -> np.ndarray:
    """Each pair of a latent and the id of a token once, as one number."""
    return np.unique(latent_A.astype(np.int64) * self._inputs.subject.arch.vocabulary + token_A)

  def _split(self, pairs: list[np.ndarray], latent_E: np.ndarray) -> list[np.ndarray]:
    """The ids that are paired with each of some latents, each once."""
    pair_S = np.unique(np.concatenate([*pairs, np.zeros(0, np.int64)]))
    vocabulary = self._inputs.subject.arch.vocabulary
    first_E, next_E = (np.searchsorted(pair_S, (latent_E + more) * np.int64(vocabulary)) for more in (0, 1))
    return [pair_S[first:after] % vocabulary for first, after in zip(first_E, next_E, strict=True)]

  def computed(self, place_P: np.ndarray) -> Arrays:
    """The model's activations at the last token of every prompt of some tokens, as a segment keeps them."""
    padded_P = np.concatenate([place_P, np.repeat(place_P[-1:], -len(place_P) % _AT_ONCE)])
    x_PRD = np.concatenate([self._residuals_of(padded_P[i : i + _AT_ONCE]) for i in range(0, len(padded_P), _AT_ONCE)])
    return {'x_PRD': x_PRD[: len(place_P)]}

  def _residuals_of(self, place_P: np.ndarray) -> np.ndarray:
    """Activations [P, R, D] at the last tokens of the prompts, from one pass over all that these have in common."""
    inputs, prompts = self._inputs, self._prompts
    before_PL = self.tokens_before(place_P)
    known_PL = np.concatenate(
      [
        np.tile([inputs.subject.start_token, self._pad], (len(place_P), 1)),
        np.where(before_PL < 0, self._pad, before_PL),
      ],
      axis=1,
    )

    def run(both: Any, ids_PT: jax.Array) -> jax.Array:
      subject = dataclasses.replace(inputs.subject, params=both[0])
      return subject.residual_of_branches(ids_PT, inputs.site, prompts.branches)[:, prompts.last_R]

    return inputs.over_windows(('prompts', self.suffix), run, (), known_PL[:, prompts.which_T].astype(np.int32))

  def _segments(self, place_N: np.ndarray) -> dict[str, tuple[np.ndarray, list[int]]]:
    """The segments that hold some tokens: by name all tokens of each, and which of these are asked for."""
    wanted, found = set(place_N.tolist()), {}
    for generation, places in enumerate(self._plans()):
      for i in range(0, len(places), SEGMENT):
        some = places[i : i + SEGMENT]
        if of := [p for p, place in enumerate(some.tolist()) if place in wanted]:
          found[f'{generation:03d}.{i // SEGMENT:05d}'] = some, of
    return found

  def _plan_path(self, generation: int) -> str:
    return files.join(self._kept.folder, 'plans', f'{generation:03d}.json')

  def _plans(self) -> list[np.ndarray]:
    """The tokens of the bank, as they were added."""
    found: list[np.ndarray] = []
    while True:
      path = self._plan_path(len(found))
      try:
        record = schema.parse_large(files.read(path, _LARGEST))
        schema.check(record, (), self.identity)
        found.append(np.array(record['places'], np.int64))
      except FileNotFoundError:
        return found
      except (schema.Broken, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
          f'{path} cannot be believed ({error}); delete the folder of this bank to make it anew'
        ) from None


class _Prompts(NamedTuple):
  """All prompts of a token as branches of one tree.

  Attributes:
    which_T: what each of its tokens is: 0 the start token, 1 the pad, 2 + i the i-th token of the text backwards.
    branches: where each is in its prompt, and what it looks at.
    last_R: the last token of each prompt.
  """

  which_T: np.ndarray
  branches: Branches
  last_R: np.ndarray


def _prompts(suffix: int) -> _Prompts:
  start, pad, text = 0, 1, 2
  which, positions, seen, last = [start], [0], [[0]], list[int]()

  def grow(token: int, parent: int) -> int:
    which.append(token)
    positions.append(positions[parent] + 1)
    seen.append([*seen[parent], len(seen)])
    return len(seen) - 1

  for length in range(1, suffix + 1):
    path = [0]
    for i in range(length):
      path.append(grow(text + length - 1 - i, path[-1]))
    last.append(path[-1])
    for replaced in range(length):
      at = grow(pad, path[replaced])
      for i in range(replaced + 1, length):
        at = grow(text + length - 1 - i, at)
      last.append(at)
  at = grow(pad, 0)
  for i in range(suffix):
    at = grow(text + suffix - 1 - i, at)
  seen_TT = np.zeros((len(seen), len(seen)), bool)
  for i, some in enumerate(seen):
    seen_TT[i, some] = True
  return _Prompts(np.array(which), Branches(np.array(positions), seen_TT), np.array([*last, at]))


def rank(place_N: np.ndarray) -> np.ndarray:
  """The place of tokens in one random order of all."""
  return (mixed(place_N.astype(np.uint64)) >> np.uint64(11)).astype(np.float64)
