"""A language model as the rest of the library sees it. It knows no model family.

A family is a module, see `Family`. It says what a block computes; what is done with blocks stands here once for all.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from sae_jax.errors import UserError
from sae_jax.subjects.layers import attention, causal, mean_seen
from sae_jax.subjects.settings import Settings
from sae_jax.subjects.site import Site, parse

Params = dict[str, Any]
# Gets the kind of a site and what the model computed there; gives what the model goes on with.
Tap = Callable[[str, jax.Array], jax.Array]
# Gets queries [B, T, N, C], scaled, and keys and values [B, T, G, C] of the positions that a block computes, and, where
# the model has them, how far back a position looks and what caps the scores. Gives what is found, [B, T, N * C].
Attend = Callable[..., jax.Array]
_TOKENS_AT_ONCE = 256  # whose logits exist at the same time: a vocabulary of 50,000 makes them 50 MB


class Names(NamedTuple):
  """How a family's tensors are called in files.

  Attributes:
    prefixes: what may stand in front of all names, in the order of trial.
    block: the beginning of the names of a block, with {} for its number.
    embedding: which tensor tells the prefix.
    heads: names of the matrix that makes logits. A file without it uses the embedding.
    ignored: a pattern of tensors that are no weights.
    tied: whether the embedding makes logits where the settings do not say.
  """

  prefixes: tuple[str, ...]
  block: str
  embedding: str
  heads: tuple[str, ...] = ('lm_head.weight',)
  ignored: str = r'.*\.rotary_emb\.inv_freq'
  tied: bool = False


class Tensors(NamedTuple):
  """Shapes of a family's tensors by name: those of every block, without the beginning, and the others."""

  block: dict[str, tuple[int, ...]]
  rest: dict[str, tuple[int, ...]]


