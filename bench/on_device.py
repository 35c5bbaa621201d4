"""What things take on the first device: selection and sparse products by shape, whole steps against the roofline, harvests."""

import dataclasses
import functools
import importlib.util
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import command, step_ours, worker
from bench.alternate import Worker, started
from bench.numerics import WAYS, Shape, interpreted
from bench.parts import Measured, Row, Skipped
from sae_jax import bench, config, flops, metrics, sharding, sparse, subjects, topk
from sae_jax.kernels.loops import Slots
from sae_jax.plan import CHIPS, Chip
from sae_jax.sae import SAMPLE
from sae_jax.step import make_step
from sae_jax.subjects import catalogue, llama
from sae_jax.subjects.layers import Rope

_ROUNDS = 5
_MOST_CALLS = 100  # in a round: so that no latent is long enough without firing to be dead
_PRODUCT = 2**32  # bytes of pre-activations that exist at once
_SETTINGS = ('jax_default_matmul_precision', 'jax_enable_x64', 'jax_platforms', 'jax_default_prng_impl')
# By what the kind of a device holds, the first that fits. H200 SXM: NVIDIA's data sheet, an H100 with another memory.
_H200 = dataclasses.replace(CHIPS['h100'], name='H200 SXM', memory=141 * 10**9, memory_bandwidth=4800e9)
_KINDS = (
  ('H200', _H200), ('H100', CHIPS['h100']), ('v6', CHIPS['v6e']), ('v5 lite', CHIPS['v5e']), ('v5e', CHIPS['v5e']),
  ('v5', CHIPS['v5p']),
)  # fmt: skip


def timed(call: Callable[[], Any], seconds: float) -> Row:
  """Milliseconds of a call, the median and range of a few rounds that last about `seconds` together.

  Calls of a round are queued, so that the device does not wait for Python, and waited for at its end.
  """
  jax.block_until_ready(call())  # compiles
  jax.block_until_ready(call())
  began = time.perf_counter()
  jax.block_until_ready(call())
  calls = int(seconds / _ROUNDS / (time.perf_counter() - began))
  calls = min(max(1, calls), _MOST_CALLS)
  rounds = [1e3 * _round(call, calls) for _ in range(_ROUNDS)]
  return {'ms': statistics.median(rounds), 'ms_low': min(rounds), 'ms_high': max(rounds), 'calls': _ROUNDS * calls}


def _round(call: Callable[[], Any], calls: int) -> float:
  began = time.perf_counter()
  for _ in range(calls):
    last = call()
  jax.block_until_ready(last)
  return (time.perf_counter() - began) / calls


def machine() -> Iterator[Measured]:
  """What all numbers were measured on."""

  def row() -> Row:
    device = jax.devices()[0]
    named = [name for name in os.environ if name.startswith(('JAX_', 'XLA_', 'LIBTPU_', 'NVIDIA_TF32', 'CUDA_VISIBLE'))]
    return bench.machine() | {
      'devices': len(jax.devices()),
      'memory_bytes': (device.memory_stats() or {}).get('bytes_limit'),
      'runtime': ' '.join(device.client.platform_version.split()),
      'driver': _driver(),
      'chip': getattr(chip_of(device.device_kind), 'name', None),
      'settings': {name: getattr(jax.config, name) for name in _SETTINGS},
      'flags': {name: os.environ[name] for name in sorted(named) if not name.endswith('_DIR')},
      'git_commit': metrics.git_commit(),
    }

  yield {}, row


