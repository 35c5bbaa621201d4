"""Train one autoencoder: `python -m sae_jax.train --config=experiments/tiny.py --workdir=runs/tiny`.

A run is a pure function of its configuration. It can be killed at any moment and started again: the state comes
from the newest good checkpoint, batches are a function of the step, and the bits do not change.
"""

import argparse
import errno
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import artifact, config_flags, distributed, files, flops, metrics, optim, sae, sharding
from sae_jax.checkpoint import Checkpoints, combined_digest
from sae_jax.config import Config, from_json, resolve
from sae_jax.data.source import open_source
from sae_jax.errors import UserError, one_line_errors
from sae_jax.evaluate import Evaluator
from sae_jax.sample import start_up_sample

PREEMPTED_EXIT = 42
_PROBES = 256


class Diverged(Exception):
  """The loss is no longer finite."""


@flax.struct.dataclass
class TrainState:
  step: jax.Array  # int32
  params: sae.Params
  ema: sae.Params  # uncorrected; see optim.ema_weights
  opt_state: Any
  idle_F: jax.Array  # int32, steps since each latent fired
  aux_steps: jax.Array  # int32, steps in which some latent was dead
  scale: jax.Array  # 1 / mean (x - mean x)^2 of the start-up sample


def make_step(config: Config, mesh: Mesh) -> tuple[Callable, Callable]:
  """Compiled `init(b_pre_D, scale) -> state` and `step(state, x_BD) -> (state, metrics)`; step donates its state."""
  axes = sharding.axes_of(mesh)
  tx = optim.make_optimizer(config.optim, config.train.batch_tokens)
  dtype = jnp.bfloat16 if config.train.compute_dtype == 'bfloat16' else None
  batch, width = config.train.batch_tokens, config.sae.d_model

  def on_shards(f, in_specs, out_specs):
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

  encoder_scale = on_shards(
    lambda params, probe_BD: sae.encoder_scale(params, probe_BD, config.sae.k, axes),
    (sharding.PARAM_SPECS, P()),
    P(),
  )
  loss_and_grads = on_shards(
    lambda params, idle_F, x_BD, scale: sae.loss_and_grads(
      params, idle_F, x_BD, scale, sae=config.sae, loss=config.loss, batch=batch, axes=axes, dtype=dtype
    ),
    (sharding.PARAM_SPECS, sharding.SPECS['idle_F'], sharding.BATCH, P()),
    (sharding.PARAM_SPECS, sharding.SPECS['idle_F'], P()),
  )

  def init(b_pre_D, scale):
    key, probe_key = jax.random.split(jax.random.key(config.train.seed))
    params = sae.init_params(key, b_pre_D, config.sae)
    probe_BD = jax.random.normal(probe_key, (_PROBES, width), b_pre_D.dtype)
    probe_BD = probe_BD / jnp.linalg.norm(probe_BD, axis=-1, keepdims=True)
    params['w_enc_FD'] = params['w_enc_FD'] * encoder_scale(params, probe_BD)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      ema=jax.tree.map(jnp.zeros_like, params),
      opt_state=tx.init(params),
      idle_F=jnp.zeros(config.sae.n_latents, jnp.int32),
      aux_steps=jnp.zeros((), jnp.int32),
      scale=scale,
    )

  def step(state: TrainState, x_BD):
    grads, idle_F, sums = loss_and_grads(state.params, state.idle_F, x_BD, state.scale)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optim.unit_norm_decoder(jax.tree.map(jnp.add, state.params, updates))
    nmse = sums.square_error * state.scale / (batch * width)
    state = TrainState(
      step=state.step + 1,
      params=params,
      ema=optim.ema_update(state.ema, params, config.optim.ema_decay),
      opt_state=opt_state,
      idle_F=idle_F,
      aux_steps=state.aux_steps + (sums.n_dead > 0),
      scale=state.scale,
    )
    return state, {
      'train/loss': nmse + config.loss.aux_coefficient * sums.aux_loss,
      'train/nmse': nmse,
      'train/aux_loss': sums.aux_loss,
      'train/l0': sums.active / batch,
      'sae/dead_fraction': sums.n_dead / config.sae.n_latents,
    }

  replicated = NamedSharding(mesh, P())
  abstract = jax.eval_shape(
    init, jax.ShapeDtypeStruct((width,), np.float32), jax.ShapeDtypeStruct((), np.float32)
  )
  state_shardings = sharding.shardings(mesh, abstract)
  init = jax.jit(init, in_shardings=(replicated, replicated), out_shardings=state_shardings)
  step = jax.jit(
    step,
    in_shardings=(state_shardings, NamedSharding(mesh, sharding.BATCH)),
    out_shardings=(state_shardings, replicated),
    donate_argnames='state',
    compiler_options=sharding.compiler_options(mesh),
  )
  return init, step


