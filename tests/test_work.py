import errno
import json
import os
import pathlib
import subprocess
import sys
from unittest import mock

import pytest

from sae_jax import faults, files, lease
from sae_jax.errors import UserError
from sweeps import ledger, work
from tests import cells


class Broken(Exception):
  pass


def make_sweep(ks):
  return cells.sweep(*({'sae.k': k, 'sae.n_latents': 16 * k} for k in ks))


@pytest.fixture
def store(tmp_path):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(make_sweep([3, 5, 4]))
  return store


class FakeTrain:
  """Commits a result at once; `raises` maps k to errors that come first."""

  def __init__(self, raises=()):
    self.raises = {k: list(errors) for k, errors in dict(raises).items()}
    self.order = []

  def __call__(self, cell, folder, *, should_stop, label, **_):
    self.order.append(cell.sae.k)
    assert not should_stop()
    if self.raises.get(cell.sae.k):
      raise self.raises[cell.sae.k].pop(0)
    return cells.finish(folder, cell)


def never():
  return False


def run(store, train, **more):
  """A worker that trains its cells one by one, with `train`."""
  one_by_one = lambda cells, **named: [train(*cell, **named) for cell in cells]  # noqa: E731
  return work.run(store, one_by_one, **more)


def states(store):
  return {s.entry.overrides['sae.k']: s for s in store.states()}


def test_run_trains_largest_first(store):
  train = FakeTrain()
  assert run(store, train, stop=never) == 0
  assert train.order == [5, 4, 3]
  assert all(s.state == 'done' for s in store.states())
  assert run(store, train, stop=never) == 0
  assert len(train.order) == 3


def test_run_leaves_other_cells_alone_when_one_crashes(store):
  train = FakeTrain({5: [Broken('first'), Broken('second')]})
  assert run(store, train, stop=never) == 0
  assert train.order == [5, 4, 3, 5, 5]
  assert not files.exists(files.join(store.folder(states(store)[5].entry.id), 'failure.json'))


def test_run_gives_up_after_max_failures(store):
  train = FakeTrain({5: [Broken(str(i)) for i in range(9)]})
  assert run(store, train, stop=never, max_failures=2) == 1
  assert train.order.count(5) == 2
  found = {k: s.state for k, s in states(store).items()}
  assert found == {3: 'done', 4: 'done', 5: 'waiting'}  # two of the three attempts of another limit
  record = json.loads(files.read(files.join(store.folder(states(store)[5].entry.id), 'failure.json')))
  assert (record['error'], record['kind'], record['attempts']) == ('1', 'Broken', 2)
  assert 'raise self.raises' in record['traceback']


@pytest.mark.parametrize('error', [UserError('bad value'), Broken('nan')])
def test_run_does_not_retry_what_cannot_help(store, error):
  train = FakeTrain({4: [error] * 9})
  assert run(store, train, stop=never, permanent=(Broken,)) == 1
  assert train.order == [5, 4, 3]


def test_run_stops_between_and_inside_cells(store):
  asked = []

  def preempted(cell, folder, *, should_stop, label, **_):
    asked.append(cell.sae.k)
    stopping.append(True)
    return 'preempted' if should_stop() else 'done'

  stopping = []
  assert run(store, preempted, stop=lambda: bool(stopping)) == work.PREEMPTED
  assert asked == [5]
  assert {k: s.state for k, s in states(store).items()} == dict.fromkeys((3, 4, 5), 'waiting')


def test_run_trains_cells_added_meanwhile(store):
  class Growing(FakeTrain):
    def __call__(self, *args, **kwargs):
      store.register(make_sweep([3, 4, 5, 6]))
      return super().__call__(*args, **kwargs)

  train = Growing()
  assert run(store, train, stop=never) == 0
  assert train.order == [5, 6, 4, 3]


def test_run_picks_up_the_cell_of_a_worker_that_dies(store):
  held = states(store)[5].entry.id
  other = store.claim(held)
  naps = []

  def stop():
    naps.append(1)
    if len(naps) == 20:  # the other worker dies while this one is waiting for it
      other._stop.set()
      claim = files.join(store.folder(held), 'claims', '1.json')
      cells.edit(claim, started=1)
    return False

  train = FakeTrain()
  assert run(store, train, stop=stop, poll_s=0.01) == 0
  assert train.order == [4, 3, 5]


@pytest.mark.parametrize('raises', [False, True])
def test_run_ends_at_once_when_the_lease_is_lost(store, raises):
  clock = [0.0]
  holder = ledger.Ledger(store.path, clock=lambda: clock[0])

  def overtaken(cell, folder, *, should_stop, label, **_):
    files.create(files.join(folder, 'claims', '2.json'), b'{"released": false}')
    clock[0] += 60.0
    if raises:
      raise Broken('a consequence of the other worker')
    should_stop()
    raise AssertionError('went on without the lease')

  with pytest.raises(lease.LeaseLost):
    run(holder, overtaken, stop=never)
  cell_id = states(store)[5].entry.id
  assert not files.exists(files.join(store.folder(cell_id), 'failure.json'))


