"""The compiled training step: of one autoencoder, and of a group of them on one stream."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import gradients, optim, sae, sharding, sparse, steering
from sae_jax.axes import Shard
from sae_jax.config import Cell, LossConfig, OptimConfig, SAEConfig
from sae_jax.families.family import family
from sae_jax.sae import SAMPLE

_PROBES = 256
_THRESHOLD_WEIGHT = 1e-3  # least weight of a step in the running mean of the least values
_KEPT = 8  # compiled steps that a process keeps for later cells of the same sizes
_Spec = P | dict[str, P]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  step: jax.Array  # int32
  params: sae.Params
  ema: sae.Params  # uncorrected; see optim.ema_weights
  opt_state: Any
  idle_F: jax.Array  # int32, steps since each latent fired
  aux_steps: jax.Array  # int32, steps in which some latent was dead
  scale: jax.Array  # 1 / mean (x - mean x)^2 of the start-up sample
  carried: dict[str, jax.Array]  # what else the family goes on with, see _start_carried; empty for most

  def replace(self, **changes: Any) -> 'TrainState':
    """The same state with other values."""
    return dataclasses.replace(self, **changes)


_Stepped = tuple[tuple[TrainState, ...], tuple[dict[str, jax.Array], ...]]  # of a group: its states and its metrics


def make_step(config: Cell, mesh: Mesh) -> tuple[Callable, Callable]:
  """Compiled `init(b_pre_D, scale, sample_BD) -> state` and `step(state, x_BD) -> (state, metrics)`; step donates its state.

  Cells that differ in seed or data share their programs in this process; those of another budget do too where nothing that
  is compiled in follows it, as with `recipe.horizon='so far'`.
  Raises `UserError` when the configuration forces a path of the sparse products that these devices do not have.
  """
  train, where = config.train, config.mesh
  rows = max(train.batch_tokens, config.eval.batch_tokens) // mesh.shape['data']
  latents = config.sae.n_latents // mesh.shape['latent']
  sparse.check(where.products, mesh.devices.flat[0].platform, rows, latents, config.sae.d_model)
  compiled_init, step = _programs(
    config.sae,
    config.loss,
    config.optim,
    train.batch_tokens,
    train.compute_dtype,
    where.products,
    where.exchange,
    sharding.row_chunks(config, mesh),
    config.state_is_split,
    mesh,
  )

  def init(b_pre_D: jax.Array, scale: jax.Array, sample_BD: jax.Array) -> TrainState:
    # The seed goes in as a value, so that cells which differ in it share one compiled program.
    return compiled_init(np.int64(train.seed), b_pre_D, scale, sample_BD)

  return init, step


@functools.lru_cache(maxsize=_KEPT)
def _programs(
  size: SAEConfig,
  loss: LossConfig,
  optimizer: OptimConfig,
  batch: int,
  compute_dtype: str,
  products: str,
  exchange: str,
  chunks: int,
  scatter: bool,
  mesh: Mesh,
) -> tuple[Callable, Callable]:
  """`init(seed, b_pre_D, scale, sample_BD)` and `step`: what depends on nothing but these."""
  shard = Shard(
    sharding.axes_of(mesh), jnp.bfloat16 if compute_dtype == 'bfloat16' else None, chunks, exchange, scatter
  )
  tx = optim.make_optimizer(optimizer, batch)
  width, known, kind = size.d_model, family(size.activation), sae.kind_of(size)
  steered = known.penalised and size.k is not None

  def on_shards(f: Callable, in_specs: tuple[_Spec, ...], out_specs: _Spec | tuple[_Spec, ...]) -> Callable:
    f = sparse.forced(products)(f)
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

  param_layouts = sharding.layouts(sae.shapes(size))
  idle_layout = sharding.layout('idle_F', (size.n_latents,))
  encoder_scale = on_shards(
    lambda params, probe_BD: sae.encoder_scale(params, probe_BD, size, shard.axes),
    (param_layouts, P()),
    P(),
  )

  def init(seed: jax.Array, b_pre_D: jax.Array, scale: jax.Array, sample_BD: jax.Array) -> TrainState:
    key, probe_key = jax.random.split(jax.random.key(seed))
    params = sae.init_params(key, b_pre_D, size)
    probe_BD = jax.random.normal(probe_key, (_PROBES, width), b_pre_D.dtype)
    probe_BD = probe_BD / jnp.linalg.norm(probe_BD, axis=-1, keepdims=True)
    params = sae.started(sae.scaled_to_probes(params, encoder_scale(params, probe_BD), size), sample_BD, size)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      ema=jax.tree.map(jnp.zeros_like, params),
      opt_state=tx.init(params),
      idle_F=jnp.zeros(size.n_latents, jnp.int32),
      aux_steps=jnp.zeros((), jnp.int32),
      scale=scale,
      carried=_start_carried(known.penalised, steered, kind.threshold, loss.steer_start),
    )

  abstract = jax.eval_shape(
    init,
    np.int64(0),
    *(jax.ShapeDtypeStruct(shape, np.float32) for shape in ((width,), (), (SAMPLE, width))),
  )
  state_shardings = sharding.shardings(mesh, abstract)
  loss_and_grads = on_shards(
    lambda params, idle_F, x_BD, scale, at, coefficient: gradients.loss_and_grads(
      params,
      idle_F,
      x_BD,
      scale,
      sae=size,
      loss=loss,
      batch=batch,
      shard=shard,
      step=at,
      coefficient=coefficient,
    ),
    (param_layouts, idle_layout, sharding.BATCH, P(), P(), P()),
    ({name: where.spec for name, where in state_shardings.params.items()}, idle_layout, P()),
  )

  def step(state: TrainState, x_BD: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    carried = state.carried
    coefficient = jnp.exp(carried['log_coefficient']) if steered else jnp.asarray(loss.sparsity, x_BD.dtype)
    grads, idle_F, sums = loss_and_grads(state.params, state.idle_F, x_BD, state.scale, state.step, coefficient)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, updates)
    if kind.unit_norm:
      params = optim.unit_norm_decoder(params)
    nmse, l0 = sums.square_error * state.scale / (batch * width), sums.active / batch
    values = {
      'train/loss': nmse + loss.aux_coefficient * sums.aux_loss,
      'train/nmse': nmse,
      'train/aux_loss': sums.aux_loss,
      'train/l0': l0,
      'sae/dead_fraction': sums.n_dead / size.n_latents,
    }
    if known.penalised:
      penalty = sums.penalty / batch
      values |= {'train/loss': values['train/loss'] + coefficient * penalty, 'train/penalty': penalty}
      carried = carried | {'mean_l0': carried['mean_l0'] + (l0 - carried['mean_l0']) / (state.step + 1)}
    if steered:
      values['train/coefficient'] = coefficient
      carried = carried | steering.steer(carried, l0, size.k, state.step)
    if kind.threshold:
      # An average over about the last tenth of the steps so far: the thresholds of the first steps are far off.
      old, weight = carried['threshold'], jnp.clip(8 / (state.step + 1), _THRESHOLD_WEIGHT, 1)
      # A batch without a code has no least value.
      least = jnp.where(jnp.isfinite(sums.least), sums.least, old)
      carried = carried | {'threshold': old + weight * (least - old)}
    state = TrainState(
      step=state.step + 1,
      params=params,
      ema=optim.ema_update(state.ema, params, optimizer, state.step + 1),
      opt_state=opt_state,
      idle_F=idle_F,
      aux_steps=state.aux_steps + (sums.n_dead > 0),
      scale=state.scale,
      carried=carried,
    )
    return state, values

  replicated = NamedSharding(mesh, P())
  step = jax.jit(
    step,
    in_shardings=(state_shardings, NamedSharding(mesh, sharding.BATCH)),
    out_shardings=(state_shardings, replicated),
    donate_argnames='state',
    compiler_options=sharding.compiler_options(mesh),
  )
  return jax.jit(init, in_shardings=(replicated,) * 4, out_shardings=state_shardings), step


def _start_carried(penalised: bool, steered: bool, threshold: bool, coefficient: float) -> dict[str, jax.Array]:
  """The mean L0 so far where a penalty decides it, what steering knows, and the threshold of a family that keeps one."""
  names = ['mean_l0'] * penalised + ['threshold'] * threshold
  return {name: jnp.zeros(()) for name in names} | (steering.start(coefficient) if steered else {})


def abstract_state(init: Callable, mesh: Mesh, config: Cell) -> Any:
  """Shapes, dtypes and shardings of the state that `init` makes."""
  width = config.sae.d_model
  shapes = jax.eval_shape(init, *(jax.ShapeDtypeStruct(shape, np.float32) for shape in ((width,), (), (SAMPLE, width))))
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
    shapes,
    sharding.shardings(mesh, shapes),
  )


def make_group_step(configs: Sequence[Cell], mesh: Mesh) -> Callable:
  """Compiled `step(states, x_BD) -> (states, metrics)` over tuples, one entry a cell; donates the states.

  Cells are unrolled in one program, each with its own sizes and constants: bit for bit what each does alone. `vmap` with
  a shared k and a mask was 1.8 to 3.1 times the time of the cells one by one on two CPU cores, and not bit-equal; the
  unrolled program takes 1.07 times.
  """
  if len(configs) == 1:
    _, alone = make_step(configs[0], mesh)

    def step_one(states: tuple[TrainState, ...], x_BD: jax.Array) -> _Stepped:
      state, values = alone(states[0], x_BD)
      return (state,), (values,)

    return step_one
  made = [make_step(config, mesh) for config in configs]
  where = tuple(
    sharding.shardings(mesh, abstract_state(init, mesh, config))
    for config, (init, _) in zip(configs, made, strict=True)
  )

  def step(states: tuple[TrainState, ...], x_BD: jax.Array) -> _Stepped:
    stepped = [one.__wrapped__(state, x_BD) for (_, one), state in zip(made, states, strict=True)]
    return tuple(zip(*stepped, strict=True))

  return jax.jit(
    step,
    in_shardings=(where, NamedSharding(mesh, sharding.BATCH)),
    out_shardings=(where, NamedSharding(mesh, P())),
    donate_argnames='states',
    compiler_options=sharding.compiler_options(mesh),
  )
