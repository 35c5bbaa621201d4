import errno
import json
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import time

import fsspec
import hypothesis
import hypothesis.strategies as st
import pytest

from sae_jax import cell as cell_module
from sae_jax import config, files, lease, metrics, schema
from sae_jax.errors import UserError
from sweeps import ledger, status, work
from tests import cells


class Clock:
  def __init__(self, now=0.0):
    self.now = now

  def __call__(self):
    return self.now


def make_sweep(ks, name='ks', **settings):
  more = {key.replace('_', '.'): value for key, value in settings.items()}
  return cells.sweep(*({'sae.k': k} | more for k in ks), name=name)


@pytest.fixture(params=['local', 'memory'])
def path(request, tmp_path):
  if request.param == 'local':
    yield str(tmp_path / 'ledger')
  else:
    yield 'memory://ledger'
    fsspec.filesystem('memory').rm('/ledger', recursive=True)


@pytest.fixture
def one(tmp_path):
  """A local ledger with one cell, and that cell's id."""
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(make_sweep([3]))
  return store, store.entries()[0].id


def finish(store, cell_id):
  (entry,) = (entry for entry in store.entries() if entry.id == cell_id)
  cells.finish(store.folder(cell_id), entry.cell)


def edit_claim(store, cell_id, **changes):
  claim = files.join(store.folder(cell_id), 'claims', '1.json')
  cells.edit(claim, **changes)


# ----- cells


def test_states_follow_the_files(path):
  store = ledger.Ledger(path)
  store.register(make_sweep([1, 2, 3, 4, 5]))
  ids = [entry.id for entry in store.entries()]
  finish(store, ids[0])
  held = store.claim(ids[1])
  for _ in range(3):
    metrics.record_failure(store.folder(ids[2]), ValueError('too\nlong \x1b[31m'))
  metrics.record_failure(store.folder(ids[3]), UserError('bad value'))
  metrics.record_failure(store.folder(ids[4]), ValueError('once'))
  states = store.states(max_failures=3)
  assert [s.state for s in states] == ['done', 'running', 'failed', 'failed', 'waiting']
  assert [s.attempts for s in states] == [0, 0, 3, 1, 1]
  assert states[2].reason.startswith('ValueError: too long ?[31m')
  assert 'attempt 1 of 3' in states[4].reason
  held.release()
  assert store.states()[1].state == 'waiting'


def test_register_writes_each_config_once_and_grows(path):
  store = ledger.Ledger(path)
  store.register(make_sweep([1, 2]))
  first = {entry.id: files.read(files.join(store.folder(entry.id), 'config.json')) for entry in store.entries()}
  store.register(make_sweep([2, 3]))
  found = store.entries()
  assert [entry.overrides['sae.k'] for entry in found] == [1, 2, 3]
  for entry in found:
    data = files.read(files.join(store.folder(entry.id), 'config.json'))
    assert config.from_json(data) == entry.cell
    assert first.get(entry.id, data) == data


def test_register_takes_new_run_settings_for_an_old_cell(tmp_path):
  store = ledger.Ledger(str(tmp_path))
  store.register(make_sweep([1]))
  store.register(make_sweep([1], mesh_data=2))
  (entry,) = store.entries()
  assert entry.cell.mesh.data == 2


def test_register_refuses_another_sweep(path):
  store = ledger.Ledger(path)
  store.register(make_sweep([1]))
  with pytest.raises(UserError, match=r"holds the sweep 'ks'.*its own --ledger"):
    store.register(make_sweep([1], name='other'))


def test_ledger_that_is_none_is_one_line(tmp_path):
  (tmp_path / 'file').write_text('x')
  for path in (tmp_path / 'missing', tmp_path / 'file'):
    with pytest.raises(UserError, match='no sweep at'):
      ledger.Ledger(str(path)).entries()
  with pytest.raises(UserError, match='cannot write the ledger'):
    ledger.Ledger(str(tmp_path / 'file')).register(make_sweep([1]))
  with pytest.raises(UserError, match='exclusive create'):
    ledger.Ledger('s3://bucket/sweep')


@hypothesis.given(st.one_of(st.text(max_size=12), st.sampled_from(['../../../etc', 'a' * 12 + '\n', 'A' * 12])))
@hypothesis.settings(max_examples=50, deadline=None)
def test_folder_takes_ids_only(name):
  hypothesis.assume(not (len(name) == 12 and set(name) <= set('0123456789abcdef')))
  with pytest.raises(UserError, match='not a cell id'):
    ledger.Ledger('memory://ids').folder(name)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
  lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
  max_leaves=5,
)


