"""Where arrays live: the (data, latent) mesh, partition specs by array name, and host-to-device placement."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.axes import Axes
from sae_jax.config import Cell, MeshConfig
from sae_jax.errors import UserError

# By what the name of an array ends with: its axes. Moments and EMA share their parameter's name and so its layout.
_LAYOUTS = {'_FD': P('latent', None), '_F': P('latent'), '_D': P()}
BATCH = P('data', None)
_CPU_PRODUCT = 2**28  # bytes


def layout(name: str, shape: tuple[int, ...]) -> P:
  """Where a state array lies while it is used, by the suffix of its name; scalars are everywhere.

  Raises ValueError for an array that no rule covers. Replicated in silence, it would cost its size on every chip.
  """
  found = next((where for suffix, where in _LAYOUTS.items() if name.endswith(suffix)), None)
  if found is None and shape:
    raise ValueError(f'{name} {shape} has no layout; end its name with one of {", ".join(_LAYOUTS)}')
  return P() if found is None else found


def layouts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, P]:
  """`layout` of every array."""
  return {name: layout(name, shape) for name, shape in shapes.items()}


def at_rest(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
  """The layout of a state array between steps: latents over both axes, where they divide evenly.

  So a chip keeps and updates 1/data of what its latent shard holds (gradients, moments, EMA), and the parameters are
  gathered over the data axis once a step; see `Cell.state_is_split`.
  """
  spec = layout(name, shape)
  if name == 'idle_F' or not spec or mesh.shape['data'] == 1 or shape[0] % mesh.size:
    return spec
  return P(('latent', 'data'), *spec[1:])


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh over the first data x latent devices. Raises `UserError` when there are fewer.

  With several CPU devices, this process no longer uses jax's cache of compiled programs: see `_compile_anew`.
  """
  devices = jax.devices() if devices is None else devices
  size = config.data * config.latent
  if size > len(devices):
    raise UserError(
      f'mesh.data={config.data} x mesh.latent={config.latent} needs {size} devices and there are '
      f'{len(devices)}; use a smaller mesh'
    )
  if len({getattr(device, 'slice_index', 0) for device in devices[:size]}) > 1:
    raise UserError(f'mesh.data={config.data} x mesh.latent={config.latent} spans TPU slices; use one slice a cell')
  if size > 1 and devices[0].platform == 'cpu':
    _compile_anew()
  # Where a mesh axis is no axis of the torus (4 x 128 on 8x8x8), jax.make_mesh refuses; split one instead.
  placed = mesh_utils.create_device_mesh((config.data, config.latent), devices[:size], allow_split_physical_axes=True)
  # Auto and said so: under Explicit every gather and scatter wants an out_sharding.
  return Mesh(placed, ('data', 'latent'), axis_types=(AxisType.Auto,) * 2)


def _compile_anew() -> None:
  """Has this process neither read nor write jax's cache of compiled programs from here on.

  A program that XLA's CPU client reads from that cache no longer orders the collectives inside its loops and branches
  against the others (jaxlib 0.10.2). One device may enter a loop while another waits in a sum outside of it, and both
  wait for ever.
  """
  if jax.config.jax_enable_compilation_cache:
    jax.config.update('jax_enable_compilation_cache', False)
    compilation_cache.reset_cache()  # jax asks for the setting once


def axes_of(mesh: Mesh) -> Axes:
  """Axis names for the per-shard functions; None for an axis of size 1, which then costs nothing."""
  return Axes(*(name if mesh.shape[name] > 1 else None for name in ('data', 'latent')))


def compiler_options(mesh: Mesh) -> dict[str, str | bool] | None:
  """Options for `jax.jit` of a training step on this mesh.

  XLA's CPU backend hands reductions and elementwise chains to YNNPACK, which stalls on the row norms and adds
  copies: the step took 1,019 ms with all of it, 741 with none, 571 with its plain matmuls alone
  (d=768, n=32,768, B=2,048, k=32, 2 cores, jaxlib 0.10.2).
  """
  if mesh.devices.flat[0].platform != 'cpu':
    return None
  return {
    'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT',
    'xla_cpu_copy_insertion_use_region_analysis': True,  # without it w_enc and w_dec are copied once a step
  }


def row_chunks(config: Cell, mesh: Mesh) -> int:
  """Parts a device's tokens are encoded in: `mesh.row_chunks`, or on a CPU as many as keep the product under 256 MB.

  Before freed memory was kept from step to step (see `heap`), a whole product got fresh pages in every step, and touching
  them cost more than the rest: LOG.md, 2026-11-24. Parts also bound the memory of a step.
  """
  rows = config.train.batch_tokens // config.mesh.data
  least = config.mesh.row_chunks
  if mesh.devices.flat[0].platform != 'cpu':
    return least
  product = 4 * rows * (config.sae.n_latents // config.mesh.latent)
  enough = (c for c in range(least, rows + 1) if rows % c == 0 and product <= c * _CPU_PRODUCT)
  return next(enough, rows)


def shardings(mesh: Mesh, tree: Any) -> Any:
  """A NamedSharding for each leaf, by the last name on its path."""

  def one(path: jax.tree_util.KeyPath, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
    names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    return NamedSharding(mesh, at_rest(mesh, names[-1], leaf.shape))

  return jax.tree.map_with_path(one, tree)


def settled(mesh: Mesh, arrays: Any) -> Any:
  """The arrays. On a mesh of CPU devices they are computed before this returns; elsewhere they may be on their way.

  Whoever dispatches programs with collectives, and does not fetch what they give, needs this. XLA's CPU client has a few
  threads for launching and running all programs. With several in flight they can wait for each other's threads for ever.
  """
  if mesh.size > 1 and mesh.devices.flat[0].platform == 'cpu':
    return jax.block_until_ready(arrays)
  return arrays


def place_rows(mesh: Mesh, shape: tuple[int, int], rows: Callable[[int, int], np.ndarray]) -> jax.Array:
  """A [B, D] array sharded over tokens; `rows(start, stop)` is asked only for what this process's devices hold."""
  cached: dict[tuple[int, int], np.ndarray] = {}  # devices that differ only in latent shard hold the same rows

  def piece(index: tuple[slice, ...]) -> np.ndarray:
    start, stop, _ = index[0].indices(shape[0])
    if (start, stop) not in cached:
      cached[start, stop] = rows(start, stop)
    return cached[start, stop]

  return jax.make_array_from_callback(shape, NamedSharding(mesh, BATCH), piece)
