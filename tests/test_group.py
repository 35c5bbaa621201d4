"""A group of cells in one compiled step leaves behind what each cell alone would."""

import json
import pathlib

import jax
import pytest

from sae_jax import config, training
from sae_jax.errors import UserError
from tests.cells import ON_MESH, STEPS, cell

# Members that differ in k, learning rate, seed, coefficient and n.
DIFFERENCES = (
  {},
  {'sae.k': 5, 'sae.n_latents': 37, 'optim.learning_rate': 3e-3},
  {'train.seed': 7, 'loss.aux_coefficient': 0.5, 'loss.dead_tokens': 70},
)
ALL = range(len(DIFFERENCES))


def facts(workdir: pathlib.Path) -> dict:
  record = json.loads((workdir / 'result.json').read_text())
  return {key: value for key, value in record.items() if key not in ('wall_s', 'git_commit', 'digest')}


def stop_after(steps: int):
  calls = iter(range(10_000))
  return lambda: next(calls) >= steps - 1


@pytest.fixture(scope='module')
def alone(trained, tmp_path_factory):
  folder = tmp_path_factory.mktemp('alone')
  (folder / '0').symlink_to(trained / 'cells' / cell().id)
  for i, changes in enumerate(DIFFERENCES[1:], 1):
    assert training.train(cell(**changes), str(folder / str(i))) == 'done'
  return folder


def members(folder: pathlib.Path, **more) -> list[tuple[config.Cell, str]]:
  return [(cell(**changes, **more), str(folder / str(i))) for i, changes in enumerate(DIFFERENCES)]


def test_group_ends_with_the_bits_of_each_cell_alone(alone, tmp_path):
  assert training.train_group(members(tmp_path)) == ['done'] * 3
  for i in ALL:
    assert facts(tmp_path / str(i)) == facts(alone / str(i))


def test_group_checkpoints_are_the_cells_own(alone, tmp_path):
  assert training.train_group(members(tmp_path), should_stop=stop_after(7)) == ['preempted'] * 3
  # One goes on alone to its end and one for two steps. What is left then is at two steps, and is trained in turn.
  assert training.train(cell(**DIFFERENCES[0]), str(tmp_path / '0')) == 'done'
  assert training.train(cell(**DIFFERENCES[1]), str(tmp_path / '1'), should_stop=stop_after(2)) == 'preempted'
  assert training.train_group(members(tmp_path)) == ['done'] * 3
  for i in ALL:
    assert facts(tmp_path / str(i)) == facts(alone / str(i))


def test_group_member_that_diverges_harms_no_other(alone, tmp_path):
  wild = (cell(**{'optim.learning_rate': 1e30}), str(tmp_path / 'wild'))
  outcomes = training.train_group([members(tmp_path)[0], wild])
  assert outcomes[0] == 'done' and isinstance(outcomes[1], training.Diverged)
  assert not (tmp_path / 'wild' / 'result.json').exists()
  assert facts(tmp_path / '0') == facts(alone / '0')


def test_group_of_two_streams_is_refused(tmp_path):
  cells = [(cell(), str(tmp_path / 'a')), (cell(**{'data.seed': 3}), str(tmp_path / 'b'))]
  with pytest.raises(UserError, match='must share data'):
    training.train_group(cells)
  assert not (tmp_path / 'a').exists()


def test_group_reads_each_batch_once(tmp_path, monkeypatch):
  from sae_jax.data import planted

  asked = []
  rows = planted.Planted.rows
  monkeypatch.setattr(planted.Planted, 'rows', lambda self, a, b: asked.append((a, b)) or rows(self, a, b))
  training.train_group(members(tmp_path))
  batch = cell().train.batch_tokens
  batches = [span for span in asked if span[1] - span[0] == batch]
  assert sorted(batches) == [(i * batch, (i + 1) * batch) for i in range(STEPS)]


def test_group_on_a_mesh_of_processors_waits_for_every_step(tmp_path, monkeypatch):
  """Programs in flight together can wait for each other's threads for ever: see sharding.settled."""
  waited = []
  genuine = jax.block_until_ready
  monkeypatch.setattr(jax, 'block_until_ready', lambda tree: waited.append(type(tree)) or genuine(tree))
  pair = [cell(**ON_MESH | {'train.seed': seed, 'train.tokens': 40 * 4}) for seed in (0, 1)]
  outcomes = training.train_group([(c, str(tmp_path / str(i))) for i, c in enumerate(pair)])
  assert outcomes == ['done', 'done']
  # Four steps of both, the start of each, and both weights that each gathers for an evaluation after every step.
  assert waited.count(tuple) == 4 and waited.count(dict) == 4 * 2 * 2 and len(waited) == 4 + 2 + 16
