"""Compiles the training step for devices that are not here, and reads back what it takes and sends.

Compiled is not run: shapes, shardings, kernels, memory and traffic are real, speed and numbers are not shown.
"""

import re
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from sae_jax import sharding
from sae_jax.config import Cell
from sae_jax.errors import UserError
from sae_jax.step import TrainState, abstract_state, make_step

# What the compiler must know of an H100 SXM5; nothing here is read at run time.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Compiled(NamedTuple):
  """What the compiler says of one step on one chip."""

  memory: dict[str, int]  # bytes: arguments, outputs, aliased, temporaries
  state: dict[str, int]  # bytes of the arguments by part
  text: str  # the optimised program
  seconds: float  # of compiling


def devices(topology: str) -> list[Any]:
  """Descriptions of the chips of e.g. 'v5p:8x8x8' or 'h100:8'. Raises `UserError` for one that cannot be had."""
  kind, _, layout = topology.partition(':')
  if kind == 'h100':
    if not re.fullmatch(r'[1-8]', layout):
      raise UserError(f'topology {topology!r} is not h100:N with 1 to 8 GPUs of one host; e.g. h100:8')
    arguments = {
      'platform': 'cuda',
      'topology_name': f'1x1x{layout}',
      'topology': f'1x1x{layout}',
      'target_config': _H100,
    }
    extra = 'cuda12'
  else:
    arguments, extra = {'platform': 'tpu', 'topology_name': topology}, 'tpu'
  try:
    return list(topologies.get_topology_desc(**arguments).devices)
  except (NotImplementedError, RuntimeError, ValueError) as error:
    text = ' '.join(str(error).split())[:200]
    missing = 'not installed' in text or 'not implemented' in text
    remedy = f'pip install -e ".[{extra}]"' if missing else 'name a slice that exists, e.g. v5e:4x4'
    raise UserError(f'topology {topology!r}: {text}; {remedy}') from error


def compile_step(config: Cell, mesh: Mesh) -> Compiled:
  """Compiles the real training step for a mesh of described or present devices.

  Raises `UserError` when the compiler finds that it does not fit in memory.
  """
  init, step = make_step(config, mesh)
  state = abstract_state(init, mesh, config)
  shape = (config.train.batch_tokens, config.sae.d_model)
  x_BD = jax.ShapeDtypeStruct(shape, np.float32, sharding=jax.NamedSharding(mesh, sharding.BATCH))
  began = time.monotonic()
  try:
    compiled = step.lower(state, x_BD).compile()
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    used = re.search(r'Used (\S+) of (\S+) hbm', str(error))
    needs = f'needs {used[1]} of {used[2]} a chip' if used else 'runs out of memory'
    raise UserError(
      f'the step {needs} at mesh.data={config.mesh.data}, mesh.latent={config.mesh.latent}, '
      f'mesh.row_chunks={config.mesh.row_chunks}; use more row chunks, latent shards or chips'
    ) from error
  memory = compiled.memory_analysis()
  return Compiled(
    memory={
      'arguments': memory.argument_size_in_bytes,
      'outputs': memory.output_size_in_bytes,
      'aliased': memory.alias_size_in_bytes,
      'temporaries': memory.temp_size_in_bytes,
    },
    state=_state_bytes(state) | {'batch': _shard_bytes(x_BD)},
    text=compiled.as_text(),
    seconds=time.monotonic() - began,
  )


def _state_bytes(state: TrainState) -> dict[str, int]:
  def total(tree: Any) -> int:
    return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree))

  parts = {'params': total(state.params), 'moments': total(state.opt_state), 'ema': total(state.ema)}
  return parts | {'counters': total(state) - sum(parts.values())}


def _shard_bytes(leaf: Any) -> int:
  return int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64)) * leaf.dtype.itemsize