def test_run_trains_one_cell_only_when_told_so(store):
  train, five = FakeTrain({4: [Broken(str(i)) for i in range(9)]}), states(store)
  assert run(store, train, stop=never, only=[five[3].entry.id]) == 0
  assert run(store, train, stop=never, only=[five[3].entry.id]) == 0
  assert run(store, train, stop=never, only=[five[4].entry.id], max_failures=2) == work.SOME_FAILED
  assert train.order == [3, 4, 4]
  with pytest.raises(UserError, match="no cell '0123456789ab'"):
    run(store, train, stop=never, only=['0123456789ab'])


@pytest.mark.parametrize('wrapped', [False, True])
def test_full_disk_stops_the_worker_and_is_no_fault_of_the_cell(store, wrapped):
  full = OSError(errno.ENOSPC, 'No space left on device')
  if wrapped:
    cause, full = full, RuntimeError('cannot save')
    full.__cause__ = cause
  train = FakeTrain({5: [full]})
  with pytest.raises(UserError, match='no space left'):
    run(store, train, stop=never)
  assert states(store)[5].state == 'waiting' and states(store)[5].attempts == 0
  assert run(store, train, stop=never) == 0
  assert train.order == [5, 5, 4, 3]


def of_host(wrapped: bool) -> Exception:
  error: Exception = OSError(errno.EMFILE, 'Too many open files')
  if wrapped:
    cause, error = error, RuntimeError('cannot save')
    error.__cause__ = cause
  return error


@pytest.mark.parametrize('wrapped', [False, True])
def test_error_of_the_host_ends_the_worker_and_is_no_fault_of_the_cell(store, wrapped):
  train = FakeTrain({5: [of_host(wrapped)]})
  with pytest.raises((OSError, RuntimeError)) as ended:
    run(store, train, stop=never)
  assert faults.is_host_error(ended.value) and train.order == [5]
  five = states(store)[5]
  assert (five.state, five.attempts) == ('waiting', 0)
  assert not files.exists(files.join(store.folder(five.entry.id), 'failure.json'))
  assert not store.held_by(os.getpid())  # the lease is released
  assert run(store, train, stop=never) == 0
  assert train.order == [5, 5, 4, 3]


def test_worker_says_why_it_ends_after_an_error_of_the_host(store, monkeypatch, capsys):
  from sae_jax import distributed, training

  def exit_(code):
    raise SystemExit(code)

  def broken(cells, **_):
    raise of_host(wrapped=True)

  monkeypatch.setattr(work, 'Stop', lambda: mock.Mock(return_value=False, signum=None))
  monkeypatch.setattr(distributed, 'initialize', lambda *_: None)
  monkeypatch.setattr(training, 'train_group', broken)
  monkeypatch.setattr(os, '_exit', exit_)
  with pytest.raises(SystemExit) as ended:
    work.main([f'--ledger={store.path}'])
  assert ended.value.code == 135
  (said,) = capsys.readouterr().err.splitlines()
  assert 'an error of its machine' in said and 'cannot save' in said and '135' in said
  assert [s.attempts for s in store.states()] == [0, 0, 0]


def test_single_run_is_not_charged_for_its_host(tmp_path, monkeypatch, capsys):
  from sae_jax import distributed, train, training

  def exit_(code):
    raise SystemExit(code)

  def broken(config, workdir, **_):
    raise of_host(wrapped=True)

  monkeypatch.setattr(training, 'train', broken)
  monkeypatch.setattr(distributed, 'initialize', lambda: None)
  monkeypatch.setattr(distributed, 'stop_flag', cells.NeverTold)
  monkeypatch.setattr(os, '_exit', exit_)
  with pytest.raises(SystemExit) as ended:
    train.main(['--config=experiments/tiny.py', f'--workdir={tmp_path}'])
  assert ended.value.code == 135 and sorted(os.listdir(tmp_path)) == ['claims', 'config.json']
  assert json.loads((tmp_path / 'claims' / '1.json').read_text())['released']
  (said,) = capsys.readouterr().err.splitlines()
  assert said.startswith('error: this machine cannot go on')


SIGNALLED = """
import os, signal, sys
from sweeps import work
stop = work.Stop()
assert not stop()
os.kill(os.getpid(), signal.SIGTERM)
assert stop() and stop.signum == signal.SIGTERM
os.kill(os.getpid(), signal.SIGTERM)
print('still here')
"""


def test_stop_asks_once_and_kills_the_second_time():
  found = subprocess.run([sys.executable, '-c', SIGNALLED], capture_output=True, text=True)
  assert (found.returncode, found.stdout, found.stderr) == (-15, '', '')


@pytest.mark.parametrize(
  ('argv', 'line'),
  [
    (['--ledger=missing'], 'no sweep at'),
    (['--ledger=missing', '--max_failures=0'], '--max_failures=0 is not a whole number of at least 1'),
    (['--ledger=s3://bucket/x'], 'exclusive create'),
  ],
)
def test_main_says_what_is_wrong_in_one_line(argv, line, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(work, 'Stop', lambda: never)
  with pytest.raises(SystemExit) as ended:
    work.main(argv)
  assert ended.value.code == 2
  (said,) = capsys.readouterr().err.splitlines()
  assert said.startswith('error: ') and line in said
  assert not list(pathlib.Path(tmp_path).iterdir())
