"""What the rest of the library knows of a language model: its sizes, its residual stream, its logits, its tokens."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
import tokenizers

from sae_jax.errors import UserError
from sae_jax.subjects import llama


@dataclasses.dataclass(frozen=True)
class Subject:
  """A loaded language model.

  Attributes:
    name: as in `data.subject`.
    arch: sizes.
    params: the weights of the layers loaded, see `llama.parameter_shapes`.
    tokenizer: text to ids, without any special token.
    start_token: the id that opens every window; its position is dropped before training (it is an attention
      sink with activations up to 150 times larger than the rest).
    provenance: JSON-able facts: file, sha256, tokenizer, quantisation.
  """

  name: str
  arch: llama.Arch
  params: dict[str, jax.Array]
  tokenizer: tokenizers.Tokenizer
  start_token: int
  provenance: dict[str, Any]

  def residual(self, ids_BT: np.ndarray | jax.Array, layer: int) -> jax.Array:
    """The residual stream after layer `layer` (0-based), float32 [B, T, D]."""
    return llama.residual(self.arch, self.params, ids_BT, layer)

  def logits(self, ids_BT: np.ndarray | jax.Array) -> jax.Array:
    """Logits of the next token, float32 [B, T, vocabulary]."""
    return llama.logits(self.arch, self.params, ids_BT)

  def logits_after(self, x_BTD: jax.Array, layer: int) -> jax.Array:
    """Logits when the residual stream after layer `layer` is replaced by `x_BTD`."""
    return llama.logits_after(self.arch, self.params, x_BTD, layer)

  def encode(self, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each text, int32, no special tokens added."""
    return [np.array(e.ids, np.int32) for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]


def layer_of(site: str, n_layers: int) -> int:
  """The layer of a site such as 'resid_post.12'. Raises `UserError` with the range allowed."""
  match = re.fullmatch(r'resid_post\.(0|[1-9][0-9]{0,5})', site)
  if not match or int(match[1]) >= n_layers:
    raise UserError(f'data.site={site!r} is not a site; use resid_post.0 to resid_post.{n_layers - 1}')
  return int(match[1])