class Family(Protocol):
  """What the file of a family holds.

  An `arch` is hashable and has `n_layers`, `d_model`, `vocabulary` and `context`, the longest window.
  """

  NAMES: Names

  def arch_of(self, settings: Settings) -> Any:
    """Sizes and constants of the model with these settings. Raises `UserError` for what the family does not have."""

  def tensors(self, arch: Any) -> Tensors:
    """What a file must hold, beside the head."""

  def block_params(self, arch: Any, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of a block from its tensors."""

  def rest_params(self, arch: Any, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The others. `embedding` is among them."""

  def widths(self, arch: Any) -> dict[str, int]:
    """The kinds of sites that a block has, in the order in which it reaches them, and their widths."""

  def costs(self, arch: Any) -> dict[str, tuple[int, bool]]:
    """For each kind: multiply-adds of a token in the block's matrices before it, and whether attention comes before."""

  def reach(self, arch: Any) -> tuple[int | None, ...]:
    """How many positions each layer looks at; None for all."""

  def embed(self, arch: Any, params: Params, ids_BT: jax.Array, positions_T: jax.Array) -> jax.Array:
    """The residual stream that enters the first block: float32 [B, T, D]."""

  def block(
    self,
    arch: Any,
    p: dict[str, jax.Array],
    x_BTD: jax.Array,
    layer: jax.Array,
    positions_T: jax.Array,
    attend: Attend,
    tap: Tap,
  ) -> jax.Array:
    """One block with its own parameters, every site passed through `tap`. Gives the stream that leaves the block."""

  def unembed(self, arch: Any, params: Params, x_BTD: jax.Array) -> jax.Array:
    """Logits of the next token, of the residual stream that leaves the last block: [B, T, vocabulary]."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=['x_1TD', 'k_LTGC', 'v_LTGC'], meta_fields=['first'])
@dataclasses.dataclass(frozen=True)
class Cache:
  """What a window left behind from a site on: enough to run some of its positions again.

  Attributes:
    x_1TD: what entered the block of the site, for a site inside one.
    k_LTGC, v_LTGC: keys and values of each block that is run again.
    first: the first of these blocks.
  """

  x_1TD: jax.Array | None
  k_LTGC: jax.Array
  v_LTGC: jax.Array
  first: int


class Branches(NamedTuple):
  """Tokens of several texts that begin alike.

  Attributes:
    position_T: which token of its text each one is.
    seen_TT: which tokens each one looks at: itself and those before it in its text.
  """

  position_T: np.ndarray
  seen_TT: np.ndarray


@dataclasses.dataclass(frozen=True)
class Subject:
  """A loaded language model.

  Attributes:
    family: the module of its family.
    arch: sizes and constants.
    params: the weights that were loaded; under 'blocks' those of all blocks, stacked.
    n_blocks: how many blocks were.
    tokenizer: text to ids, without any special token. None for a model that came without.
    start_token: the id that opens every window. It is often an attention sink: activations there are far larger than
      elsewhere.
    provenance: JSON-able facts: file, sha256, tokenizer, quantisation.
  """

  family: Family
  arch: Any
  params: Params
  n_blocks: int
  tokenizer: tokenizers.Tokenizer | None
  start_token: int
  provenance: dict[str, Any]

  def width(self, site: str) -> int:
    """Numbers in an activation at a site. Raises `UserError` for a site that the model does not have."""
    return self.family.widths(self.arch)[self._site(site).kind]

  def flops(self, site: str, window_tokens: int) -> float:
    """Useful FLOPs for a token up to a site, on average over the positions of a window.

    A multiply-add counts two. The matrices count, and the attention's scores and values of the positions that are looked
    at. Norms, softmax and the look-up in the embedding count nothing.
    """
    place, costs = self._site(site), self.family.costs(self.arch)
    (whole, _), (part, looks) = costs['resid_post'], costs[place.kind]
    blocks = place.layer if place.kind != 'resid_post' else place.layer + 1
    matrices = blocks * whole + (0 if place.kind == 'resid_post' else part)
    seen = [mean_seen(window_tokens, reach) for reach in self.family.reach(self.arch)]
    attending = sum(seen[:blocks]) + (seen[place.layer] if looks and place.kind != 'resid_post' else 0)
    return 2 * (matrices + attending * 2 * self.family.widths(self.arch).get('z', 0))

  def residual(self, ids_BT: np.ndarray | jax.Array, site: str) -> jax.Array:
    """Activations at a site, float32 [B, T, D]. Later blocks are not run.

    Raises `UserError` for a site that the model does not have, ids outside the vocabulary and windows beyond the
    context; ValueError when the site's blocks were not loaded.
    """
    return self.residuals(ids_BT, [site])[0]

  def residuals(self, ids_BT: np.ndarray | jax.Array, sites: Iterable[str]) -> tuple[jax.Array, ...]:
    """`residual` at several sites from one pass."""
    return _residuals(
      self.family, self.arch, self.params, self._windows(ids_BT), tuple(self._loaded(site) for site in sites)
    )

  def residual_at(self, ids_BT: np.ndarray | jax.Array, last_B: np.ndarray | jax.Array, site: str) -> jax.Array:
    """Activations at a site at one position of each row, float32 [B, D].

    Rows may be filled up on their right with any id: no position sees what follows it.
    """
    return self.residual(ids_BT, site)[jnp.arange(len(last_B)), last_B]

  def residual_of_branches(self, ids_BT: np.ndarray | jax.Array, site: str, of: Branches) -> jax.Array:
    """Activations at a site of texts that have parts in common, float32 [B, T, D].

    A text is a path from the first token to another. What texts begin with is computed once for all of them.
    """
    ids_BT = self._windows(ids_BT, int(of.position_T.max()) + 1)
    sites = (self._loaded(site),)
    return _residuals(self.family, self.arch, self.params, ids_BT, sites, of.position_T, of.seen_TT)[0]

  def logits(self, ids_BT: np.ndarray | jax.Array) -> jax.Array:
    """Logits of the next token, float32 [B, T, vocabulary]. Raises ValueError unless all blocks were loaded."""
    self._check_complete()
    return _logits(self.family, self.arch, self.params, self._windows(ids_BT))

  def next_token(
    self, x_BTD: jax.Array, ids_BT: np.ndarray | jax.Array, site: str, reference: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """How well the model predicts when the activations at a site are `x_BTD`.

    Logits exist for a few tokens at a time.

    Args:
      x_BTD: goes on in place of what the model computed at the site.
      ids_BT: the windows.
      site: where.
      reference: the residual stream that leaves the last block of the undisturbed model. None has it computed.

    Returns:
      For each token but the first of a window, both [B, T - 1] and in nats: the cross-entropy of the token, and the
      Kullback-Leibler divergence from the undisturbed prediction.

    Raises ValueError unless all blocks were loaded.
    """
    self._check_complete()
    if reference is None:
      reference = self.residual(ids_BT, f'resid_post.{self.arch.n_layers - 1}')
    ids_BT = self._windows(ids_BT)
    return _next_token(self.family, self.arch, self.params, x_BTD, ids_BT, reference, self._site(site))

  def prefix(self, given: np.ndarray | jax.Array, site: str) -> Cache:
    """Runs one window and keeps what `logits_from` needs to run its last positions again from a site.

    Args:
      given: the window's ids [1, T], or what the model computed at the site, [1, T, D], for a site between blocks.
      site: where edits will be made.

    Raises ValueError unless all blocks were loaded, and for activations inside a block: what else enters it is missing.
    """
    self._check_complete()
    place = self._site(site)
    if jnp.issubdtype(given.dtype, jnp.floating):
      if not place.between_blocks:
        raise ValueError(f'{site} is inside a block; give the ids of the window')
      return _prefix_of_stream(self.family, self.arch, self.params, given, place.whole)
    return _prefix(self.family, self.arch, self.params, self._windows(given), place)

  def logits_from(self, cache: Cache, x_PSD: jax.Array, site: str, start: int | jax.Array) -> jax.Array:
    """Logits [P, S, vocabulary] of positions start, ..., start + S - 1, from P edits of a site at these positions.

    Earlier positions are as they were in `cache`, which `prefix` made for the same site.
    """
    self._check_complete()
    if isinstance(start, int) and start + x_PSD.shape[1] > cache.k_LTGC.shape[1] > 0:
      raise ValueError(f'positions {start} to {start + x_PSD.shape[1] - 1} are not all in the window of the cache')
    return _logits_from(self.family, self.arch, self.params, cache, x_PSD, self._site(site), start)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, int32, no special tokens added. Raises `UserError` without a tokenizer."""
    return [np.array(e.ids, np.int32) for e in self._encodings(texts)]

  def encode_with_offsets(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text its token ids, int32 [n], and the characters each of them covers: first and last + 1, [n, 2]."""
    return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in self._encodings(texts)]

  def _encodings(self, texts: list[str]) -> list[tokenizers.Encoding]:
    if self.tokenizer is None:
      raise UserError(
        f'{self.provenance.get("subject", "the model")} has no tokenizer, which text needs; put the tokenizer.json of '
        'the model into its folder'
      )
    try:
      return self.tokenizer.encode_batch(texts, add_special_tokens=False)
    except Exception as error:  # the library raises nothing more special
      raise UserError(
        f'the tokenizer of {self.provenance.get("subject", "the model")} fails on a text ({str(error)[:120]}); take the one '
        'of the model'
      ) from None

  def _windows(self, ids_BT: np.ndarray | jax.Array, tokens: int | None = None) -> np.ndarray | jax.Array:
    """The same ids, checked where they are on the host. Indexing would take an id that is too large for the last."""
    tokens = ids_BT.shape[1] if tokens is None else tokens
    if not 0 < tokens <= self.arch.context:
      raise UserError(f'a window of {tokens} tokens is not from 1 to the context of {self.arch.context}; change it')
    if isinstance(ids_BT, np.ndarray) and ids_BT.size:
      for id_ in (ids_BT.min(), ids_BT.max()):
        if not 0 <= id_ < self.arch.vocabulary:
          raise UserError(
            f'token id {id_} is not in the vocabulary of {self.arch.vocabulary}; use the tokenizer of the model'
          )
    return ids_BT

  def _site(self, site: str) -> Site:
    return parse(site, self.family.widths(self.arch), self.arch.n_layers)

  def _loaded(self, site: str) -> Site:
    parsed = self._site(site)
    if parsed.blocks > self.n_blocks:
      raise ValueError(f'{site} needs {parsed.blocks} blocks and {self.n_blocks} were loaded')
    return parsed

  def _check_complete(self) -> None:
    if self.n_blocks != self.arch.n_layers:
      raise ValueError(f'predictions need all {self.arch.n_layers} blocks and {self.n_blocks} were loaded')


class _Past(NamedTuple):
  """Keys and values [T, G, C] of a block for the positions before `start` of a window that was run."""

  k_TGC: jax.Array
  v_TGC: jax.Array
  start: int | jax.Array


class _Run:
  """Blocks of one model on the same positions."""

  def __init__(
    self, family: Family, arch: Any, params: Params, positions_T: jax.Array, seen_TT: jax.Array | None = None
  ):
    self.family, self.arch, self.params, self.positions_T, self.seen_TT = family, arch, params, positions_T, seen_TT

  def embed(self, ids_BT: jax.Array) -> jax.Array:
    return self.family.embed(self.arch, self.params, ids_BT, self.positions_T)

  def block(
    self, x_BTD: jax.Array, layer: int | jax.Array, tap: Tap, past: _Past | None = None
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The stream that leaves a block, and the keys and values of these positions."""
    # One layer is taken out of the stack at a time: no copy of a part of the stack is made.
    p = jax.tree.map(
      lambda a: jax.lax.dynamic_index_in_dim(a, layer, keepdims=False).astype(jnp.float32), self.params['blocks']
    )
    kept: list[tuple[jax.Array, jax.Array]] = []

    def attend(
      q_BTNC: jax.Array,
      k_BTGC: jax.Array,
      v_BTGC: jax.Array,
      window: int | jax.Array | None = None,
      cap: float | None = None,
    ) -> jax.Array:
      kept.append((k_BTGC, v_BTGC))
      if past is None:
        seen_TT = causal(self.positions_T, self.positions_T, window)
        seen_TT = seen_TT if self.seen_TT is None else seen_TT & self.seen_TT
        return attention(q_BTNC, k_BTGC, v_BTGC, seen_TT, cap)
      before_T = jnp.arange(len(past.k_TGC))
      seen_TS = causal(self.positions_T, jnp.concatenate([before_T, self.positions_T]), window)
      seen_TS &= jnp.concatenate([before_T < past.start, jnp.ones(len(self.positions_T), bool)])[None]
      k_BSGC, v_BSGC = (
        jnp.concatenate([jnp.broadcast_to(old[None], (len(new), *old.shape)), new], axis=1)
        for old, new in ((past.k_TGC, k_BTGC), (past.v_TGC, v_BTGC))
      )
      return attention(q_BTNC, k_BSGC, v_BSGC, seen_TS, cap)

    x_BTD = self.family.block(self.arch, p, x_BTD, jnp.asarray(layer), self.positions_T, attend, tap)
    # A block without attention looks at nothing.
    return x_BTD, kept[0] if kept else (jnp.zeros((*x_BTD.shape[:2], 0, 0)),) * 2

  def blocks(
    self,
    x_BTD: jax.Array,
    first: int,
    stop: int,
    cache: Cache | None = None,
    start: int | jax.Array = 0,
    keep: bool = False,
  ) -> tuple[jax.Array, Any]:
    """The stream after blocks first, ..., stop - 1, and, to be kept, the keys and values of each."""

    def step(x_BTD: jax.Array, layer: jax.Array) -> tuple[jax.Array, Any]:
      past = None
      if cache is not None:
        past = _Past(cache.k_LTGC[layer - cache.first], cache.v_LTGC[layer - cache.first], start)
      x_BTD, found = self.block(x_BTD, layer, _untouched, past)
      return x_BTD, jax.tree.map(lambda a_BTGC: a_BTGC[0], found) if keep else None

    if first == stop and not keep:  # an empty scan is traced all the same, and an empty cache has no layer
      return x_BTD, None
    return jax.lax.scan(step, x_BTD, jnp.arange(first, stop))


def _untouched(kind: str, value: jax.Array) -> jax.Array:
  del kind
  return value


def _run(family: Family, arch: Any, params: Params, window_tokens: int) -> _Run:
  return _Run(family, arch, params, jnp.arange(window_tokens))


@functools.partial(jax.jit, static_argnames=('family', 'arch', 'sites'))
def _residuals(
  family: Family,
  arch: Any,
  params: Params,
  ids_BT: jax.Array,
  sites: tuple[Site, ...],
  positions_T: jax.Array | None = None,
  seen_TT: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
  positions_T = jnp.arange(ids_BT.shape[1]) if positions_T is None else positions_T
  run = _Run(family, arch, params, positions_T, seen_TT)
  x_BTD = run.embed(ids_BT)
  found: dict[Site, jax.Array] = {}
  seen: dict[str, jax.Array] = {}
  done, left_BTD = 0, None  # what enters block `done` is x_BTD; what leaves it, once it was run
  # A set has another order in every process, and a program in another order is compiled again.
  for site in sorted(dict.fromkeys(sites), key=lambda site: site.whole):
    if left_BTD is not None and site.whole > done:
      x_BTD, left_BTD, done = left_BTD, None, done + 1
    x_BTD, _ = run.blocks(x_BTD, done, site.whole)
    done = site.whole
    if not site.between_blocks and left_BTD is None:
      seen = {}
      left_BTD, _ = run.block(x_BTD, done, lambda kind, value, seen=seen: seen.setdefault(kind, value))
    found[site] = x_BTD if site.between_blocks else seen[site.kind]  # jit drops what the block computes after it
  return tuple(found[site] for site in sites)


@functools.partial(jax.jit, static_argnames=('family', 'arch'))
def _logits(family: Family, arch: Any, params: Params, ids_BT: jax.Array) -> jax.Array:
  run = _run(family, arch, params, ids_BT.shape[1])
  x_BTD, _ = run.blocks(run.embed(ids_BT), 0, arch.n_layers)
  return family.unembed(arch, params, x_BTD)


@functools.partial(jax.jit, static_argnames=('family', 'arch', 'site'))
def _next_token(
  family: Family,
  arch: Any,
  params: Params,
  x_BTD: jax.Array,
  ids_BT: jax.Array,
  reference_BTD: jax.Array,
  site: Site,
) -> tuple[jax.Array, jax.Array]:
  run = _run(family, arch, params, ids_BT.shape[1])
  first = site.whole
  if not site.between_blocks:
    before_BTD, _ = run.blocks(run.embed(ids_BT), 0, site.layer)
    x_BTD, _ = run.block(before_BTD, site.layer, _replaced(site.kind, x_BTD))
    first += 1
  x_BTD, _ = run.blocks(x_BTD, first, arch.n_layers)

  def flat(x_BTD: jax.Array) -> jax.Array:
    return x_BTD[:, :-1].reshape(-1, x_BTD.shape[-1])

  def log_p(x_D: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(family.unembed(arch, params, x_D[None, None])[0, 0])

  def compare(token: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    edited_V, clean_V = log_p(token[0]), log_p(token[1])
    return -edited_V[token[2]], jnp.sum(jnp.exp(clean_V) * (clean_V - edited_V))

  next_BT = ids_BT[:, 1:]
  tokens = flat(x_BTD), flat(reference_BTD), next_BT.reshape(-1)
  ce, kl = jax.lax.map(compare, tokens, batch_size=_TOKENS_AT_ONCE)
  return ce.reshape(next_BT.shape), kl.reshape(next_BT.shape)


def _replaced(kind: str, given: jax.Array) -> Tap:
  return lambda here, value: given if here == kind else value


@functools.partial(jax.jit, static_argnames=('family', 'arch', 'site'))
def _prefix(family: Family, arch: Any, params: Params, ids_1T: jax.Array, site: Site) -> Cache:
  first = site.whole
  run = _run(family, arch, params, ids_1T.shape[1])
  x_1TD, _ = run.blocks(run.embed(ids_1T), 0, first)
  cache = _prefix_of_stream(family, arch, params, x_1TD, first)
  return cache if site.between_blocks else dataclasses.replace(cache, x_1TD=x_1TD)


@functools.partial(jax.jit, static_argnames=('family', 'arch', 'first'))
def _prefix_of_stream(family: Family, arch: Any, params: Params, x_1TD: jax.Array, first: int) -> Cache:
  run = _run(family, arch, params, x_1TD.shape[1])
  _, (k_LTGC, v_LTGC) = run.blocks(x_1TD, first, arch.n_layers, keep=True)
  return Cache(None, k_LTGC, v_LTGC, first)


@functools.partial(jax.jit, static_argnames=('family', 'arch', 'site'))
def _logits_from(
  family: Family, arch: Any, params: Params, cache: Cache, x_PSD: jax.Array, site: Site, start: int | jax.Array
) -> jax.Array:
  run = _Run(family, arch, params, start + jnp.arange(x_PSD.shape[1]))
  first = site.whole
  if not site.between_blocks:
    assert cache.x_1TD is not None
    entered_1SD = jax.lax.dynamic_slice_in_dim(cache.x_1TD, start, x_PSD.shape[1], axis=1)
    entered_PSD = jnp.broadcast_to(entered_1SD, (len(x_PSD), *entered_1SD.shape[1:]))
    past = _Past(cache.k_LTGC[0], cache.v_LTGC[0], start)
    x_PSD, _ = run.block(entered_PSD, site.layer, _replaced(site.kind, x_PSD), past)
    first += 1
  x_PSD, _ = run.blocks(x_PSD, first, arch.n_layers, cache, start)
  return family.unembed(arch, params, x_PSD)
