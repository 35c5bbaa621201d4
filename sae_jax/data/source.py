"""What trains and evaluates an autoencoder: a stream of activations addressed by position."""

from typing import Protocol

import numpy as np

from sae_jax.config import Cell


class Source(Protocol):
  """Activations as a pure function of position, so that resuming needs no iterator state.

  Attributes:
    d_model: width D.
    flops_per_token: useful FLOPs of the subject's forward pass for one token; 0 where there is no subject.
    provenance: JSON-able facts for result.json and sae.json: subject, site, normalize, identity, …
  """

  d_model: int
  flops_per_token: float
  provenance: dict

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Training tokens start..stop of the stream over all epochs: float32 [stop - start, D], normalised.

    Batch `step` of B tokens is `rows(step * B, (step + 1) * B)`; a process may ask for its own part of it.
    """
    ...

  def held_out(self, start: int, stop: int) -> np.ndarray:
    """Held-out tokens start..stop, never trained on: float32 [stop - start, D], normalised."""
    ...


def open_source(config: Cell) -> Source:
  """The source that `config.data` names. Raises `UserError` when it is missing or of another width."""
  if config.data.source == 'planted':
    from sae_jax.data import planted

    return planted.Planted(config.data.planted, d_model=config.sae.d_model, order_seed=config.data.seed)
  if config.data.source == 'live':
    from sae_jax.data import live

    return live.Live(config)
  from sae_jax.data import store

  return store.Store(config)
