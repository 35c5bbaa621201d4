"""Where in a language model activations are taken: 'resid_post.12' is a kind of place, a dot, and a block.

resid_pre   the residual stream as it enters the block
z           what the attention heads found, side by side
attn_out    what attention adds to the stream
resid_mid   the stream between attention and MLP
mlp_post    what the last matrix of the MLP reads
mlp_out     what the MLP adds to the stream
resid_post  the stream as it leaves the block
"""

import dataclasses
import re
from collections.abc import Iterable

from sae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Site:
  """Hashable, so that it can be a static argument. `layer` counts blocks from 0."""

  kind: str
  layer: int

  @property
  def whole(self) -> int:
    """Blocks that run from end to end before the site is reached."""
    return self.layer + (self.kind == 'resid_post')

  @property
  def blocks(self) -> int:
    """Blocks whose weights the site needs."""
    return self.layer + (self.kind != 'resid_pre')

  @property
  def between_blocks(self) -> bool:
    return self.kind in ('resid_pre', 'resid_post')


def parse(text: str, kinds: Iterable[str], n_layers: int) -> Site:
  """The site that a text names. `kinds` are those that the model has. Raises `UserError` with what is allowed."""
  kind, _, number = text.partition('.')
  if kind not in kinds or not re.fullmatch(r'0|[1-9][0-9]{0,5}', number) or int(number) >= n_layers:
    raise UserError(
      f'data.site={text!r} is not a site; use one of {", ".join(kinds)}, a dot, and a layer from 0 to {n_layers - 1}'
    )
  return Site(kind, int(number))
