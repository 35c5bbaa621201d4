"""Step time by part against the floor of this machine: `python -m sae_jax.bench --json=OUT`.

The floor is the encoder's matmul as this machine does it, plus one pass over parameters, gradients, both moments and
EMA (five reads, four writes) at the measured copy bandwidth. AuxK is idle, as it is while no latent is dead.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from tqdm import tqdm

from sae_jax import config, files, flags, flops, heap, metrics, optim, sharding, sparse, topk
from sae_jax.errors import one_line_errors
from sae_jax.sae import SAMPLE, Params
from sae_jax.step import TrainState, make_step

SHAPES = ((512, 8192, 2048, 32), (768, 32768, 2048, 32), (768, 32768, 8192, 32))  # d, n, B, k
_COPY_FLOATS = 2**26  # 268 MB: past every cache


def measure(shape: tuple[int, int, int, int], repeats: int) -> dict[str, Any]:
  """One row: medians in ms of the step, its parts and the floor, all taken in turn so that noise hits them alike."""
  d, n, batch, _ = shape
  cell = paper_cell(shape)
  mesh = sharding.make_mesh(cell.mesh)
  init, step = make_step(cell, mesh)
  x_BD = jax.random.normal(jax.random.key(1), (batch, d))
  x_BD = x_BD / jnp.linalg.norm(x_BD, axis=-1, keepdims=True)
  state = init(jnp.zeros(d), jnp.float32(d), jnp.zeros((SAMPLE, d)))
  parts = _parts(cell, state, x_BD, sharding.compiler_options(mesh))
  # Donated, so that it reads and writes one buffer as the optimizer does; a fresh output each time would be timed
  # with its page faults (three times slower here) and make a floor too easy to reach.
  copy, held = jax.jit(lambda a: a + 1, donate_argnums=0), jnp.ones(_COPY_FLOATS)

  times: dict[str, list[float]] = {name: [] for name in ('step', 'copy', *parts)}
  heap.keep()  # as training does
  for i in range(repeats + 1):
    began = time.perf_counter()
    state, values = step(state, x_BD)
    jax.block_until_ready((state, values))
    taken = {'step': time.perf_counter() - began}
    began = time.perf_counter()
    held = jax.block_until_ready(copy(held))
    taken['copy'] = time.perf_counter() - began
    taken |= {name: _seconds(f, *args) for name, (f, args) in parts.items()}
    if i:  # the first round compiles
      for name, seconds in taken.items():
        times[name].append(seconds)
  ms = {name: 1e3 * statistics.median(values) for name, values in times.items()}
  bandwidth = 2 * 4 * _COPY_FLOATS / (ms.pop('copy') / 1e3)
  state_pass_ms = 1e3 * flops.state_pass_bytes(n, d) / bandwidth
  floor = ms['encoder_matmul'] + state_pass_ms
  step_ms = ms.pop('step')
  return {
    'shape': list(shape),
    'step_ms': step_ms,
    'encoder_matmul_ms': ms['encoder_matmul'],
    'state_pass_ms': state_pass_ms,
    'ratio': step_ms / floor,
    'parts': ms,
    'tokens_per_s': batch / step_ms * 1e3,
    'matmul_gflops': 2 * batch * n * d / ms['encoder_matmul'] / 1e6,
    'copy_gb_per_s': bandwidth / 1e9,
  }


def _parts(
  cell: config.Cell, state: TrainState, x_BD: jax.Array, options: dict[str, str | bool] | None
) -> dict[str, tuple[Callable, tuple]]:
  """Each part of the step alone, compiled, with arguments on the device."""
  params, k, batch = state.params, cell.sae.k, cell.train.batch_tokens
  pre_BF = jax.jit(lambda x, w: jnp.einsum('bd,fd->bf', x, w))(x_BD, params['w_enc_FD'])
  v_BK, idx_BK = jax.jit(lambda pre: topk.top_k(pre, state.params['b_enc_F'], k))(pre_BF)
  tx = optim.make_optimizer(cell.optim, batch)

  def weight_gradients(idx: jax.Array, z: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    zeros = jnp.zeros_like(params['w_enc_FD'])
    return sparse.add_weight_gradients(zeros, zeros, idx, z, x, z, x)

  def update(params: Params, grads: Params, opt_state: Any, ema: Params) -> tuple[Params, Any, Params]:
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optim.unit_norm_decoder(jax.tree.map(jnp.add, params, updates))
    return params, opt_state, optim.ema_update(ema, params, cell.optim, state.step + 1)

  grads = jax.tree.map(jnp.ones_like, params)
  jitted = {
    'encoder_matmul': (lambda x, w: jnp.einsum('bd,fd->bf', x, w), (x_BD, params['w_enc_FD'])),
    'top_k': (lambda pre, bias: topk.top_k(pre, bias, k), (pre_BF, params['b_enc_F'])),
    'decode': (sparse.decode, (v_BK, idx_BK, params['w_dec_FD'])),
    'code_gradient': (sparse.code_gradient, (idx_BK, params['w_dec_FD'], x_BD)),
    'weight_gradients': (weight_gradients, (idx_BK, v_BK, x_BD)),
    'update': (update, (params, grads, state.opt_state, state.ema)),
  }
  copies = {
    name: (jax.jit(f, compiler_options=options), jax.tree.map(jnp.copy, args)) for name, (f, args) in jitted.items()
  }
  # The step consumes its state, so the parts keep copies; the update donates as the step does, and takes its own
  # output as the next input.
  donating = jax.jit(update, donate_argnums=(0, 2, 3), compiler_options=options)
  held = list(copies['update'][1])

  def run_update() -> list[Any]:
    held[0], held[2], held[3] = donating(*held)
    return held

  return copies | {'update': (run_update, ())}


def _seconds(f: Callable, *args: Any) -> float:
  began = time.perf_counter()
  jax.block_until_ready(f(*args))
  return time.perf_counter() - began


def paper_cell(shape: tuple[int, ...], mesh: tuple[int, ...] = (1, 1), learning_rate: float = 1e-4) -> config.Cell:
  """The paper's recipe at one size: D, N, B, K."""
  d, n, batch, k = shape
  template = config.template()
  template.data.source = 'planted'
  return config.resolve(
    config.override(
      template,
      {
        'sae.d_model': d,
        'sae.n_latents': n,
        'sae.k': k,
        'train.batch_tokens': batch,
        'train.tokens': 10_000 * batch,
        'optim.learning_rate': learning_rate,
        'mesh.data': mesh[0],
        'mesh.latent': mesh[1],
      },
    )
  )


