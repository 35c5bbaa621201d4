"""sae_jax: a scaling-law laboratory for sparse autoencoders.

In a notebook: `sae = sae_jax.load(cell_folder)`, `sae.encode(x)`, `sae.decode(z, idx)`, and with another activation
`sae.encode(x, sae_jax.TopK(16))`. Nothing heavy is imported before it is used.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from sae_jax.artifact import Autoencoder
  from sae_jax.inference import Threshold, TopK

__all__ = ['Threshold', 'TopK', 'load']
__version__ = '0.1.0'


def __dir__() -> list[str]:
  return [*__all__, '__version__']


def load(cell: str | os.PathLike[str], weights: str | None = None) -> 'Autoencoder':
  """The trained autoencoder of a cell folder; see `sae_jax.artifact.load`."""
  from sae_jax import artifact  # imported late, so that `import sae_jax` stays light

  return artifact.load(cell, weights)


if not TYPE_CHECKING:  # a type checker would take every misspelt name for one of these

  def __getattr__(name: str) -> Any:
    if name in ('Threshold', 'TopK'):
      from sae_jax import inference

      return getattr(inference, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
