"""The mesh axes that a per-shard function runs under, and reductions over them that do nothing on one device."""

from typing import NamedTuple, TypeVar

import jax
from jax.typing import DTypeLike

_Tree = TypeVar('_Tree')


class Axes(NamedTuple):
  """Mesh axes the tokens and the latents are sharded over; None where they are not."""

  data: str | None = None
  latent: str | None = None

  @property
  def both(self) -> tuple[str, ...] | None:
    """Those that there are, as one."""
    return tuple(axis for axis in self if axis is not None) or None


class Shard(NamedTuple):
  """Where a per-shard function runs, and how."""

  axes: Axes = Axes()
  dtype: DTypeLike | None = (
    None  # of the encoder's inputs, None for that of the parameters; products are summed in the parameters'
  )
  chunks: int = 1  # parts the tokens are encoded in; in more than one the product [B, F] never exists whole
  exchange: str = 'auto'  # how shards agree on winners; see topk.select
  scatter: bool = False  # whether a data shard keeps its part of the latents' gradients alone


def total(values: _Tree, axis: str | tuple[str, ...] | None) -> _Tree:
  """Sums over all members of an axis, on each of them."""
  return values if axis is None else jax.lax.psum(values, axis)


def scattered(values: _Tree, axis: str | None) -> _Tree:
  """Sums over all members of an axis, of which each keeps its own part of the rows."""
  return values if axis is None else jax.lax.psum_scatter(values, axis, scatter_dimension=0, tiled=True)


def smallest(values: _Tree, axis: str | tuple[str, ...] | None) -> _Tree:
  """Minima over all members of the axes, on each of them."""
  return values if axis is None else jax.lax.pmin(values, axis)


def largest(values: _Tree, axis: str | tuple[str, ...] | None) -> _Tree:
  """Maxima over all members of the axes, on each of them."""
  return values if axis is None else jax.lax.pmax(values, axis)