def machine() -> dict[str, Any]:
  """What a number was measured on and when."""
  device = jax.devices()[0]
  cpu = platform.processor() or platform.machine()
  try:
    with open('/proc/cpuinfo') as f:
      cpu = next(line.split(':')[1].strip() for line in f if line.startswith('model name'))
  except (OSError, StopIteration):
    pass
  return {
    'device': device.device_kind,
    'platform': device.platform,
    'cpu': cpu,
    'cores': len(os.sched_getaffinity(0)),
    'versions': metrics.versions(),
    'date': datetime.date.today().isoformat(),
  }


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m sae_jax.bench', description=__doc__.splitlines()[0])
  parser.add_argument('--json', metavar='OUT', help='write the rows here: a list, one object a shape')
  parser.add_argument(
    '--shape',
    metavar='D,N,B,K',
    type=flags.shape,
    action='append',
    help='instead of the standard shapes; may repeat',
  )
  parser.add_argument(
    '--repeats', type=flags.whole('--repeats'), default=7, help='rounds a median is taken over (default 7)'
  )
  args = parser.parse_args(argv)
  heap.one_arena()
  rows = []
  for shape in tqdm(args.shape or SHAPES, unit='shape', disable=not sys.stderr.isatty()):
    row = measure(shape, args.repeats) | {'machine': machine()}
    rows.append(row)
    print(
      f'd={shape[0]} n={shape[1]} B={shape[2]} k={shape[3]}: step {row["step_ms"]:.0f} ms = {row["ratio"]:.2f} x floor '
      f'(encoder matmul {row["encoder_matmul_ms"]:.0f} + state pass {row["state_pass_ms"]:.0f} ms), '
      f'{row["tokens_per_s"]:,.0f} tokens/s'
    )
    print('  ' + ', '.join(f'{name} {ms:.0f}' for name, ms in row['parts'].items()))
  if args.json:
    files.write_output(args.json, json.dumps(rows, indent=1).encode() + b'\n', '--json')
  return 0


if __name__ == '__main__':
  main()
