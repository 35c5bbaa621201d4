"""sae_jax: a scaling-law laboratory for sparse autoencoders."""

__version__ = '0.1.0'


def load(cell: str, weights: str | None = None):
  """The trained autoencoder of a cell folder; see `sae_jax.artifact.load`."""
  from sae_jax import artifact  # imported late, so that `import sae_jax` stays light

  return artifact.load(cell, weights)
