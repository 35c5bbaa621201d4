"""A live subject on the training mesh: its forward pass feeds the step from device memory, with no host or disk between.

Windows are spread over all devices. Calls for the next block are dispatched between training steps, in an order that is
a function of the step alone: processes that launched collectives in different orders would wait for each other forever,
so no thread is used. The rows are those of `live.Live`, up to rounding.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import sharding
from sae_jax.data.reading import Reading, windows_per_call
from sae_jax.data.windows import counting

_ALL = ('data', 'latent')  # windows need no neighbour, so every device takes some


def batches(
  reading: Reading,
  stored: Callable[[jax.Array], jax.Array],
  rows: int,
  mesh: Mesh,
  batch: int,
  start: int,
  stop: int,
) -> Iterator[jax.Array]:
  """Training batches start, ..., stop - 1: float32 [batch, D], sharded over tokens.

  Args:
    reading: the subject and its windows.
    stored: makes of activations [W, T, D] what a store would hold.
    rows: length of the stream over all epochs. No block after it is made ready.
    mesh: of the training step.
    batch: rows in a batch.
    start, stop: steps.
  """
  feed = _Feed(reading, stored, rows, mesh)
  for step in range(start, stop):
    yield feed.take(step * batch, (step + 1) * batch)
    if step + 1 < stop:
      feed.run_ahead((step + 1) * batch, batch)


class _Block:
  """One block on its way through the subject: calls dispatched so far, and the order of its tokens."""

  def __init__(self, windows_WT: np.ndarray, per_call: int, order_B: np.ndarray):
    count = -(-len(windows_WT) // per_call)
    # Padding the last call to the same shape saves a compilation.
    padding = np.repeat(windows_WT[-1:], count * per_call - len(windows_WT), axis=0)
    self.calls_CWT = np.concatenate([windows_WT, padding]).reshape(count, per_call, -1)
    self.order_B = order_B
    self.outputs: list[jax.Array] = []
    self.whole: jax.Array | None = None  # [calls, windows, positions that count, D]


class _Feed:
  def __init__(self, reading: Reading, stored: Callable[[jax.Array], jax.Array], rows: int, mesh: Mesh):
    self._reading, self._rows, self._mesh = reading, rows, mesh
    self._stream = reading.streams['train']
    window = reading.windows['train'].ids_WT.shape[1]
    fair = -(-reading.block_windows // mesh.size)  # no more than a block holds
    self._per_call = mesh.size * min(fair, windows_per_call(mesh.devices.flat[0].platform, window))
    self._blocks: dict[int, _Block] = {}
    self._ahead = -1  # the block that is being made ready
    everywhere = NamedSharding(mesh, P())
    self._params = jax.tree.map(
      lambda a: jax.make_array_from_callback(a.shape, everywhere, lambda index, a=a: np.asarray(a)[index]),
      reading.subject.params,
    )

    def forward(params: dict[str, jax.Array], ids_WT: jax.Array) -> jax.Array:
      x_WTD = dataclasses.replace(reading.subject, params=params).residual(ids_WT, reading.sites[0])
      return stored(counting(x_WTD, reading.positions))

    spread = NamedSharding(mesh, P(_ALL))
    self._forward = jax.jit(forward, in_shardings=(everywhere, spread), out_shardings=spread)
    self._stack = jax.jit(lambda *outputs: jnp.stack(outputs), out_shardings=NamedSharding(mesh, P(None, _ALL)))
    self._take = jax.jit(_make_take(mesh), out_shardings=NamedSharding(mesh, sharding.BATCH))

  def take(self, start: int, stop: int) -> jax.Array:
    """Rows start..stop of the training stream: float32 [stop - start, D], sharded over tokens."""
    parts = self._stream.locate(start, stop)
    kept = {block for block, _, _ in parts} | {self._ahead}
    self._blocks = {block: held for block, held in self._blocks.items() if block in kept}
    x_BD, position = None, 0
    for block, first, last in parts:
      found = self._block(block)
      self._dispatch(found, len(found.calls_CWT))
      if found.whole is None:
        found.whole, found.outputs = self._stack(*found.outputs), []
      rows_B = np.full(stop - start, -1)
      rows_B[position : position + last - first] = found.order_B[first:last]
      part_BD = self._take(found.whole, rows_B)
      x_BD = part_BD if x_BD is None else x_BD + part_BD  # rows of other blocks are 0
      position += last - first
    assert x_BD is not None
    return sharding.settled(self._mesh, x_BD)

  def run_ahead(self, position: int, batch: int) -> None:
    """Dispatches this step's share of the calls of the block after the one that holds `position`."""
    block, first, _ = self._stream.locate(position, position + 1)[0]
    after = position + self._stream.size(block) - first
    if after >= self._rows:
      return
    self._ahead = self._stream.locate(after, after + 1)[0][0]
    following = self._block(self._ahead)
    if following.whole is None:
      steps_left = max(1, (after - position) // batch)
      self._dispatch(following, -(-(len(following.calls_CWT) - len(following.outputs)) // steps_left))

  def _block(self, block: int) -> _Block:
    if block not in self._blocks:
      windows_WT = self._reading.windows_of('train', block).ids_WT
      self._blocks[block] = _Block(windows_WT, self._per_call, self._reading.order_of('train', block))
    return self._blocks[block]

  def _dispatch(self, block: _Block, count: int) -> None:
    if block.whole is not None:
      return
    spread = NamedSharding(self._mesh, P(_ALL))
    for ids_WT in block.calls_CWT[len(block.outputs) :][:count]:
      placed = jax.make_array_from_callback(ids_WT.shape, spread, lambda index, ids_WT=ids_WT: ids_WT[index])
      block.outputs.append(sharding.settled(self._mesh, self._forward(self._params, placed)))


def _make_take(mesh: Mesh) -> Callable[[jax.Array, jax.Array], jax.Array]:
  """`take(block, rows_B)`: the rows of a block by position in it, float32 [B, D], 0 where a row is -1.

  Each device looks up what its windows hold; the sum over devices has one term that is not 0, so it is exact.
  """

  def local(block_CWTD: jax.Array, rows_B: jax.Array) -> jax.Array:
    _, windows, kept, _ = block_CWTD.shape
    device = jax.lax.axis_index('data') * mesh.shape['latent'] + jax.lax.axis_index('latent')
    window_B, position_B = rows_B // kept, rows_B % kept
    call_B, slot_B = window_B // (windows * mesh.size), window_B % (windows * mesh.size) - device * windows
    mine_B = (rows_B >= 0) & (slot_B >= 0) & (slot_B < windows)
    found_BD = block_CWTD[call_B, jnp.clip(slot_B, 0, windows - 1), position_B].astype(jnp.float32)
    found_BD = jax.lax.psum(jnp.where(mine_B[:, None], found_BD, 0), 'latent')
    return jax.lax.psum_scatter(found_BD, 'data', scatter_dimension=0, tiled=True)

  return jax.shard_map(local, mesh=mesh, in_specs=(P(None, _ALL), P()), out_specs=sharding.BATCH, check_vma=False)