def _driver() -> str | None:
  command_line = ('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
  try:
    return subprocess.run(command_line, capture_output=True, text=True, timeout=30, check=True).stdout.split()[0]
  except (OSError, subprocess.SubprocessError, IndexError):
    return None


def chip_of(kind: str) -> Chip | None:
  """The peak figures of a device by its `device_kind`; None for one whose figures are not known here."""
  return next((chip for part, chip in _KINDS if part in kind), None)


def selection(shapes: Sequence[Shape], seconds: float) -> Iterator[Measured]:
  """Each way to select, of a float32 product that is there. The least that can be moved is one read of it."""
  for shape in shapes:
    for way in WAYS:
      yield {'way': way, 'shape': list(shape)}, functools.partial(_selection_row, way, shape, seconds)


def _selection_row(way: str, shape: Shape, seconds: float) -> Row:
  d, n, batch, k = shape
  product_BF, bias_F = jax.random.normal(jax.random.key(0), (batch, n)), jnp.zeros(n)
  select = jax.jit(WAYS[way], static_argnums=2)
  return _moved(timed(lambda: select(product_BF, bias_F, k), seconds), flops.step_parts(n, k, d, batch)['top_k'])


def products(shapes: Sequence[Shape], seconds: float, interpret: bool) -> Iterator[Measured]:
  """Each sparse product by each path, float32 at the default precision."""
  for shape in shapes:
    for path in sparse.PATHS:
      for name in ('decode', 'code_gradient', 'weight_gradients'):
        about = {'product': name, 'path': path, 'shape': list(shape)}
        yield about, functools.partial(_product_row, name, path, shape, seconds, interpret)


def _product_row(name: str, path: str, shape: Shape, seconds: float, interpret: bool) -> Row:
  if path == 'kernels' and not interpret and jax.devices()[0].platform != 'gpu':
    raise Skipped('Triton kernels need an NVIDIA GPU')
  d, n, batch, k = shape
  z_BK, x_BD = jax.random.normal(jax.random.key(0), (batch, k)), jax.random.normal(jax.random.key(1), (batch, d))
  idx_BK = jax.random.randint(jax.random.key(2), (batch, k), 0, n)
  w_FD = jax.random.normal(jax.random.key(3), (n, d))
  counted = flops.step_parts(n, k, d, batch)
  slots = jnp.int32(k) if path == 'loops' else None  # so that they go over slots, as off a CPU
  match name:
    case 'decode':
      call, args, moved = sparse.decode, (z_BK, idx_BK, w_FD, slots), [counted[name]]
    case 'code_gradient':
      call, args, moved = sparse.code_gradient, (idx_BK, w_FD, x_BD, slots), [counted[name]]
    case _:
      call, args = _weight_gradients, (w_FD, idx_BK, z_BK, x_BD, slots)
      moved = [counted['encoder_gradient'], counted['decoder_gradient']]
  options = sharding.compiler_options(sharding.make_mesh(config.MeshConfig(1, 1)))
  with interpreted(interpret), sparse.forced(path):
    compiled = jax.jit(call, compiler_options=options)
    return _moved(timed(lambda: compiled(*args), seconds), *moved)


def _weight_gradients(w_FD: jax.Array, idx_BK: jax.Array, z_BK: jax.Array, x_BD: jax.Array, slots: Slots) -> Any:
  zeros_FD = jnp.zeros_like(w_FD)
  return sparse.add_weight_gradients(zeros_FD, zeros_FD, idx_BK, z_BK, x_BD, z_BK, x_BD, slots)


def _moved(times: Row, *parts: dict[str, float]) -> Row:
  """With the bytes that have to be moved at the least, a second."""
  return times | {'gb_per_s': sum(part['bytes'] for part in parts) / times['ms'] / 1e6}


def step(shape: Shape, dtype: str, seconds: float) -> Iterator[Measured]:
  """The whole step against its roofline, and the peak of memory against what a plan says. No latent is dead.

  A peak is that of the process: measure one step in each.
  """
  yield {'shape': list(shape), 'dtype': dtype}, lambda: _step_row(shape, dtype, seconds)


def _step_row(shape: Shape, dtype: str, seconds: float) -> Row:
  d, n, batch, k = shape
  flat = bench.paper_cell(shape).flat() | {'train.compute_dtype': dtype, 'mesh.row_chunks': row_chunks(n, batch)}
  cell = config.resolve_flat(flat)
  mesh, device = sharding.make_mesh(cell.mesh), jax.devices()[0]
  init, step = make_step(cell, mesh)
  x_BD = jax.random.normal(jax.random.key(1), (batch, d))
  x_BD = x_BD / jnp.linalg.norm(x_BD, axis=1, keepdims=True)
  held = [init(jnp.zeros(d), jnp.float32(d), jnp.resize(x_BD, (SAMPLE, d)))]
  compiled = step.lower(held[0], x_BD).compile()
  memory = compiled.memory_analysis()

  def call() -> Any:
    held[0], values = compiled(held[0], x_BD)
    return held[0], values

  times = timed(call, seconds)
  _, values = call()
  dead = float(values['sae/dead_fraction'])
  parts = flops.chip_parts(cell, aux=False).values()
  executed, moved = (sum(part[key] for part in parts) for key in ('executed', 'bytes'))
  row: Row = times | {
    'row_chunks': cell.mesh.row_chunks,
    'products': sparse.describe(device.platform, batch, n, d, k),
    'dead_fraction': dead,
    'tokens_per_s': 1e3 * batch / times['ms'],
    'tflops': executed / times['ms'] / 1e9,
    'predicted_bytes': memory.argument_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
    'peak_bytes': (device.memory_stats() or {}).get('peak_bytes_in_use'),
  }
  if chip := chip_of(device.device_kind):
    peak = chip.bfloat16 if dtype == 'bfloat16' else chip.float32
    roofline = 1e3 * max(executed / peak, moved / chip.memory_bandwidth)
    row |= {'roofline_ms': roofline, 'times_roofline': times['ms'] / roofline}
  return row


def row_chunks(n_latents: int, batch: int) -> int:
  """So many that pre-activations take at most 4 GB at once."""
  chunks = 1
  while 4 * batch * n_latents > chunks * _PRODUCT:
    chunks *= 2
  return chunks


def harvest(calls: Sequence[int], toy: bool, seconds: float) -> Iterator[Measured]:
  """Tokens per second of SmolLM2 up to layer 12, at several windows of 128 in a call; toy: two blocks of another."""
  name, site, window = 'smollm2-135m', f'resid_post.{1 if toy else 12}', 16 if toy else 128
  real = not toy and importlib.util.find_spec(catalogue.ENTRIES[name].packages[0].replace('-', '_')) is not None
  subject = functools.cache(lambda: subjects.load(name, site) if real else _random_llama(toy))
  weights = name if real else f'random, a Llama {"of two small blocks" if toy else f"of the shape of {name}"}'

  def row(windows: int) -> Row:
    ids_BT = jax.random.randint(jax.random.key(0), (windows, window), 0, subject().arch.vocabulary)
    times = timed(lambda: subject().residual(ids_BT, site), seconds)
    tokens_per_s = 1e3 * windows * window / times['ms']
    return times | {'tokens_per_s': tokens_per_s, 'tflops': tokens_per_s * subject().flops(site, window) / 1e12}

  for windows in calls:
    about = {'weights': weights, 'site': site, 'windows': windows, 'window_tokens': window}
    yield about, functools.partial(row, windows)


def _random_llama(toy: bool) -> subjects.Subject:
  """SmolLM2-135M's sizes with random weights and the blocks that a harvest needs."""
  sizes = {'d_model': 576, 'n_layers': 13, 'n_heads': 9, 'n_kv_heads': 3, 'd_ffn': 1536, 'vocabulary': 49152}
  if toy:
    sizes = {'d_model': 48, 'n_layers': 2, 'n_heads': 3, 'n_kv_heads': 3, 'd_ffn': 64, 'vocabulary': 101}
  d_head = sizes['d_model'] // sizes['n_heads']
  arch = llama.Arch(**sizes, d_head=d_head, context=8192, rope=Rope(1e5, d_head), norm_eps=1e-5)
  block, rest = llama.tensors(arch)
  rng = np.random.default_rng(0)

  def weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: 0.04 * rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}

  blocks = [llama.block_params(arch, weights(block)) for _ in range(arch.n_layers)]
  params = llama.rest_params(arch, weights(rest)) | {'blocks': jax.tree.map(lambda *a: np.stack(a), *blocks)}
  return subjects.Subject(llama, arch, jax.device_put(params), arch.n_layers, None, 0, {})