def abstract_state(init: Callable, mesh: Mesh, config: Config) -> Any:
  """Shapes, dtypes and shardings of the state that `init` makes."""
  shapes = jax.eval_shape(
    init, jax.ShapeDtypeStruct((config.sae.d_model,), np.float32), jax.ShapeDtypeStruct((), np.float32)
  )
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    shapes,
    sharding.shardings(mesh, shapes),
  )


def train(
  config: Config,
  workdir: str,
  *,
  should_stop: Callable[[], bool] | None = None,
  label: str = '',
) -> str:
  """Trains or resumes one cell in its folder.

  Args:
    config: the cell.
    workdir: its folder; config.json, ckpt/, metrics.jsonl, sae/ and, last, result.json are written there.
    should_stop: asked after every step; when true a checkpoint is saved and 'preempted' returned. Asked once more
      before the result is written, when its answer no longer matters.
    label: shown before the progress.

  Returns:
    'done' (also at once when the cell is finished) or 'preempted'.

  Raises:
    UserError: input that cannot be trained on. Diverged: the loss is not finite.
  """
  _claim_folder(config, workdir)
  if files.exists(files.join(workdir, metrics.RESULT)):
    return 'done'
  mesh = sharding.make_mesh(config.mesh)
  source = open_source(config)
  init, step = make_step(config, mesh)
  evaluator = Evaluator(config, mesh, source)
  steps, batch = config.train.steps, config.train.batch_tokens
  facts = {
    'mesh': [config.mesh.data, config.mesh.latent],
    'versions': metrics.versions(),
    'bit_exact': True,
    'wall_s': 0.0,
  }

  checkpoints = Checkpoints(workdir, config.id)
  abstract = abstract_state(init, mesh, config)
  restored = checkpoints.restore(abstract, note=lambda text: print(f'{config.id}: {text}', file=sys.stderr))
  if restored:
    state, saved = restored
    same = all(saved[key] == facts[key] for key in ('mesh', 'versions'))
    facts |= {'bit_exact': saved['bit_exact'] and same, 'wall_s': saved['wall_s']}
  else:
    state = init(*start_up_sample(source, config.train.tokens))
  start = int(state.step)
  began = time.monotonic() - facts['wall_s']
  log = metrics.MetricsFile(workdir) if jax.process_index() == 0 else None
  progress = metrics.Progress(label or config.id, steps, start, batch)
  evaluation_steps = log_spaced(steps, config.eval.per_decade)

  def save(at: int) -> None:
    checkpoints.save(at, state, facts | {'wall_s': time.monotonic() - began})

  def evaluate(at: int, train_metrics: dict[str, float]) -> dict[str, Any]:
    raw, ema = evaluator(state.params, optim.ema_weights(state.ema, state.step, config.optim.ema_decay))
    spent = flops.spent(config, at, int(state.aux_steps))
    better = 'ema' if ema.nmse < raw.nmse else 'raw'
    best = {'ema': ema, 'raw': raw}[better]
    line = {
      'tokens': at * batch, 'flops_useful': spent['useful'], 'flops_dense': spent['dense'],
      'flops_subject': source.flops_per_token * at * batch, 'wall_s': time.monotonic() - began,
      'eval/nmse': best.nmse, 'eval/nmse_raw': raw.nmse, 'eval/nmse_ema': ema.nmse, 'eval/weights': better,
      'eval/mse': best.mse, 'eval/l0': best.l0,
    } | train_metrics  # fmt: skip
    check_finite(at, line)
    if log:
      log.write(at, line)
    return line

  pending: tuple[int, dict[str, jax.Array]] | None = None  # metrics are fetched one step late
  try:
    for at, x_BD in enumerate(sharding.batches(source, mesh, batch, start, steps), start + 1):
      state, values = step(state, x_BD)
      if pending:
        _report(progress, *pending)
      pending = (at, values)
      if at in evaluation_steps and at < steps:
        evaluate(at, _report(progress, at, values))
      stop = should_stop is not None and should_stop()
      if at < steps and (stop or at % config.train.checkpoint_every == 0):
        _report(progress, at, values)  # never save a state whose loss is not finite
        save(at)
      if stop and at < steps:
        checkpoints.close()
        return 'preempted'
    final = _report(progress, steps, pending[1]) if pending else {}
    line = evaluate(steps, final)
  finally:
    progress.close()
  checkpoints.close()
  if should_stop is not None:
    should_stop()  # a holder that lost its lease ends here rather than write beside its successor
  _finish(config, workdir, state, source, line, facts, mesh)
  return 'done'