@hypothesis.given(data=JSON, key=st.sampled_from(['', 'cells', 'name', 'overrides', 'config', 'id']))
@hypothesis.settings(max_examples=60, deadline=None)
def test_edited_sweep_record_is_one_line(data, key):
  path = 'memory://edited'
  store = ledger.Ledger(path)
  files.remove(files.join(path, 'sweep.json'))
  store.register(make_sweep([1]))
  record = json.loads(files.read(files.join(path, 'sweep.json')))
  (entry,) = record['cells'].values()
  parent = {'overrides': entry, 'config': entry, 'id': entry['config']}.get(key, record)
  hypothesis.assume(key != 'name' or not isinstance(data, str))
  hypothesis.assume(key != 'overrides' or not isinstance(data, dict))
  hypothesis.assume(key != 'cells' or data != {})
  parent[key] = data
  edited = record if key else data
  files.replace(files.join(path, 'sweep.json'), json.dumps(edited).encode())
  with pytest.raises(
    UserError, match=r'sweep record \(.+\); move it aside and launch again'
  ):  # whatever was changed, its digest no longer fits
    store.entries()
  if isinstance(edited, dict):  # and what another version may have written is read with care all the same
    edited.pop('schema', None), edited.pop('digest', None)
  files.replace(files.join(path, 'sweep.json'), json.dumps(edited).encode())
  with pytest.raises(UserError, match=r'sweep.json is not a sweep record \(.+\); move it aside and launch again'):
    store.entries()


@hypothesis.example(b'{"kind": "", "error": "", "permanent": false, "attempts": 1e999}')
@hypothesis.example(b'{"host": "", "pid": 1e999, "started": 0, "pid_space": "", "released": false}')
@hypothesis.given(st.binary(max_size=20) | JSON.map(lambda x: json.dumps(x).encode()))
@hypothesis.settings(max_examples=60, deadline=None)
def test_broken_claims_and_failures_stop_nothing(data):
  store = ledger.Ledger('memory://broken')
  store.register(make_sweep([1, 2]))
  a, b = (entry.id for entry in store.entries())
  files.replace(files.join(store.folder(a), 'failure.json'), data)
  files.replace(files.join(store.folder(b), 'claims', '7.json'), data)
  failed, held = store.states()
  assert failed.state == 'invalid' and failed.reason.startswith('failure.json: ')
  assert held.state == 'running' or data == b''


# ----- leases


def test_claim_excludes_until_released(path):
  first, second = ledger.Ledger(path), ledger.Ledger(path)
  first.register(make_sweep([1]))
  cell_id = first.entries()[0].id
  with first.claim(cell_id) as held:
    assert second.claim(cell_id) is None
    held.check()
  with second.claim(cell_id):
    assert first.claim(cell_id) is None


def test_claim_of_a_finished_cell_is_none(one):
  store, cell_id = one
  finish(store, cell_id)
  assert store.claim(cell_id) is None
  assert store.claim(cell_id) is None


def _race(path, ids, barrier, wins):
  store = ledger.Ledger(path)
  barrier.wait()
  for cell_id in ids:
    if store.claim(cell_id) is not None:
      wins.put(cell_id)
  barrier.wait()  # nobody dies, which would free what it holds, before all have tried


def test_racing_processes_win_each_cell_once(tmp_path):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(make_sweep(range(1, 14)))
  ids = [entry.id for entry in store.entries()]
  context = multiprocessing.get_context('spawn')
  barrier, wins = context.Barrier(3), context.Queue()
  processes = [context.Process(target=_race, args=(store.path, ids, barrier, wins)) for _ in range(3)]
  for process in processes:
    process.start()
  won = sorted(wins.get() for _ in ids)
  for process in processes:
    process.join()
    assert process.exitcode == 0
  assert won == sorted(ids) and wins.empty()


def test_racing_threads_take_over_a_stale_lease_once(one):
  store, cell_id = one
  assert store.claim(cell_id)
  edit_claim(store, cell_id, pid_space='elsewhere')
  clock = Clock()
  observers = [ledger.Ledger(store.path, clock=clock) for _ in range(7)]
  assert [observer.claim(cell_id) for observer in observers] == [None] * 7
  clock.now = 90.0
  taken = []
  threads = [threading.Thread(target=lambda o=o: taken.append(o.claim(cell_id))) for o in observers]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert sum(x is not None for x in taken) == 1


def test_lease_is_stale_only_when_watched_unchanged(one):
  store, cell_id = one
  assert store.claim(cell_id)
  edit_claim(store, cell_id, pid_space='elsewhere')
  clock = Clock(1e9)  # a clock far from the holder's decides nothing
  observer = ledger.Ledger(store.path, clock=clock)
  assert observer.claim(cell_id) is None
  clock.now += 89.0
  assert observer.claim(cell_id) is None
  edit_claim(store, cell_id, refreshed=1)
  clock.now += 89.0
  assert observer.claim(cell_id) is None
  assert observer.states()[0].state == 'running'
  clock.now += 90.0
  assert observer.states()[0].state == 'waiting'
  assert observer.claim(cell_id) is not None


