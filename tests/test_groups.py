"""Cells are put together only when they read one stream at one step."""

import pytest

from experiments import tiny
from sae_jax import config, files, metrics
from sweeps import grid, groups, ledger, work


def sweep(*overrides):
  resolved = tuple((o, config.resolve(config.override(tiny.get_config(), o))) for o in overrides)
  return grid.Sweep('mixed', 'experiments/tiny.py', resolved, dropped=0)


@pytest.fixture
def store(tmp_path):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(
    sweep(
      {'sae.k': 2},
      {'sae.k': 3},
      {'sae.k': 5, 'train.seed': 1},
      {'sae.k': 7, 'data.seed': 4},
      {'sae.n_latents': 61},
    )
  )
  return store


def waiting(store):
  return sorted(store.states(), key=lambda s: sorted(s.cell.overrides.items()))


def chosen(store, count):
  return [s.cell.overrides for s in groups.companions(store, of(store, {'sae.k': 2}), waiting(store), count)]


def of(store, overrides):
  return next(s for s in store.states() if s.cell.overrides == overrides)


def test_companions_share_the_stream(store):
  assert {'sae.k': 7, 'data.seed': 4} not in chosen(store, 9) and len(chosen(store, 9)) == 3
  assert chosen(store, 1) == chosen(store, 9)[:1]
  assert chosen(store, 0) == []


def test_companions_are_at_one_step(store):
  folder = store.folder(of(store, {'sae.k': 3}).cell.id)
  files.create(files.join(folder, 'ckpt', '20', 'x'), b'')
  files.create(files.join(folder, 'ckpt', '5.damaged', 'x'), b'')
  assert groups.newest_step(store, of(store, {'sae.k': 3}).cell.id) == 20
  ahead = of(store, {'sae.k': 3})
  assert groups.companions(store, ahead, waiting(store), 9) == []
  behind = of(store, {'sae.k': 2})
  assert ahead.cell.id not in {s.cell.id for s in groups.companions(store, behind, waiting(store), 9)}
  other = store.folder(of(store, {'sae.n_latents': 61}).cell.id)
  files.create(files.join(other, 'ckpt', '20', 'x'), b'')
  assert [s.cell.overrides for s in groups.companions(store, ahead, waiting(store), 9)] == [
    {'sae.n_latents': 61}
  ]


def test_cell_that_failed_trains_alone(store):
  metrics.record_failure(store.folder(of(store, {'sae.k': 3}).cell.id), ValueError('once'))
  failed = of(store, {'sae.k': 3})
  assert failed.attempts == 1
  assert groups.companions(store, failed, waiting(store), 9) == []
  assert all(s.attempts == 0 for s in groups.companions(store, of(store, {'sae.k': 2}), waiting(store), 9))


def test_most_follows_source_mesh_and_user():
  def cell(**flat):
    return config.resolve(config.override(tiny.get_config(), flat))

  live = {'data.source': 'live', 'data.store_tokens': 10**6, 'sae.d_model': 6}
  assert groups.most(cell(), None) == 1
  assert groups.most(cell(**{'mesh.member': 4}), None) == 4
  assert groups.most(cell(**live), None) > 1
  assert groups.most(cell(**live), 1) == 1 and groups.most(cell(), 20) == 20


class Wild(Exception):
  """Ends a cell for good."""


def run(store, train_group, train=None, **more):
  def alone(*_, **__):
    raise AssertionError('no cell should train alone here')

  return work.run(
    store, train or alone, stop=lambda: False, train_group=train_group, permanent=(Wild,), poll_s=0.0, **more
  )  # fmt: skip


def finish(config_, folder):
  metrics.commit_result(folder, {'id': config_.id})
  return 'done'


def test_worker_trains_together_what_shares_a_stream(store):
  groups_seen, alone = [], []

  def train_group(cells, *, should_stop, label):
    assert not should_stop() and label == f'{len(cells)} cells'
    groups_seen.append(len(cells))
    return [finish(*cell) for cell in cells]

  def train(config_, folder, **_):
    alone.append(config_.data.seed)
    return finish(config_, folder)

  assert run(store, train_group, train, group=9) == 0
  assert groups_seen == [4] and alone == [4]  # one cell reads in another order
  assert all(s.state == 'done' for s in store.states())


def test_group_member_that_fails_is_charged_alone(store):
  def train_group(cells, **_):
    wild = next(i for i, (c, _) in enumerate(cells) if c.sae.k == 3)
    return [Wild('not finite') if i == wild else finish(*cell) for i, cell in enumerate(cells)]

  assert run(store, train_group, finish_alone, group=9) == 1
  assert {s.state for s in store.states() if s.cell.overrides == {'sae.k': 3}} == {'failed'}
  assert sum(s.state == 'done' for s in store.states()) == 4


def finish_alone(config_, folder, **_):
  return finish(config_, folder)


def test_after_a_group_failed_its_cells_train_alone(store):
  alone = []

  def train_group(cells, **_):
    raise RuntimeError('out of memory')

  def train(config_, folder, **_):
    alone.append(config_.id)
    return finish(config_, folder)

  assert run(store, train_group, train, group=9) == 0
  assert len(alone) == 5
