"""Where arrays live: the (data, latent) mesh, partition specs by array name, and host-to-device placement."""

import concurrent.futures
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax.config import MeshConfig
from sae_jax.data.source import Source
from sae_jax.errors import UserError
from sae_jax.sae import Axes

# By the name an array has in a state tree; what is not named is replicated. Moments and EMA share their
# parameter's name and so its layout.
SPECS = {
  'w_enc_FD': P('latent', None),
  'w_dec_FD': P('latent', None),
  'b_enc_F': P('latent'),
  'idle_F': P('latent'),
}
PARAM_SPECS = {name: SPECS.get(name, P()) for name in ('w_enc_FD', 'w_dec_FD', 'b_enc_F', 'b_pre_D')}
BATCH = P('data', None)


def make_mesh(config: MeshConfig) -> Mesh:
  """A mesh over the first data x latent devices. Raises `UserError` when there are fewer."""
  devices = jax.devices()
  size = config.data * config.latent
  if size > len(devices):
    raise UserError(
      f'mesh.data={config.data} x mesh.latent={config.latent} needs {size} devices and there are '
      f'{len(devices)}; use a smaller mesh'
    )
  # Auto and said so: the default is Explicit, under which every gather and scatter wants an out_sharding.
  return jax.make_mesh(
    (config.data, config.latent), ('data', 'latent'), axis_types=(AxisType.Auto,) * 2, devices=devices[:size]
  )


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


def shardings(mesh: Mesh, tree: Any) -> Any:
  """A NamedSharding for each leaf, by the last name on its path."""

  def one(path, _):
    names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    return NamedSharding(mesh, SPECS.get(names[-1], P()))

  return jax.tree.map_with_path(one, tree)


def place_rows(mesh: Mesh, shape: tuple[int, int], rows) -> jax.Array:
  """A [B, D] array sharded over tokens; `rows(start, stop)` is asked only for what this process's devices hold."""
  cached: dict[
    tuple[int, int], np.ndarray
  ] = {}  # devices that differ only in latent shard hold the same rows

  def piece(index):
    start, stop, _ = index[0].indices(shape[0])
    if (start, stop) not in cached:
      cached[start, stop] = rows(start, stop)
    return cached[start, stop]

  return jax.make_array_from_callback(shape, NamedSharding(mesh, BATCH), piece)


def batches(source: Source, mesh: Mesh, batch: int, start: int, stop: int) -> Iterator[jax.Array]:
  """Training batches start..stop, each read and placed while the step before it runs."""

  def load(step):
    offset = step * batch
    return place_rows(mesh, (batch, source.d_model), lambda a, b: source.rows(offset + a, offset + b))

  with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix='batches') as pool:
    ahead = pool.submit(load, start) if start < stop else None
    for step in range(start, stop):
      x_BD = ahead.result()
      ahead = pool.submit(load, step + 1) if step + 1 < stop else None
      yield x_BD
