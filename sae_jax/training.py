"""The loop that trains cells; `sae_jax.train` is its command, and `sweeps.work` calls it for every cell of a ledger.

A run is a pure function of its configuration. It can be killed at any moment and started again. Its state then comes from
the newest good checkpoint, and a batch is a function of the step. The bits are those of a run that was never killed, with
the same configuration, mesh, versions, number of cores and instruction set.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Mesh

from sae_jax import checkpoint, files, flops, heap, schema, sharding, sparse, topk
from sae_jax.config import Cell
from sae_jax.data import feed
from sae_jax.data.source import Source, open_source
from sae_jax.errors import UserError
from sae_jax.families.family import family
from sae_jax.member import Diverged, Member, claim_folder
from sae_jax.progress import Progress
from sae_jax.startup import start_up_sample
from sae_jax.step import abstract_state, make_group_step, make_step


def train(
  config: Cell,
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
  cells: Sequence[tuple[Cell, str]],
  *,
  should_stop: Callable[[], bool] | None = None,
  before_write: Callable[[], None] | None = None,
  label: str = '',
) -> list[str | Diverged]:
  """Trains or resumes cells of one stream (`Cell.group_key`) together, each in its own folder.

  Every batch is read once for all, and the cells share a compiled step. Each cell ends with the bits, checkpoints and files
  that it would have alone. A cell that diverges leaves the group, and the others go on. Cells whose checkpoints are at one
  step train together. Those of different steps train in turn.

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
  todo = [(config, workdir) for config, workdir in cells if not files.exists(files.join(workdir, schema.RESULT))]
  if not todo:
    return ['done'] * len(cells)
  checkpoint.close_abandoned()
  first = cells[0][0]
  source, mesh = open_source(first), sharding.make_mesh(first.mesh)
  sample = functools.cache(lambda: start_up_sample(source, first.train.tokens))
  costs = [flops.cell_flops(config)['dense'] for config, _ in todo]
  by_start: dict[int, list[Member]] = {}
  for (config, workdir), cost in zip(todo, costs, strict=True):
    init, _ = make_step(config, mesh)
    member = Member(config, workdir, mesh, source, cost / sum(costs), before_write)
    member.start(abstract_state(init, mesh, config), lambda init=init: sharding.settled(mesh, init(*sample())))
    by_start.setdefault(int(member.state.step), []).append(member)
  ended: dict[str, str | Diverged] = {}
  for start, members in sorted(by_start.items()):
    if 'preempted' not in ended.values():
      _train_together(members, source, mesh, start, should_stop or (lambda: False), label)
    ended |= {member.workdir: member.outcome for member in members}
  return [ended.get(workdir, 'done') for _, workdir in cells]


def _train_together(
  members: list[Member], source: Source, mesh: Mesh, start: int, should_stop: Callable[[], bool], label: str
) -> None:
  """Trains members whose states are at step `start` until their results are written, or a stop is asked for."""
  config = members[0].config  # what is read of it here is the same for all
  steps, batch = config.train.steps, config.train.batch_tokens
  # One program for all. It is made anew when a member has left.
  compiled = functools.lru_cache(maxsize=1)(lambda *going: make_group_step([m.config for m in going], mesh))

  def going() -> list[Member]:
    return [m for m in members if m.outcome == 'preempted']

  def evaluate(member: Member, at: int) -> None:
    spent = member.evaluate(at)
    for other in members:
      other.leave_out(spent)

  def newest() -> dict[Member, dict[str, jax.Array]]:
    return {m: m.values for m in going()}

  def report(at: int, values: dict[Member, dict[str, jax.Array]]) -> None:
    """Fetches the metrics of a step. A member whose metrics are not finite trains no further."""
    lines = [{key: float(value) for key, value in line.items()} for line in jax.device_get([*values.values()])]
    for member, line in zip(values, lines, strict=True):
      if line:
        member.hear(at, line)
    if any(lines):
      nmse = min(line['train/nmse'] for line in lines if line)
      progress.update(at * batch, f'step {at}/{steps}  nmse {nmse:.4f}')

  def finish(ended: list[Member], evaluated: bool = True) -> None:
    for member in ended:
      if not evaluated:
        evaluate(member, start)
      if member.saves_at(steps):
        member.save(int(member.state.step))
      member.close()
    if ended:
      should_stop()  # a holder that lost its lease ends here rather than write beside its successor
    for member in ended:
      member.finish()

  progress = Progress(label, steps * batch, start * batch, visible=jax.process_index() == 0)
  with contextlib.closing(progress), heap.kept():
    if not family(config.sae.activation).penalised:
      progress.say(_products(config, mesh))
    for member in members:
      member.begin()
    # Whoever ended between its last checkpoint and its result.
    finish([m for m in members if m.converged], evaluated=False)
    if not going():
      return
    for at, x_BD in enumerate(feed.batches(source, mesh, batch, start, steps), start + 1):
      before = newest()
      states, values = sharding.settled(mesh, compiled(*before)(tuple(m.state for m in before), x_BD))
      for member, state, line in zip(before, states, values, strict=True):
        member.state, member.values = state, line
      report(at - 1, before)  # one step late, while this one runs
      stop = should_stop()
      if at < steps and (stop or any(m.evaluates_at(at) or m.saves_at(at) for m in going())):
        report(at, newest())  # never save a state whose loss is not finite
        for member in [m for m in going() if m.evaluates_at(at)]:
          evaluate(member, at)
        finish([m for m in going() if m.evaluates_at(at) and m.converged])
        for member in [m for m in going() if stop or m.saves_at(at)]:
          member.save(at)
      if (stop and at < steps) or not going():
        for member in going():
          member.close()
        return
    report(steps, newest())
    for member in going():
      evaluate(member, steps)
    finish(going())


def _products(config: Cell, mesh: Mesh) -> str:
  """One line on how the sparse products are computed."""
  shard = (config.train.batch_tokens // mesh.shape['data'], config.sae.n_latents // mesh.shape['latent'])
  platform = mesh.devices.flat[0].platform
  with sparse.forced(config.mesh.products):
    return sparse.describe(platform, *shard, config.sae.d_model, config.sae.k) + topk.describe(platform, shard[1])