@pytest.mark.parametrize('written', [-1e18, 0.0, 4e9])
@pytest.mark.parametrize('now', [-1e9, 0.0, 1e15])
def test_clocks_of_other_machines_decide_nothing(one, written, now):
  store, cell_id = one
  assert store.claim(cell_id)
  edit_claim(store, cell_id, pid_space='elsewhere', refreshed=int(written))
  claim = pathlib.Path(store.folder(cell_id)) / 'claims' / '1.json'
  os.utime(claim, (max(0.0, written), max(0.0, written)))
  clock = Clock(now)
  observer = ledger.Ledger(store.path, clock=clock)
  assert observer.claim(cell_id) is None
  clock.now += 89.0
  assert observer.claim(cell_id) is None
  clock.now += 1.0
  assert observer.claim(cell_id) is not None


def test_holder_keeps_refreshing(one):
  store, cell_id = one
  claim = files.join(store.folder(cell_id), 'claims', '1.json')
  with ledger.Ledger(store.path, refresh_s=0.01).claim(cell_id):
    while json.loads(files.read(claim))['refreshed'] < 3:
      time.sleep(0.01)


CRASH = """
import os, sys
from sweeps import ledger
assert ledger.Ledger(sys.argv[1]).claim(sys.argv[2])
os._exit(9)
"""


def test_dead_process_of_this_host_is_succeeded_at_once(one):
  store, cell_id = one
  crashed = subprocess.Popen([sys.executable, '-c', CRASH, store.path, cell_id])
  assert crashed.wait() == 9
  assert store.states()[0].state == 'waiting'
  assert store.held_by(crashed.pid) == [cell_id]
  assert store.claim(cell_id) is not None
  assert store.held_by(crashed.pid) == []


def test_release_leaves_a_claim_alone_that_was_taken_over(one):
  store, cell_id = one
  held = store.claim(cell_id)
  files.create(files.join(store.folder(cell_id), 'claims', '2.json'), b'{"released": false}')
  held.release()
  assert not json.loads(files.read(files.join(store.folder(cell_id), 'claims', '1.json')))['released']


def test_full_disk_does_not_hide_why_a_lease_ended(one, monkeypatch, capsys):
  store, cell_id = one
  held = store.claim(cell_id)

  def full(*_, **named):
    raise OSError(errno.ENOSPC, 'No space left on device')

  with pytest.raises(KeyError, match='the reason'), held:
    monkeypatch.setattr(files, 'replace', full)
    raise KeyError('the reason')
  assert 'could not be released (No space left' in capsys.readouterr().err


def test_reused_process_id_counts_as_dead(one):
  store, cell_id = one
  assert store.claim(cell_id)
  assert store.claim(cell_id) is None
  started = json.loads(files.read(files.join(store.folder(cell_id), 'claims', '1.json')))['started']
  edit_claim(store, cell_id, started=started - 1)
  assert store.claim(cell_id) is not None


def test_process_ids_of_another_container_say_nothing(one):
  store, cell_id = one
  assert store.claim(cell_id)
  edit_claim(store, cell_id, pid_space='elsewhere', started=1)
  assert store.claim(cell_id) is None


def test_lost_lease_is_fatal_and_stays_lost(one):
  store, cell_id = one
  clock = Clock()
  holder = ledger.Ledger(store.path, clock=clock)
  held = holder.claim(cell_id)
  files.create(files.join(store.folder(cell_id), 'claims', '2.json'), b'{"released": false}')
  clock.now = 59.0
  held.check()  # within two refreshes nothing is read
  clock.now = 60.0
  for _ in range(2):
    with pytest.raises(lease.LeaseLost):
      held.check()
  held.release()
  assert not json.loads(files.read(files.join(store.folder(cell_id), 'claims', '1.json')))['released']


def test_background_refresh_notices_the_loss(one):
  store, cell_id = one
  held = ledger.Ledger(store.path, refresh_s=0.01).claim(cell_id)
  files.create(files.join(store.folder(cell_id), 'claims', '2.json'), b'{}')
  with pytest.raises(lease.LeaseLost):
    while True:
      held.check()
      time.sleep(0.01)


def test_unreachable_files_are_borne_until_the_lease_may_be_stale(one, monkeypatch):
  store, cell_id = one
  clock = Clock()
  held = ledger.Ledger(store.path, clock=clock).claim(cell_id)

  def unreachable(*_, **named):
    raise OSError('stale file handle')

  monkeypatch.setattr(files, 'replace', unreachable)
  clock.now = 89.0
  held.check()
  clock.now = 90.0
  with pytest.raises(lease.LeaseLost, match='stale file handle'):
    held.check()


