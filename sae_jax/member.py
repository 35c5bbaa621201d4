"""One cell in training: its folder, checkpoints, measurements and result.

A run steps one member or a group of them; what a member leaves behind is the same either way.
"""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from sae_jax import artifact, cell_state, convergence, extend, files, flops, metrics, optim, schema
from sae_jax.cell import log_spaced
from sae_jax.checkpoint import Checkpoints, combined_digest
from sae_jax.config import Cell, from_json
from sae_jax.data import soundness
from sae_jax.data.source import Source
from sae_jax.errors import BrokenFile, UserError
from sae_jax.evaluate import Evaluator
from sae_jax.sae import kept

_ema_weights = jax.jit(optim.ema_weights, static_argnums=2)  # one program in place of one an operation and shape


class Diverged(Exception):
  """The loss is no longer finite."""


class Member:
  """A cell between its first step and its result.

  Args:
    config: the cell.
    workdir: its folder, claimed by `claim_folder`.
    mesh: where it runs.
    source: its activations.
    share: part of the run's time that is this cell's, for `wall_s`; 1 when it trains alone.
    before_write: called before anything is written that others see; raises when the cell is another's now.

  Attributes:
    state: its training state. Whoever steps it puts the new one here.
    values: the metrics of its newest step, on the device. Whoever steps it puts them here, too.
    outcome: 'preempted' until the result is written, then 'done'. A cell that diverged has the `Diverged`.
  """

  def __init__(
    self,
    config: Cell,
    workdir: str,
    mesh: Mesh,
    source: Source,
    share: float = 1.0,
    before_write: Callable[[], None] | None = None,
  ):
    self.config, self.workdir, self.mesh = config, workdir, mesh
    self._before_write = before_write or (lambda: None)
    self._source, self._share = source, share
    self._evaluator = Evaluator(config, mesh, source)
    self._measures = self._make_measures() if config.eval.measures else None
    self._checkpoints = Checkpoints(workdir, config.id)
    self._log = metrics.MetricsFile(workdir, config.id) if jax.process_index() == 0 else None
    self._evaluation_steps = log_spaced(config.train.steps, config.eval.per_decade)
    self._facts: dict[str, Any] = {
      'mesh': [config.mesh.data, config.mesh.latent],
      'row_chunks': config.mesh.row_chunks,
      'products': config.mesh.products,
      'device_kind': mesh.devices.flat[0].device_kind,
      'versions': metrics.versions(),
      'bit_exact': True,
      'wall_s': 0.0,
    }
    if mesh.devices.flat[0].platform == 'cpu':
      self._facts |= metrics.processor()
    self.state: Any = None
    self.values: dict[str, jax.Array] = {}
    self.outcome: str | Diverged = 'preempted'
    self._began = time.monotonic()
    self._train_metrics: dict[str, float] = {}
    self._line: dict[str, Any] = {}

  def start(self, abstract: Any, fresh: Callable[[], Any]) -> None:
    """Takes up the state of the newest good checkpoint, else a fresh one."""
    restored = self._checkpoints.restore(
      abstract, lambda text: print(f'{self.config.id}: {text}', file=sys.stderr), schema.FACTS
    )
    if restored is None and self.config.train.extends:
      restored = self._extended(abstract)
    self.state, saved = restored or (fresh(), self._facts)
    # What checkpoints from before a fact was kept mean: the only way there was, and nothing known of the machine.
    saved = self._facts | {'row_chunks': 1, 'products': 'auto'} | saved
    same = all(saved[key] == value for key, value in self._facts.items() if key not in ('bit_exact', 'wall_s'))
    self._facts |= {'bit_exact': saved['bit_exact'] and same, 'wall_s': saved['wall_s']}
    self._facts |= {key: saved[key] for key in ('extends', 'not_extended', 'curve', 'measure_s') if saved.get(key)}
    self._train_metrics = saved.get('last') or {}

  def _extended(self, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
    """The last state of the cell that this one extends, whose lines become the first of this one's.

    None when that cell has no checkpoint left, as when they were freed after the launch. From the start this one ends with
    the same bits, so it is trained all the same. Its result says why.
    """
    folder, cell_id = extend.shorter(self.config, self.workdir)
    found, why = None, extend.NO_CHECKPOINT
    if extend.has_checkpoint(folder):
      why = 'all checkpoints of the shorter cell are damaged'
      checkpoints = Checkpoints(folder, cell_id)
      found = checkpoints.restore(abstract, lambda text: print(f'{cell_id}: {text}', file=sys.stderr), schema.FACTS)
      checkpoints.close()
    if found is None:
      self._facts['not_extended'] = why
      if self._log:
        named = f'{self.config.id}: train.extends={self.config.train.extends!r}'
        print(f'{named}: {why}; training from the start', file=sys.stderr, flush=True)
      return None
    state, facts = found
    facts = {key: value for key, value in facts.items() if key != 'not_extended'}  # that cell's own
    step = int(state.step)
    if self._log:
      for line in metrics.read_metrics(folder, cell_id):
        if line['step'] <= step and line['step'] in self._evaluation_steps:
          self._log.write(line['step'], {key: value for key, value in line.items() if key != 'step'})
    # A run from the start would not have been evaluated at the end of the shorter one.
    curve = [point for point in facts.get('curve') or [] if point[0] in self._evaluation_steps]
    return state, facts | {'extends': {'cell': cell_id, 'step': step}, 'curve': curve}

  def begin(self) -> None:
    """Starts the clock behind `wall_s`."""
    self._began = time.monotonic()

  def hear(self, at: int, train_metrics: dict[str, float]) -> None:
    """Takes the metrics of a step for the next line. The cell has diverged when they are not finite."""
    self._train_metrics = train_metrics
    self._is_finite(at, train_metrics)

  def evaluates_at(self, step: int) -> bool:
    return step in self._evaluation_steps

  def saves_at(self, step: int) -> bool:
    at_end = step == self.config.train.steps
    return self.config.one_curve if at_end else step % self.config.train.checkpoint_every == 0

  def evaluate(self, at: int) -> float:
    """Measures raw and EMA weights on held-out tokens and writes a line. Not finite, the cell has diverged.

    Returns the seconds that `eval.measures` took.
    """
    seconds = 0.0
    state, batch = self.state, self.config.train.batch_tokens
    raw, ema = self._evaluator(*self._weights().values())
    mean_l0 = state.carried.get('mean_l0')
    spent = flops.spent(self.config, at, int(state.aux_steps), None if mean_l0 is None else float(mean_l0))
    better = 'ema' if ema.nmse < raw.nmse else 'raw'
    best = {'ema': ema, 'raw': raw}[better]
    line = {
      'tokens': at * batch,
      'flops_useful': spent['useful'],
      'flops_dense': spent['dense'],
      'flops_subject': self._source.flops_per_token * at * batch,
      'wall_s': self._wall_s(),
      'eval/nmse': best.nmse,
      'eval/nmse_raw': raw.nmse,
      'eval/nmse_ema': ema.nmse,
      'eval/weights': better,
      'eval/mse': best.mse,
      'eval/l0': best.l0,
    } | self._train_metrics
    if best.topk_recall is not None:
      line['eval/topk_recall'] = best.topk_recall
    if self._measures and self._is_finite(at, line):
      began = time.monotonic()
      line |= self._measures(self._gathered(), better)
      seconds = time.monotonic() - began
      self._facts['measure_s'] = self._facts.get('measure_s', 0.0) + seconds
      line |= {'eval/measure_s': self._facts['measure_s']}
    if self._is_finite(at, line):
      self._before_write()
      if self._log:
        self._log.write(at, line)
      self._line = line
      if self.config.train.stop_gain:
        before = [point for point in self._facts.get('curve', []) if point[0] < at]
        self._facts['curve'] = [*before, [at, best.nmse, best.l0]]
    return seconds

  def leave_out(self, seconds: float) -> None:
    """Takes seconds out of `wall_s` that were not spent on training this cell or one beside it."""
    self._began += seconds

  def _make_measures(self) -> Callable[..., dict[str, float]]:
    from sae_jax.measures.training import During  # loads what most runs have no use for

    return During(self.config, self.workdir, self._source.provenance) if jax.process_index() == 0 else lambda *_: {}

  def _gathered(self) -> dict[str, dict[str, np.ndarray]]:
    """What an autoencoder in use needs, whole on every host."""
    return {
      name: {key: np.asarray(multihost_utils.process_allgather(a, tiled=True)) for key, a in params.items()}
      for name, params in self._weights().items()
    }

  @property
  def converged(self) -> bool:
    """Whether the last doubling of the tokens gained less than `train.stop_gain` at the same L0."""
    return convergence.has_converged(self._facts.get('curve', []), self.config.train.stop_gain)

  def save(self, at: int) -> None:
    self._before_write()
    last = {'last': self._train_metrics} if self.config.one_curve else {}
    self._checkpoints.save(at, self.state, self._facts | {'wall_s': self._wall_s()} | last)

  def close(self) -> None:
    """Waits for checkpoints in flight."""
    self._checkpoints.close()

  def finish(self) -> None:
    """Writes the autoencoder and then result.json, the commit point, after an evaluation at the last step."""
    config, state, line = self.config, self.state, self._line
    digest = combined_digest(state.params)
    weights = self._gathered()
    if jax.process_index() == 0:
      sizes = {
        'id': config.id,
        'n_latents': config.sae.n_latents,
        'k': config.sae.k,
        'd_model': config.sae.d_model,
        'activation': config.sae.activation,
      }
      self._before_write()
      written = artifact.save(
        self.workdir, weights, sizes | {'weights': line['eval/weights']} | self._source.provenance
      )
      measured = {
        name: line[in_line] for in_line, name in schema.line_names(schema.MEASURED).items() if in_line in line
      }
      self._before_write()
      metrics.commit_result(
        self.workdir,
        sizes
        | measured
        | written
        | {
          'seed': config.train.seed,
          'learning_rate': config.optim.learning_rate,
          'batch_tokens': config.train.batch_tokens,
          'steps': int(state.step),
          'tokens_asked': config.train.tokens,
          'aux_steps': int(state.aux_steps),
          'params_digest': digest,
          'bit_exact': self._facts['bit_exact'],
          **{key: self._facts[key] for key in ('extends', 'not_extended') if key in self._facts},
          'device_kind': self._facts['device_kind'],
          'n_devices': self.mesh.size,
          'n_cores': self._facts.get('n_cores'),
          'cpu': self._facts.get('cpu'),
          'mesh': self._facts['mesh'],
          'versions': self._facts['versions'],
          'git_commit': metrics.git_commit(),
        },
      )
      if line['eval/nmse'] >= 1:
        cause = soundness.norm_warning(self._evaluator.rms_norm)
        cause = cause or f'lower optim.learning_rate={config.optim.learning_rate:g} or train on more tokens'
        print(
          f'{config.id}: NMSE {line["eval/nmse"]:.3g} is no better than predicting the mean (1): '
          f'{cause.removeprefix("warning: ")}',
          file=sys.stderr,
          flush=True,
        )
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('result.json')
    self.outcome = 'done'

  def _weights(self) -> dict[str, Any]:
    """What an autoencoder in use needs, by the name of the weights."""
    state = self.state
    ema = _ema_weights(state.ema, state.step, self.config.optim)
    return {name: kept(params, state.carried) for name, params in (('raw', state.params), ('ema', ema))}

  def _wall_s(self) -> float:
    return self._facts['wall_s'] + self._share * (time.monotonic() - self._began)

  def _is_finite(self, at: int, values: dict[str, Any]) -> bool:
    """Whether all values are. Otherwise the cell ends here, with an outcome that names what is not."""
    bad = [f'{key}={value}' for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
    if bad:
      self.outcome = Diverged(
        f'not finite at step {at}: {", ".join(bad)}; lower optim.learning_rate or set optim.clip_norm'
      )
      self.close()
    return not bad


def claim_folder(config: Cell, workdir: str) -> None:
  """Writes config.json, or checks that the folder is this cell's.

  Raises `UserError` when it is another's, and `BrokenFile` when a file there cannot be believed.
  """
  path = files.join(workdir, schema.CONFIG)
  if jax.process_index() == 0 and not files.exists(path):
    try:
      files.create(path, config.to_json())
    except FileExistsError:
      pass  # another worker was faster; the check below still holds
    except OSError as error:
      raise UserError(f'cannot write {path} ({error.strerror}); free space or choose another workdir') from error
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(schema.CONFIG)
  try:
    found = from_json(files.read(path))
  except (UserError, IsADirectoryError, schema.Broken) as error:
    raise _broken(path, getattr(error, 'strerror', None) or str(error)) from None
  if found.id != config.id:
    raise UserError(f'{workdir} holds cell {found.id} and the configuration is cell {config.id}; use another workdir')
  state = cell_state.read(workdir, config.id)
  if state.state == schema.INVALID:
    name, _, why = state.reason.partition(': ') if state.broken else ('', '', state.reason)
    # Without its result too, the cell would go on saying that it has an autoencoder.
    what = f'{schema.RESULT} and {schema.ARTIFACT}' if state.broken == schema.ARTIFACT else 'it'
    raise _broken(files.join(workdir, name), why, what)


def _broken(path: str, why: str, what: str = 'it') -> BrokenFile:
  return BrokenFile(
    f'{path}: {cell_state.printable(why)[:120]}; move {what} aside (python -m sweeps.retry does) and start again'
  )