def log_spaced(steps: int, per_decade: int) -> set[int]:
  """Steps to evaluate at: about `per_decade` a decade, and the last, so that one run is a whole loss curve."""
  count = math.ceil(math.log10(steps) * per_decade) if steps > 1 else 0
  return {round(10 ** (i / per_decade)) for i in range(count)} | {steps}


def check_finite(step: int, values: dict[str, Any]) -> None:
  bad = [
    f'{key}={value}' for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)
  ]
  if bad:
    raise Diverged(
      f'not finite at step {step}: {", ".join(bad)}; lower optim.learning_rate or set optim.clip_norm'
    )


def _report(progress: metrics.Progress, at: int, values: dict[str, jax.Array]) -> dict[str, float]:
  fetched = {key: float(value) for key, value in jax.device_get(values).items()}
  check_finite(at, fetched)
  progress.update(at, fetched['train/nmse'])
  return fetched


def _claim_folder(config: Config, workdir: str) -> None:
  """Writes config.json, or checks that the folder is this cell's."""
  path = files.join(workdir, 'config.json')
  if jax.process_index() == 0 and not files.exists(path):
    try:
      files.create(path, config.to_json())
    except FileExistsError:
      pass  # another worker was faster; the check below still holds
    except OSError as error:
      raise UserError(
        f'cannot write {path} ({error.strerror}); free space or choose another workdir'
      ) from error
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('config.json')
  found = from_json(files.read(path))
  if found.id != config.id:
    raise UserError(
      f'{workdir} holds cell {found.id} and the configuration is cell {config.id}; use another workdir'
    )


def _finish(config, workdir, state, source, line, facts, mesh) -> None:
  """Writes the autoencoder and then result.json, the commit point."""
  digest = combined_digest(state.params)
  ema = optim.ema_weights(state.ema, state.step, config.optim.ema_decay)
  weights = {
    name: {key: np.asarray(multihost_utils.process_allgather(a, tiled=True)) for key, a in params.items()}
    for name, params in (('raw', state.params), ('ema', ema))
  }
  if jax.process_index() == 0:
    device = mesh.devices.flat[0]
    sizes = {
      'id': config.id, 'n_latents': config.sae.n_latents, 'k': config.sae.k, 'd_model': config.sae.d_model,
      'activation': config.sae.activation,
    }  # fmt: skip
    artifact.save(workdir, weights, sizes | {'weights': line['eval/weights']} | source.provenance)
    metrics.commit_result(
      workdir,
      sizes
      | {
        'seed': config.train.seed,
        'learning_rate': config.optim.learning_rate,
        'batch_tokens': config.train.batch_tokens,
        'steps': config.train.steps,
        'tokens': line['tokens'],
        'tokens_asked': config.train.tokens,
        'flops_useful': line['flops_useful'],
        'flops_dense': line['flops_dense'],
        'flops_subject': line['flops_subject'],
        'aux_steps': int(state.aux_steps),
        'nmse': line['eval/nmse'],
        'nmse_raw': line['eval/nmse_raw'],
        'nmse_ema': line['eval/nmse_ema'],
        'weights': line['eval/weights'],
        'mse': line['eval/mse'],
        'l0': line['eval/l0'],
        'dead_fraction': line['sae/dead_fraction'],
        'params_digest': digest,
        'bit_exact': facts['bit_exact'],
        'wall_s': line['wall_s'],
        'device_kind': device.device_kind,
        'n_devices': mesh.size,
        'mesh': facts['mesh'],
        'versions': facts['versions'],
        'git_commit': metrics.git_commit(),
      },
    )
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('result.json')


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(prog='python -m sae_jax.train', description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', required=True, help='cell folder; starting again in it resumes')
  args, config_dict = config_flags.parse(parser, argv)
  logging.getLogger('absl').setLevel(logging.CRITICAL)  # orbax logs the traceback of what it also raises
  config = resolve(config_dict)
  distributed.initialize()
  workdir = os.path.abspath(args.workdir) if files.is_local(args.workdir) else args.workdir
  files.check_exclusive_create(workdir)
  try:
    outcome = train(config, workdir, should_stop=distributed.stop_flag())
  except Exception as error:
    if not isinstance(error, UserError) or files.exists(files.join(workdir, 'config.json')):
      metrics.record_failure(workdir, error, permanent=isinstance(error, Diverged))
    if isinstance(error, Diverged):
      raise UserError(str(error)) from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(f'{workdir}: {error.strerror}; free some space and start again: it resumes') from error
    raise
  if outcome == 'preempted':
    print(f'{config.id}: preempted, checkpoint saved; the same command resumes', file=sys.stderr)
    return PREEMPTED_EXIT
  print(files.read(files.join(workdir, metrics.RESULT)).decode(), end='')
  return 0


if __name__ == '__main__':
  main()
