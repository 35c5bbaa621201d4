"""Train one autoencoder: `python -m sae_jax.train --config=experiments/tiny.py --workdir=runs/tiny`.

A run is a pure function of its configuration. It can be killed at any moment and started again: the state comes
from the newest good checkpoint, batches are a function of the step, and the bits do not change (same configuration,
mesh, versions, number of cores and instruction set).
"""

import argparse
import contextlib
import dataclasses
import errno
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sae_jax import (
  cell_state,
  checkpoint,
  config_flags,
  distributed,
  faults,
  files,
  flops,
  lease,
  metrics,
  notes,
  schema,
  sharding,
  sparse,
  watchdog,
)
from sae_jax.config import Config, resolve
from sae_jax.data import feed
from sae_jax.data.source import Source, open_source
from sae_jax.errors import HOST_BROKEN, PREEMPTED, BrokenFile, UserError, one_line_errors
from sae_jax.member import Diverged, Member, check_finite, claim_folder
from sae_jax.progress import Progress
from sae_jax.startup import start_up_sample
from sae_jax.step import abstract_state, make_group_step, make_step


def train(
  config: Config,
  workdir: str,
  *,
  should_stop: Callable[[], bool] | None = None,
  before_write: Callable[[], None] | None = None,
  label: str = '',
) -> str:
  """Trains or resumes one cell in its folder.

  Args:
    config: the cell.
    workdir: its folder; config.json, ckpt/, metrics.jsonl, sae/ and, last, result.json are written there.
    should_stop: asked after every step; when true a checkpoint is saved and 'preempted' returned. Asked once more
      before the result is written, when its answer no longer matters.
    before_write: called before anything is written that others see. What it raises ends the run.
    label: shown before the progress.

  Returns:
    'done' (also at once when the cell is finished) or 'preempted'.

  Raises:
    UserError: input that cannot be trained on. Diverged: the loss is not finite.
  """
  (outcome,) = train_group(
    [(config, workdir)], should_stop=should_stop, before_write=before_write, label=label or config.id
  )
  if isinstance(outcome, Diverged):
    raise outcome
  return outcome


def train_group(
  cells: Sequence[tuple[Config, str]],
  *,
  should_stop: Callable[[], bool] | None = None,
  before_write: Callable[[], None] | None = None,
  label: str = '',
) -> list[str | Diverged]:
  """Trains or resumes cells of one stream (`Config.group_key`) together, each in its own folder.

  Every batch is read once for all, and the cells share a compiled step. Each cell ends with the bits, checkpoints and
  files it would have alone. A cell that diverges leaves the group; the others go on. Cells whose checkpoints are at
  different steps are trained in turn, those of one step together.

  Returns:
    For each cell 'done', 'preempted', or the `Diverged` it ended with.

  Raises:
    UserError: cells of different streams, or input that cannot be trained on.
  """
  if len({config.group_key for config, _ in cells}) > 1:
    raise UserError(
      'cells of a group must share data, batch, tokens, width and mesh; train the others in another group'
    )
  for config, workdir in cells:
    claim_folder(config, workdir)
  outcomes: list[str | Diverged] = ['done'] * len(cells)
  todo = [i for i, (_, workdir) in enumerate(cells) if not files.exists(files.join(workdir, schema.RESULT))]
  if not todo:
    return outcomes
  checkpoint.close_abandoned()
  first = cells[0][0]
  source, mesh = open_source(first), sharding.make_mesh(first.mesh)
  sample = functools.cache(lambda: start_up_sample(source, first.train.tokens))
  costs = {i: flops.cell_flops(cells[i][0])['dense'] for i in todo}
  by_start: dict[int, list[_Trainee]] = {}
  for i in todo:
    config, workdir = cells[i]
    init, _ = make_step(config, mesh)
    member = Member(config, workdir, mesh, source, costs[i] / sum(costs.values()), before_write)
    state = member.start(abstract_state(init, mesh, config), lambda init=init: init(*sample()))
    by_start.setdefault(int(state.step), []).append(_Trainee(i, member, state))
  for start, together in sorted(by_start.items()):
    outcomes_here = _train_together(together, source, mesh, start, should_stop, label)
    for i, outcome in outcomes_here.items():
      outcomes[i] = outcome
    if 'preempted' in outcomes_here.values():
      later = [t.index for other, ts in by_start.items() if other > start for t in ts]
      return ['preempted' if i in later else outcome for i, outcome in enumerate(outcomes)]
  return outcomes


