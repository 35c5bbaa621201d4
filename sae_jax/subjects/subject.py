"""A language model as the rest of the library sees it. It knows no model family.

A family is a module, see `Family`. It says what a block computes; what is done with blocks stands here once for all.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers

from sae_jax.subjects.files.gguf import GGUF
from sae_jax.subjects.site import Site, parse

# Gets the kind of a site and what the model computed there; gives what the model goes on with.
Tap = Callable[[str, jax.Array], jax.Array]
_TOKENS_AT_ONCE = 256  # whose logits exist at the same time: a vocabulary of 50,000 makes them 50 MB


class Family(Protocol):
  """What the file of a family holds. An `arch` is hashable and has `n_layers` and `context` (the longest window)."""

  def arch_of(self, file: GGUF) -> Any:
    """Sizes and constants of the model in a file."""

  def params_of(self, file: GGUF, arch: Any, n_blocks: int) -> dict[str, np.ndarray]:
    """Float32 weights of the embedding, the first `n_blocks` blocks and the last norm."""

  def widths(self, arch: Any) -> dict[str, int]:
    """The kinds of sites that a block has, resid_pre and resid_post among them, and their widths."""

  def flops(self, arch: Any, site: Site, window_tokens: int) -> float:
    """Useful FLOPs for a token up to a site, on average over the positions of a window."""

  def embed(self, arch: Any, params: dict[str, jax.Array], ids_BT: jax.Array) -> jax.Array:
    """The residual stream that enters the first block: float32 [B, T, D]."""

  def run(self, arch: Any, params: dict[str, jax.Array], x_BTD: jax.Array, first: int, stop: int) -> jax.Array:
    """The residual stream after blocks first, ..., stop - 1, of what enters block `first`."""

  def block(self, arch: Any, params: dict[str, jax.Array], x_BTD: jax.Array, layer: int, tap: Tap) -> jax.Array:
    """One block, with every site of it passed through `tap`. Gives the stream that leaves the block."""

  def unembed(self, arch: Any, params: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
    """Logits of the next token, of the residual stream that leaves the last block: [B, T, vocabulary]."""


@dataclasses.dataclass(frozen=True)
class Subject:
  """A loaded language model.

  Attributes:
    family: the module of its family.
    arch: sizes and constants.
    params: the weights that were loaded.
    n_blocks: how many blocks were.
    tokenizer: text to ids, without any special token.
    start_token: the id that opens every window. It is an attention sink: activations there are far larger than
      elsewhere.
    provenance: JSON-able facts: file, sha256, tokenizer, quantisation.
  """

  family: Family
  arch: Any
  params: dict[str, jax.Array]
  n_blocks: int
  tokenizer: tokenizers.Tokenizer
  start_token: int
  provenance: dict[str, Any]

  def width(self, site: str) -> int:
    """Numbers in an activation at a site. Raises `UserError` for a site that the model does not have."""
    return self.family.widths(self.arch)[self._site(site).kind]

  def flops(self, site: str, window_tokens: int) -> float:
    """Useful FLOPs for a token up to a site, on average over the positions of a window."""
    return self.family.flops(self.arch, self._site(site), window_tokens)

  def residual(self, ids_BT: np.ndarray | jax.Array, site: str) -> jax.Array:
    """Activations at a site, float32 [B, T, D]. Later blocks are not run.

    Raises `UserError` for a site that the model does not have, ValueError when its blocks were not loaded.
    """
    return _residual(self.family, self.arch, self.params, ids_BT, self._loaded(site))

  def residual_at(self, ids_BT: np.ndarray | jax.Array, last_B: np.ndarray | jax.Array, site: str) -> jax.Array:
    """Activations at a site at one position of each row, float32 [B, D].

    Rows may be filled up on their right with any id: no position sees what follows it.
    """
    return self.residual(ids_BT, site)[jnp.arange(len(last_B)), last_B]

  def logits(self, ids_BT: np.ndarray | jax.Array) -> jax.Array:
    """Logits of the next token, float32 [B, T, vocabulary]. Raises ValueError unless all blocks were loaded."""
    self._check_complete()
    return _logits(self.family, self.arch, self.params, ids_BT)

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
    return _next_token(self.family, self.arch, self.params, x_BTD, ids_BT, reference, self._site(site))

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, int32, no special tokens added."""
    return [np.array(e.ids, np.int32) for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

  def encode_with_offsets(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text its token ids, int32 [n], and the characters each of them covers: first and last + 1, [n, 2]."""
    found = self.tokenizer.encode_batch(texts, add_special_tokens=False)
    return [(np.array(e.ids, np.int32), np.array(e.offsets, np.int64).reshape(-1, 2)) for e in found]

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


@functools.partial(jax.jit, static_argnames=('family', 'arch', 'site'))
def _residual(family: Family, arch: Any, params: dict[str, jax.Array], ids_BT: jax.Array, site: Site) -> jax.Array:
  x_BTD = family.run(arch, params, family.embed(arch, params, ids_BT), 0, site.whole)
  if site.between_blocks:
    return x_BTD
  seen: dict[str, jax.Array] = {}
  family.block(arch, params, x_BTD, site.layer, lambda kind, value: seen.setdefault(kind, value))
  return seen[site.kind]  # jit drops what the block computes after it


@functools.partial(jax.jit, static_argnames=('family', 'arch'))
def _logits(family: Family, arch: Any, params: dict[str, jax.Array], ids_BT: jax.Array) -> jax.Array:
  x_BTD = family.run(arch, params, family.embed(arch, params, ids_BT), 0, arch.n_layers)
  return family.unembed(arch, params, x_BTD)


@functools.partial(jax.jit, static_argnames=('family', 'arch', 'site'))
def _next_token(
  family: Family,
  arch: Any,
  params: dict[str, jax.Array],
  x_BTD: jax.Array,
  ids_BT: jax.Array,
  reference_BTD: jax.Array,
  site: Site,
) -> tuple[jax.Array, jax.Array]:
  first = site.whole
  if not site.between_blocks:
    before_BTD = family.run(arch, params, family.embed(arch, params, ids_BT), 0, site.layer)
    given = {site.kind: x_BTD}
    x_BTD = family.block(arch, params, before_BTD, site.layer, lambda kind, value: given.get(kind, value))
    first += 1
  x_BTD = family.run(arch, params, x_BTD, first, arch.n_layers)

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
