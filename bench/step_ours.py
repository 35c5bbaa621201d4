"""One training step of ours, compiled as a run compiles it; the counterpart of bench/step_peer.py.

python -m bench.step_ours --shape=512,8192,2048,32 [--no_ema] [--mesh=1,1] [--dead=0.1]
"""

import argparse
import contextlib
import itertools
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from bench import worker
from sae_jax import distributed, heap, metrics, optim, sae, sharding
from sae_jax import step as stepping
from sae_jax.axes import Shard
from sae_jax.bench import paper_cell
from sae_jax.sae import SAMPLE

Shape = tuple[int, ...]  # d, n, B, k


def just_below(x_BD: np.ndarray, w_FD: np.ndarray, k: int, share: float) -> tuple[np.ndarray, np.ndarray, int]:
  """Latents that never fire in a batch but nearly do: the dearest dead latents there can be.

  Returns a latent bias [F] that keeps every `1 / share`-th latent just below the weakest latent selected anywhere in
  the batch, a mask [F] of those, and the largest number of them that one token drives above 0.
  """
  pre_BF = x_BD @ w_FD.T
  n = len(w_FD)
  dead_F = np.floor(np.arange(1, n + 1) * share) > np.floor(np.arange(n) * share)
  live_BF = pre_BF[:, ~dead_F]
  weakest = np.partition(live_BF, -k, axis=1)[:, -k].min()
  bias_F = np.where(dead_F, weakest - 1e-3 * abs(weakest) - pre_BF.max(axis=0), 0).astype(np.float32)
  slots = int(((pre_BF + bias_F)[:, dead_F] > 0).sum(axis=1).max())
  return bias_F, dead_F, slots


def begin(
  shape: Shape, mesh: tuple[int, ...], ema: bool, dead: float, pool_PBD: np.ndarray, w_FD: np.ndarray
) -> tuple[worker.Work, worker.Facts]:
  """A state with the given weights, its compiled step, and what they report.

  Call it once a process with these sizes: a compiled step is kept, with or without the average of the weights.
  """
  k = shape[3]
  # Weights that move would wake the latents planted as dead. At rate 0 the update is computed all the same.
  conf = paper_cell(shape, mesh, 0.0 if dead else 1e-4)
  devices = sharding.make_mesh(conf.mesh)
  facts: dict[str, Any] = {'threads': None, 'versions': metrics.versions()}
  given: dict[str, Any] = {'w_enc_FD': w_FD, 'w_dec_FD': w_FD}
  idle_F = np.zeros(shape[1], np.int32)
  if dead:
    pool_PBD = pool_PBD[:1]  # who sleeps through one batch may wake in the next
    bias_F, dead_F, slots = just_below(pool_PBD[0], w_FD, k, dead)
    given['b_enc_F'], idle_F = bias_F, np.where(dead_F, 2**30, 0).astype(np.int32)
    facts['aux_slots'] = min(slots, conf.sae.k_aux)

  # The configuration has no switch for the average of the weights; the peers keep none.
  patch = contextlib.nullcontext() if ema else mock.patch.object(optim, 'ema_update', lambda ema, *_: ema)
  with patch:
    init, step = stepping.make_step(conf, devices)
    state = init(jnp.zeros(shape[0]), jnp.float32(shape[0]), jnp.zeros((SAMPLE, shape[0])))
    # Copies: a donated array must own its memory.
    state = state.replace(
      params=state.params
      | {key: jnp.array(a, copy=True, device=state.params[key].sharding) for key, a in given.items()},
      idle_F=jnp.array(idle_F, copy=True, device=state.idle_F.sharding),
    )
    pool = [sharding.place_rows(devices, x_BD.shape, lambda a, b, x_BD=x_BD: x_BD[a:b]) for x_BD in pool_PBD]
    if devices.size == 1:
      x_hat_BD, _ = jax.jit(sae.reconstruct, static_argnums=(2, 3))(state.params, pool[0], conf.sae, Shard())
      facts['error'] = float(jnp.sum((pool[0] - x_hat_BD) ** 2) / jnp.sum(pool[0] ** 2))
    heap.keep()  # as training does
    state, values = step(state, pool[0])  # compiles, with the average as asked
  if not ema and any(jnp.any(a) for a in jax.tree.leaves(state.ema)):
    raise RuntimeError('the average of the weights moved: optim.ema_update is no longer what updates it')
  facts['dead_fraction'] = float(values['sae/dead_fraction'])

  batches, held = itertools.cycle(pool), [state]
  del state

  def one_step():
    held[0], values = step(held[0], next(batches))
    jax.block_until_ready((held[0], values))

  options = sharding.compiler_options(devices)
  product = jax.jit(lambda x_BD, w_FD: jnp.einsum('bd,fd->bf', x_BD, w_FD), compiler_options=options)
  operands: list[jax.Array] = []

  def matmul():
    if not operands:
      operands.extend((jnp.asarray(pool_PBD[0]), jnp.asarray(w_FD)))
    jax.block_until_ready(product(*operands))

  return {'step': one_step, 'matmul': matmul}, facts


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m bench.step_ours', description=__doc__.splitlines()[0])
  parser.add_argument('--shape', metavar='D,N,B,K', required=True)
  parser.add_argument('--mesh', metavar='DATA,LATENT', default='1,1', help='on virtual CPU devices')
  parser.add_argument('--no_ema', action='store_true', help='leave the average of the weights alone, as peers do')
  parser.add_argument('--dead', metavar='SHARE', type=float, default=0.0, help='share of latents planted as dead')
  args = parser.parse_args()
  shape, mesh = (tuple(int(v) for v in text.split(',')) for text in (args.shape, args.mesh))

  def prepare():
    heap.one_arena()
    jax.config.update('jax_platforms', 'cpu')  # the peers are put there too
    if mesh != (1, 1):
      jax.config.update('jax_num_cpu_devices', mesh[0] * mesh[1])
    distributed.initialize()
    jax.block_until_ready(jnp.zeros(1))
    pool_PBD, w_FD = worker.inputs(*shape[:3])
    return lambda: begin(shape, mesh, not args.no_ema, args.dead, pool_PBD, w_FD)

  worker.serve(prepare)


if __name__ == '__main__':
  main()