def sparsify(shape: Shape, pythons: Sequence[str], seconds: float) -> Iterator[Measured]:
  """Its step on CUDA and ours in turns. Ours keeps an average of the weights, which it does not."""
  yield {'shape': list(shape)}, lambda: _sparsify_row(shape, pythons, seconds)


def _sparsify_row(shape: Shape, pythons: Sequence[str], seconds: float) -> Row:
  asked = 'import sparsify, torch; torch.zeros(1, device="cuda")'
  able = (
    p for p in pythons if os.access(p, os.X_OK) and not subprocess.run([p, '-c', asked], capture_output=True).returncode
  )
  if not (python := next(able, None)):
    raise Skipped(
      f'none of {", ".join(dict.fromkeys(os.path.relpath(p) for p in pythons))} has sparsify and CUDA for torch'
    )
  os.environ['XLA_PYTHON_CLIENT_PREALLOCATE'] = 'false'  # two processes share the device
  flags = [command.shape_flag(shape), '--library=sparsify', '--device=cuda']
  pool_PBD, w_FD = worker.inputs(*shape[:3])
  work, facts = step_ours.begin(shape, (1, 1), True, 0.0, pool_PBD, w_FD)
  with started({'sparsify': Worker('bench.step_peer', flags, python)}) as workers:
    theirs = workers['sparsify']
    theirs.seconds('step', 3)
    work['step']()
    turns: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
      ours = timed(work['step'], seconds / _ROUNDS)
      calls = max(1, min(_MOST_CALLS, ours['calls']))
      turns.append((ours['ms'], 1e3 * statistics.median(theirs.seconds('step', calls))))
  ratios = [theirs_ms / ours_ms for ours_ms, theirs_ms in turns]
  return {
    'ms': statistics.median(ms for ms, _ in turns),
    'sparsify_ms': statistics.median(ms for _, ms in turns),
    'times_ours': statistics.median(ratios),
    'times_ours_low': min(ratios),
    'times_ours_high': max(ratios),
    'reconstruction_error': {'sae_jax': facts['error'], 'sparsify': theirs.facts['error']},
    'versions': theirs.facts['versions'],
  }


