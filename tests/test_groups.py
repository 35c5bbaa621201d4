"""Cells are put together only when they read one stream at one step."""

import pytest

from experiments import tiny
from sae_jax import config, files, metrics
from sweeps import groups, ledger, work
from tests import cells


@pytest.fixture
def store(tmp_path):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(
    cells.sweep(
      {'sae.k': 2},
      {'sae.k': 3},
      {'sae.k': 5, 'train.seed': 1},
      {'sae.k': 7, 'data.seed': 4},
      {'sae.n_latents': 61},
    )
  )
  return store


def waiting(store):
  return sorted(store.states(), key=lambda s: sorted(s.entry.overrides.items()))


def chosen(store, count):
  return [s.entry.overrides for s in groups.companions(store, of(store, {'sae.k': 2}), waiting(store), count)]


def of(store, overrides):
  return next(s for s in store.states() if s.entry.overrides == overrides)


def test_companions_share_the_stream(store):
  assert {'sae.k': 7, 'data.seed': 4} not in chosen(store, 9) and len(chosen(store, 9)) == 3
  assert chosen(store, 1) == chosen(store, 9)[:1]
  assert chosen(store, 0) == []


def test_companions_are_at_one_step(store):
  folder = store.folder(of(store, {'sae.k': 3}).entry.id)
  files.create(files.join(folder, 'ckpt', '20', 'x'), b'')
  files.create(files.join(folder, 'ckpt', '5.damaged', 'x'), b'')
  assert groups.newest_step(store, of(store, {'sae.k': 3}).entry.id) == 20
  ahead = of(store, {'sae.k': 3})
  assert groups.companions(store, ahead, waiting(store), 9) == []
  behind = of(store, {'sae.k': 2})
  assert ahead.entry.id not in {s.entry.id for s in groups.companions(store, behind, waiting(store), 9)}
  other = store.folder(of(store, {'sae.n_latents': 61}).entry.id)
  files.create(files.join(other, 'ckpt', '20', 'x'), b'')
  assert [s.entry.overrides for s in groups.companions(store, ahead, waiting(store), 9)] == [{'sae.n_latents': 61}]


def test_cell_that_failed_trains_alone(store):
  metrics.record_failure(store.folder(of(store, {'sae.k': 3}).entry.id), ValueError('once'))
  failed = of(store, {'sae.k': 3})
  assert failed.attempts == 1
  assert groups.companions(store, failed, waiting(store), 9) == []
  assert all(s.attempts == 0 for s in groups.companions(store, of(store, {'sae.k': 2}), waiting(store), 9))


def test_most_follows_source_mesh_and_user():
  def cell(**flat):
    return config.resolve(config.override(tiny.get_config(), flat))

  live = {'data.source': 'live', 'data.store_tokens': 10**6, 'sae.d_model': 6}
  assert groups.most(cell(), None) == 1
  assert groups.most(cell(**live), None) > 1
  assert groups.most(cell(**live), 1) == 1 and groups.most(cell(), 20) == 20


class Wild(Exception):
  """Ends a cell for good."""


def run(store, train_group, **more):
  return work.run(store, train_group, stop=lambda: False, permanent=(Wild,), poll_s=0.0, **more)


def finish(config_, folder):
  return cells.finish(folder, config_)


def test_worker_trains_together_what_shares_a_stream(store):
  seen = []

  def train_group(cells, *, should_stop, label, **_):
    assert not should_stop() and (len(cells) == 1 or label == f'{len(cells)} cells')
    seen.append([c.data.seed for c, _ in cells])
    return [finish(*cell) for cell in cells]

  assert run(store, train_group, group=9) == 0
  assert sorted(map(len, seen)) == [1, 4] and [4] in seen  # one cell reads in another order
  assert all(s.state == 'done' for s in store.states())


def test_group_member_that_fails_is_charged_alone(store):
  def train_group(cells, **_):
    return [Wild('not finite') if c.sae.k == 3 else finish(c, folder) for c, folder in cells]

  assert run(store, train_group, group=9) == 1
  assert {s.state for s in store.states() if s.entry.overrides == {'sae.k': 3}} == {'failed'}
  assert sum(s.state == 'done' for s in store.states()) == 4


def test_after_a_group_failed_its_cells_train_alone(store):
  sizes = []

  def train_group(cells, **_):
    sizes.append(len(cells))
    if len(cells) > 1:
      raise RuntimeError('out of memory')
    return [finish(*cell) for cell in cells]

  assert run(store, train_group, group=9) == 0
  assert sorted(sizes) == [1, 1, 1, 1, 1, 4]


def test_partition_does_not_depend_on_what_is_done(store):
  every = store.entries()
  parts = groups.partition(every, 2)
  assert sorted(c.id for part in parts for c in part) == sorted(c.id for c in every)
  assert sorted(map(len, parts)) == [1, 2, 2]
  assert all(len({c.cell.group_key for c in part}) == 1 for part in parts)
  for entry in every[:2]:
    finish(entry.cell, store.folder(entry.id))
  assert groups.partition(store.entries(), 2) == parts
  assert groups.partition(every, None) == [[c] for c in every]  # planted data: nothing is saved by a group