# ----- work that grows with the ledger, and no faster


@pytest.fixture
def counted(monkeypatch):
  """How often each of these was called; `read` and `listdir` also by path."""
  counts = {'parse_large': 0, 'from_record': 0, 'id_of': 0, 'listdir': 0, 'read': []}

  def count(module, name, note):
    real = getattr(module, name)

    def counting(*args, **named):
      note(*args)
      return real(*args, **named)

    monkeypatch.setattr(module, name, counting)

  def add(name):
    def note(*_):
      counts[name] += 1

    return note

  count(schema, 'parse_large', add('parse_large'))
  count(config, 'from_record', add('from_record'))
  count(cell_module, 'id_of', add('id_of'))
  count(files, 'listdir', add('listdir'))
  count(files, 'read', lambda path, *_: counts['read'].append(pathlib.PurePosixPath(path).name))
  return counts


def clear(counts):
  counts.update(parse_large=0, from_record=0, id_of=0, listdir=0, read=[])


def make_many(path, count=30, finished=10):
  ledger.Ledger(path).register(cells.sweep(*({'train.seed': seed} for seed in range(count))))
  store = ledger.Ledger(path)
  for one in store.entries()[:finished]:
    cells.finish(store.folder(one.id), one.cell)
  return store


def test_a_second_look_parses_nothing_again(path, counted):
  store = make_many(path)
  store.claim(store.entries()[10].id)
  metrics.record_failure(store.folder(store.entries()[11].id), ValueError('once'))
  before = store.states()
  clear(counted)
  assert store.states() == before
  assert counted['from_record'] == counted['id_of'] == 0
  assert counted['listdir'] <= 20 + 1  # a folder for each cell that is not done, and the claims of the one that has any
  again = ['1.json', 'failure.json']
  assert sorted(set(counted['read']) - {'sweep.json'}) == again
  assert counted['parse_large'] == len(again)  # and sweep.json is not parsed even where its bytes have to be read
  assert sorted(counted['read'][-2:]) == again


def test_a_grown_sweep_is_parsed_where_it_grew(path, counted):
  store = make_many(path)
  listed = store.entries()
  assert len({entry.cell.id for entry in listed}) == 30
  assert store.entries() is listed
  ledger.Ledger(path).register(cells.sweep(*({'train.seed': seed} for seed in range(32))))
  clear(counted)
  assert len(store.entries()) == 32 and store.entries()[:30] == listed
  assert counted['from_record'] == 0 and counted['parse_large'] == 1
  assert len({entry.cell.id for entry in store.entries()}) == 32 and counted['from_record'] == 2
  ledger.Ledger(path).register(cells.sweep({'train.seed': 3, 'mesh.data': 2}))
  clear(counted)
  assert store.entries()[3].cell.mesh.data == 2 and counted['from_record'] == 1
  assert {entry.cell.train.seed for entry in store.entries()} == set(range(32)) and counted['from_record'] == 1


def test_status_of_finished_cells_makes_no_configuration(path, counted):
  make_many(path, count=5, finished=5)
  clear(counted)
  rows = status.report(ledger.Ledger(path), 3)['cells']
  assert [row['state'] for row in rows] == ['done'] * 5 and rows[0]['steps'] == 200
  assert counted['from_record'] == counted['id_of'] == 0


def test_registering_leaves_nothing_to_parse(path, counted):
  store = ledger.Ledger(path)
  store.register(cells.sweep(*({'train.seed': seed} for seed in range(30))))
  assert len(store.entries()) == 30
  assert counted['from_record'] == 0
  clear(counted)
  assert [s.state for s in store.states()] == ['waiting'] * 30
  assert 'config.json' not in counted['read']


def test_who_held_a_cell_is_found_without_the_finished_ones(path, counted):
  store = make_many(path)
  assert store.claim(store.entries()[12].id)
  store.states()
  clear(counted)
  assert store.held_by(os.getpid()) == [store.entries()[12].id]
  assert counted['from_record'] == 0 and counted['listdir'] <= 20


@pytest.mark.parametrize('count', [20, 60])
def test_a_sweep_costs_reads_in_proportion_to_its_cells(tmp_path, counted, count):
  store = make_many(str(tmp_path / 'ledger'), count, finished=0)

  def train(group, *, should_stop, **_):
    return [cells.finish(folder, config) for config, folder in group]

  clear(counted)
  assert work.run(store, train, stop=lambda: False) == 0
  assert counted['from_record'] == count  # once for each cell
  assert counted['listdir'] <= 10 * count and len(counted['read']) <= 10 * count + 2


def test_naps_are_in_proportion_to_looks():
  assert ledger.nap_s(0.5, 0.001) == 0.5
  assert ledger.nap_s(0.5, 2.0) == 40.0