@dataclasses.dataclass
class _Trainee:
  """A member on its way, with its place among the cells of the call."""

  index: int
  member: Member
  state: Any
  values: dict[str, jax.Array] = dataclasses.field(default_factory=dict)  # metrics of the newest step


class _Group:
  """Trainees that share one compiled step."""

  def __init__(self, mesh: Mesh, trainees: list[_Trainee]):
    self.mesh, self.trainees = mesh, trainees
    self._compile()

  def advance(self, x_BD: jax.Array) -> None:
    states, values = self._step(tuple(t.state for t in self.trainees), x_BD)
    for trainee, state, line in zip(self.trainees, states, values, strict=True):
      trainee.state, trainee.values = state, line

  def drop(self, index: int) -> None:
    for trainee in [t for t in self.trainees if t.index == index]:
      trainee.member.close()
      self.trainees.remove(trainee)
      self._compile()

  def _compile(self) -> None:
    if self.trainees:
      self._step = make_group_step([t.member.config for t in self.trainees], self.mesh)


def _train_together(
  trainees: list[_Trainee],
  source: Source,
  mesh: Mesh,
  start: int,
  should_stop: Callable[[], bool] | None,
  label: str,
) -> dict[int, str | Diverged]:
  outcomes: dict[int, str | Diverged] = {t.index: 'done' for t in trainees}
  first = trainees[0].member.config
  steps, batch = first.train.steps, first.train.batch_tokens
  group = _Group(mesh, list(trainees))
  progress = Progress(label, steps * batch, start * batch, visible=jax.process_index() == 0)
  device = mesh.devices.flat[0].platform
  shard = (batch // mesh.shape['data'], first.sae.n_latents // mesh.shape['latent'])
  if first.sae.k is not None:
    with sparse.forced(first.mesh.products):
      progress.note(sparse.describe(device, *shard, first.sae.d_model, first.sae.k))
  for trainee in trainees:
    trainee.member.begin()

  def report(at: int, fetched: dict[int, dict[str, jax.Array]]) -> dict[int, dict[str, float]]:
    """Metrics of a step as numbers; whoever's are not finite leaves."""
    lines: dict[int, dict[str, float]] = {}
    for i, values in jax.device_get(fetched).items():
      lines[i] = {key: float(value) for key, value in values.items()}
      try:
        check_finite(at, lines[i])
      except Diverged as error:
        leave(i, error)
    if lines:
      nmse = min(line['train/nmse'] for line in lines.values())
      progress.update(at * batch, f'step {at}/{steps}  nmse {nmse:.4f}')
    return lines

  def leave(index: int, error: Diverged) -> None:
    outcomes[index] = error
    group.drop(index)

  def going() -> list[_Trainee]:
    return list(group.trainees)

  def evaluate(at: int, wanted: list[_Trainee], lines: dict[int, dict[str, float]]) -> None:
    for trainee in wanted:
      try:
        trainee.member.evaluate(at, trainee.state, lines[trainee.index])
      except Diverged as error:
        leave(trainee.index, error)

  pending: tuple[int, dict[int, dict[str, jax.Array]]] | None = None  # metrics are fetched one step late
  try:
    for at, x_BD in enumerate(feed.batches(source, mesh, batch, start, steps), start + 1):
      group.advance(x_BD)
      if pending:
        report(*pending)
      pending = (at, {t.index: t.values for t in going()})
      stop = should_stop is not None and should_stop()
      measuring = [t for t in going() if at < steps and t.member.evaluates_at(at)]
      saving = [t for t in going() if at < steps and (stop or at % t.member.config.train.checkpoint_every == 0)]
      if measuring or saving:
        lines = report(*pending)  # never save a state whose loss is not finite
        evaluate(at, [t for t in measuring if outcomes[t.index] == 'done'], lines)
        for trainee in saving:
          if outcomes[trainee.index] == 'done':
            trainee.member.save(at, trainee.state)
      if stop and at < steps:
        for trainee in going():
          trainee.member.close()
          outcomes[trainee.index] = 'preempted'
        return outcomes
      if not going():
        return outcomes
    lines = report(steps, pending[1]) if pending else {t.index: {} for t in going()}
    evaluate(steps, going(), lines)
  finally:
    progress.close()
  for trainee in going():
    trainee.member.close()
  if should_stop is not None:
    should_stop()  # a holder that lost its lease ends here rather than write beside its successor
  for trainee in going():
    trainee.member.finish(trainee.state)
  return outcomes


def _claim(workdir: str) -> lease.Lease | None:
  """The lease of a cell's folder for this run; None for a finished cell, and in every process but the first.

  A holder of this machine is known to live or to be dead. One of another is watched until its lease changes or is stale.
  Raises `UserError` when another process trains the cell, and when it is cancelled.
  """
  refused, held = '', None
  if jax.process_index() == 0 and not files.exists(files.join(workdir, schema.RESULT)):
    if files.exists(files.join(workdir, schema.CANCEL)):
      refused = f'{workdir} is cancelled; python -m sweeps.cancel --undo takes it up again'
    observer, first = lease.Observer(), None
    while not refused and (held := observer.claim(workdir)) is None:
      holder = observer.holder(workdir)
      elsewhere = holder is not None and (holder['pid_space'] or 'unknown') != lease.pid_space()
      if first is None and holder is not None and elsewhere:
        print(
          f'{workdir}: waiting up to 90 s to see whether {lease.name_of(holder)} still trains it',
          file=sys.stderr,
        )
        first = holder
      elif holder is not None and holder != first:
        refused = f'{workdir} is being trained by {lease.name_of(holder)}; wait for it or stop it'
      else:
        time.sleep(1.0)
  if jax.process_count() > 1:
    key = 'train/refused'
    if jax.process_index() == 0:
      distributed.tell(key, refused or '-')
    while not (said := distributed.hear(key, timeout_s=60)):
      pass
    refused = said.removeprefix('-')
  if refused:
    raise UserError(refused)
  return held


def _is_of_host(error: Exception) -> bool:
  return not faults.is_disk_full(error) and faults.is_host_error(error)


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
  claim_folder(config, workdir)
  held = _claim(workdir)
  try:
    with held or contextlib.nullcontext(), watchdog.Watchdog() as alive:
      for line in notes.of(config) if jax.process_index() == 0 else ():
        print(f'note: {line}', file=sys.stderr)
      flag = distributed.stop_flag()
      asked = alive.beating(flag)

      def should_stop() -> bool:
        if held is not None:
          held.check()
          if held.cancelled:
            flag.ask()
        return asked()

      before_write = functools.partial(held.check, fresh=True) if held is not None else None
      try:
        outcome = train(config, workdir, should_stop=should_stop, before_write=before_write)
      except Exception as error:
        # One attempt, however many processes, and none when another rank died or the machine is at fault.
        blameless = isinstance(error, lease.LeaseLost | BrokenFile) or _is_of_host(error)
        if held is not None and not blameless and not distributed.lost_peer(error):
          held.check(fresh=True)
          metrics.record_failure(workdir, error, permanent=isinstance(error, Diverged))
        raise
  except lease.LeaseLost as error:
    print(f'lease lost: {error}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    # Not sys.exit: a checkpoint still being written belongs to a cell that is no longer ours.
    os._exit(PREEMPTED)
  except Exception as error:
    of_host = _is_of_host(error)
    if isinstance(error, Diverged):
      raise UserError(str(error)) from error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      raise UserError(f'{workdir}: {error.strerror}; free some space and start again: it resumes') from error
    if of_host:
      what = cell_state.printable(f'{type(error).__name__}: {error}')
      print(f'error: this machine cannot go on ({what}); mend it and start again: it resumes', file=sys.stderr)
      sys.stderr.flush()
      # Not sys.exit: what waits for a thread or a descriptor at the end might wait for ever.
      os._exit(HOST_BROKEN)
    raise
  if outcome == 'preempted' and held is not None and held.cancelled:
    undo = 'after python -m sweeps.cancel --undo the same command resumes'
    print(f'{config.id}: cancelled, checkpoint saved; {undo}', file=sys.stderr)
    return PREEMPTED
  if outcome == 'preempted':
    print(f'{config.id}: preempted, checkpoint saved; the same command resumes', file=sys.stderr)
    return 128 + signal.SIGINT if flag.signum == signal.SIGINT else PREEMPTED
  print(files.read(files.join(workdir, schema.RESULT)).decode(), end='')
  return 0


if __name__ == '__main__':
  main()