def approximate(shapes: Sequence[Shape], seconds: float) -> Iterator[Measured]:
  """Recall and time of the approximate selection, and over the exact one's."""

  def row(shape: Shape, target: float) -> Row:
    _, n, batch, k = shape
    product_BF, bias_F = jax.random.normal(jax.random.key(0), (batch, n)), jnp.zeros(n)
    exact = jax.jit(topk.top_k, static_argnums=2)
    approximated = jax.jit(topk.approximate, static_argnums=(2, 3))
    found_B = jax.jit(topk.found, static_argnums=(2, 3, 4))(product_BF, bias_F, k, target, None)
    times = timed(lambda: approximated(product_BF, bias_F, k, target), seconds)
    whole = timed(lambda: exact(product_BF, bias_F, k), seconds)
    on_tpu = jax.devices()[0].platform == 'tpu'
    note = {} if on_tpu else {'note': 'meaningless off a TPU: XLA sorts here, so nothing is missed or gained'}
    return times | {'recall': float(found_B.mean()) / k, 'times_exact': times['ms'] / whole['ms']} | note

  for shape in shapes:
    for target in (0.95, 0.99):
      yield {'shape': list(shape), 'recall_target': target}, functools.partial(row, shape, target)


def auxk(shape: Shape, shares: Sequence[float], seconds: float) -> Iterator[Measured]:
  """The step with shares of dead latents over the step with none, in turns; the dearest dead there can be."""

  def row() -> Row:
    pool_PBD, w_FD = worker.inputs(*shape[:3])
    begun = {share: step_ours.begin(shape, (1, 1), True, share, pool_PBD, w_FD) for share in (0.0, *shares)}
    ms = {share: timed(work['step'], 0) for share, (work, _) in begun.items()}
    calls = min(max(1, int(1e3 * seconds / _ROUNDS / ms[0.0]['ms'])), _MOST_CALLS)
    rounds = [{share: 1e3 * _round(work['step'], calls) for share, (work, _) in begun.items()} for _ in range(_ROUNDS)]
    found = []
    for share, (_, facts) in begun.items():
      ratios = [one[share] / one[0.0] for one in rounds]
      times = {'ms': statistics.median(one[share] for one in rounds), 'times_none': statistics.median(ratios)}
      found.append(
        {'dead_fraction': facts['dead_fraction'], 'times_none_low': min(ratios), 'times_none_high': max(ratios)} | times
      )
    return {'dead': found}

  yield {'shape': list(shape)}, row
