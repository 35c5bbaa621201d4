"""Batches for the training step, on the devices of a mesh: made ahead, so that the step does not wait for them."""

import concurrent.futures
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import jax
from jax.sharding import Mesh

from sae_jax import sharding
from sae_jax.data.source import Source


@runtime_checkable
class MeshSource(Source, Protocol):
  """A source that can make its batches on the devices themselves."""

  def batches(self, mesh: Mesh, batch: int, start: int, stop: int) -> Iterator[jax.Array]:
    """The rows of `Source.rows`, up to rounding, as `feed.batches` gives them."""


def batches(source: Source, mesh: Mesh, batch: int, start: int, stop: int) -> Iterator[jax.Array]:
  """Training batches start, ..., stop - 1: float32 [batch, D], sharded over tokens."""
  if mesh.size > 1 and isinstance(source, MeshSource):
    yield from source.batches(mesh, batch, start, stop)
    return

  def load(step: int) -> jax.Array:
    first = step * batch
    return sharding.place_rows(mesh, (batch, source.d_model), lambda a, b: source.rows(first + a, first + b))

  with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='batches') as pool:
    ahead = pool.submit(load, start) if start < stop else None
    for step in range(start, stop):
      placed = ahead.result()
      ahead = pool.submit(load, step + 1) if step + 1 < stop else None
      yield placed
