"""Two at once: who lost a lease does no harm, and nobody loses one to a mistake."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import threading
import time

import pytest

from sae_jax import distributed, files, lease, schema, single_run, train, training
from sae_jax.errors import BrokenFile, UserError
from sweeps import cancel, ledger, work
from tests import cells


@pytest.fixture
def one(tmp_path):
  """A ledger with the shared cell, and that cell's folder."""
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(cells.sweep({}, base=cells.SHARED))
  return store, pathlib.Path(store.folder(store.entries()[0].id))


def claim_file(folder, generation=1):
  return folder / schema.CLAIMS / f'{generation}.json'


def delete(folder):
  claim_file(folder).unlink()


def delete_folder(folder):
  shutil.rmtree(folder / schema.CLAIMS)


def let_another_in(folder):
  delete(folder)
  ledger.Ledger(str(folder.parents[1])).claim(folder.name)


def cut(folder):
  claim_file(folder).write_bytes(b'')


def overtake(folder):
  files.create(str(claim_file(folder, 2)), b'{"released": false}')


@pytest.mark.parametrize('lose', [delete, delete_folder, let_another_in, cut, overtake])
def test_a_claim_that_is_not_ours_is_lost_and_left_alone(one, lose):
  store, folder = one
  clock = [0.0]
  held = ledger.Ledger(store.path, clock=lambda: clock[0]).claim(folder.name)
  lose(folder)
  before = {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
  with pytest.raises(lease.LeaseLost):
    held.check(fresh=True)
  clock[0] = 60.0
  with pytest.raises(lease.LeaseLost):
    held.check()
  held.release()
  assert {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()} == before


def test_the_loser_of_a_restored_folder_writes_no_failure_into_the_done_cell(one):
  store, folder = one

  def restored(group, *, should_stop, **_):
    let_another_in(folder)
    cells.finish(str(folder), group[0][0])
    raise RuntimeError('a consequence of the other worker')

  with pytest.raises(lease.LeaseLost):
    work.run(store, restored, stop=lambda: False)
  assert not (folder / schema.FAILURE).exists()


def test_a_ledger_that_moved_away_is_not_made_again(one):
  store, folder = one
  clock = [0.0]
  held = ledger.Ledger(store.path, clock=lambda: clock[0]).claim(folder.name)
  os.rename(store.path, f'{store.path}-moved')
  clock[0] = 60.0
  with pytest.raises(lease.LeaseLost, match='moved away'):
    held.check()
  held.release()
  assert not os.path.exists(store.path)


@pytest.mark.parametrize('step', [3, 7, cells.STEPS])
def test_a_worker_that_wakes_after_a_takeover_writes_nothing(one, step):
  # Its clock has not moved: it was stopped after the look at its lease, and others saw more time pass.
  store, folder = one
  steps = itertools.count(1)
  before = {}

  def stop():
    if folder.joinpath(schema.CLAIMS).exists() and next(steps) == step:
      overtake(folder)
      before.update({p: p.read_bytes() for p in folder.glob('*') if p.is_file()})
      before['steps'] = saved(folder)
    return False

  with pytest.raises(lease.LeaseLost):
    work.run(store, training.train_group, stop=stop)
  before_steps = before.pop('steps')
  assert {p: p.read_bytes() for p in folder.glob('*') if p.is_file()} == before
  assert saved(folder) <= before_steps | {(step - 1) // 5 * 5}  # a save that had begun ends by itself
  assert not (folder / schema.ARTIFACT).exists() and not (folder / schema.RESULT).exists()


@pytest.mark.parametrize('at', ['claims', 'claims/1.json'])
def test_what_is_no_claim_in_its_place_is_one_line_and_stops_no_other_cell(tmp_path, at):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(cells.sweep({'sae.k': 2}, {'sae.k': 3}))
  first, second = (entry.id for entry in store.entries())

  def harm(folder):
    shutil.rmtree(f'{folder}/claims', ignore_errors=True)
    if at == 'claims':
      files.create(f'{folder}/claims', b'x')
    else:
      os.makedirs(f'{folder}/claims/1.json')

  harm(store.folder(first))
  assert store.claim(first) is None and store.held_by(os.getpid()) == []
  assert [s.state for s in store.states()] == [schema.INVALID, schema.WAITING]
  with pytest.raises(BrokenFile, match=r'claim.*; move it aside'):
    lease.Observer().claim(store.folder(first))
  with store.claim(second):
    assert store.held_by(os.getpid()) == [second]
  harm(store.path)  # of the ledger itself
  with pytest.raises(UserError, match=r'claim.*; move it aside'):
    store.register(cells.sweep({'sae.k': 2}, {'sae.k': 5}))


def saved(folder):
  return {int(p.name) for p in folder.glob('ckpt/*') if p.name.isdigit()}


# ----- who is alive


def test_a_live_process_of_another_user_is_not_dead(one, monkeypatch):
  store, folder = one
  held = store.claim(folder.name)
  pid = os.getpid() + 1  # that of nobody, as far as the fakes below go
  cells.edit(str(claim_file(folder)), pid=pid)
  read_text = pathlib.Path.read_text

  def hidden(path, *args, **named):
    if str(path) == f'/proc/{pid}/stat':
      raise FileNotFoundError(str(path))
    return read_text(path, *args, **named)

  def answer(error):
    def kill(asked, signum):
      assert (asked, signum) == (pid, 0)
      if error:
        raise error

    monkeypatch.setattr(os, 'kill', kill)

  monkeypatch.setattr(pathlib.Path, 'read_text', hidden)
  for error in (PermissionError(), None):
    answer(error)
    assert lease.process_start(pid) == lease.UNSEEN
    assert store.states()[0].state == schema.RUNNING and store.claim(folder.name) is None
  answer(ProcessLookupError())
  assert store.states()[0].state == schema.WAITING
  held.release()


def test_a_reused_process_id_is_not_charged(one):
  store, folder = one
  with store.claim(folder.name):
    started = lease.process_start(os.getpid())
    assert store.held_by(os.getpid(), started) == store.held_by(os.getpid()) == [folder.name]
    assert store.held_by(os.getpid(), started + 1) == []


# ----- registering


@pytest.mark.parametrize('seed', range(6))
def test_racing_launches_of_grown_grids_lose_no_cell(tmp_path, seed):
  path = str(tmp_path / 'ledger')
  ledger.Ledger(path).register(cells.sweep({'sae.k': 1}))
  sweeps = [cells.sweep({'sae.k': 1}, {'sae.k': 2 + i}, {'train.seed': 10 * seed + i}) for i in range(3)]
  barrier = threading.Barrier(len(sweeps))

  def register(sweep):
    store = ledger.Ledger(path)
    store.entries()
    barrier.wait()
    store.register(sweep)
    assert {c.id for _, c in sweep.cells} <= {one.id for one in store.entries()}

  threads = [threading.Thread(target=register, args=(sweep,)) for sweep in sweeps]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  wanted = {c.id for sweep in sweeps for _, c in sweep.cells}
  assert {one.id for one in ledger.Ledger(path).entries()} == wanted


def test_registering_waits_for_whoever_does_and_not_for_the_dead(tmp_path, monkeypatch, capsys):
  path = str(tmp_path / 'ledger')
  store = ledger.Ledger(path)
  store.register(cells.sweep({'sae.k': 1}))
  held = lease.Observer().claim(path)
  naps, sleep = [], time.sleep

  def nap(seconds):
    if seconds != ledger._POLL_S:
      return sleep(seconds)  # of whoever else sleeps: subprocess, for one
    naps.append(seconds)
    if len(naps) == 3:
      held._stop.set()
      cells.edit(os.path.join(path, schema.CLAIMS, '2.json'), started=1)  # it dies

  monkeypatch.setattr(ledger.time, 'sleep', nap)
  store.register(cells.sweep({'sae.k': 2}))
  assert len(naps) == 3 and len(store.entries()) == 2
  assert f'process {os.getpid()} on ' in capsys.readouterr().err


def test_registering_what_is_there_writes_nothing(tmp_path):
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(cells.sweep({'sae.k': 1}))
  before = sorted(tmp_path.rglob('*'))
  ledger.Ledger(store.path).register(cells.sweep({'sae.k': 1}))
  assert sorted(tmp_path.rglob('*')) == before


# ----- a single run


def command(folder):
  shared = (f'--config.{key}={value}' for key, value in cells.SHARED.items())
  return ['--config=experiments/tiny.py', f'--workdir={folder}', *shared]


@pytest.fixture
def alone(monkeypatch):
  """No gang is looked for, as jax has started already, and pytest keeps its signals."""
  monkeypatch.setattr(distributed, 'initialize', lambda: None)
  monkeypatch.setattr(distributed, 'stop_flag', cells.NeverTold)


def run(folder):
  with pytest.raises(SystemExit) as ended:
    train.main(command(folder))
  return ended.value.code


def test_a_second_run_in_one_folder_is_refused(alone, one, capsys):
  store, folder = one
  with store.claim(folder.name) as held:
    before = sorted(folder.rglob('*'))
    assert run(folder) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert f'is being trained by process {os.getpid()} on {os.uname().nodename}; wait for it or stop it' in said
    assert sorted(folder.rglob('*')) == before
    held.check(fresh=True)


def fake(monkeypatch, do):
  """Has `do(before_write)` in place of training."""

  def train(config, workdir, *, should_stop, before_write=None, label=''):
    assert not should_stop()
    return do(before_write)

  monkeypatch.setattr(training, 'train', train)


def test_a_run_holds_its_lease_and_lets_go(alone, one, monkeypatch, capsys):
  store, folder = one
  fake(monkeypatch, lambda _: 'preempted' if store.claim(folder.name) is None else 'nobody held it')
  assert run(folder) == 42
  cells.edit(str(claim_file(folder)), released=False, started=1)  # a dead process of this machine
  assert run(folder) == 42
  assert json.loads(claim_file(folder, 2).read_text())['released']

  def fail(before_write):
    raise RuntimeError('broken')

  fake(monkeypatch, fail)
  with pytest.raises(RuntimeError):
    train.main(command(folder))
  assert (folder / schema.FAILURE).exists() and json.loads(claim_file(folder, 3).read_text())['released']


def test_a_run_that_lost_its_lease_ends_without_a_word_in_the_folder(alone, one, monkeypatch, capsys):
  _, folder = one

  def lose(before_write):
    overtake(folder)
    before_write()

  def exited(code):
    raise SystemExit(code)

  fake(monkeypatch, lose)
  monkeypatch.setattr(os, '_exit', exited)
  assert run(folder) == 42
  assert 'lease lost: ' in capsys.readouterr().err and not (folder / schema.FAILURE).exists()


def test_a_run_hears_that_its_cell_is_cancelled(alone, one, monkeypatch, capsys):
  store, folder = one
  observer = lease.Observer
  monkeypatch.setattr(lease, 'Observer', lambda: observer(refresh_s=0.01))
  monkeypatch.setattr(signal, 'signal', lambda *_: None)
  monkeypatch.setattr(distributed, 'stop_flag', distributed.Signalled)

  def train(config, workdir, *, should_stop, **_):
    assert not should_stop()
    cancel.cancel(store, [folder.name])
    while not should_stop():
      time.sleep(0.01)
    return 'preempted'

  monkeypatch.setattr(training, 'train', train)
  assert run(folder) == 42 and 'cancelled, checkpoint saved; after' in capsys.readouterr().err
  assert store.states()[0].state == schema.CANCELLED
  before = sorted(folder.rglob('*'))
  assert run(folder) == 2 and 'is cancelled; python -m sweeps.cancel --undo' in capsys.readouterr().err
  assert sorted(folder.rglob('*')) == before
  cancel.undo(store, [])
  fake(monkeypatch, lambda _: 'preempted')
  assert run(folder) == 42 and 'preempted' in capsys.readouterr().err


@pytest.mark.parametrize('lives', [True, False])
def test_a_holder_on_another_machine_is_watched(alone, one, monkeypatch, capsys, lives):
  store, folder = one
  held = store.claim(folder.name)
  cells.edit(str(claim_file(folder)), pid_space='elsewhere')
  clock = itertools.count(0.0, 10.0)
  observer = lease.Observer
  monkeypatch.setattr(lease, 'Observer', lambda: observer(clock=lambda: next(clock)))
  naps = itertools.count()

  def nap(_):
    if lives and next(naps) == 1:
      cells.edit(str(claim_file(folder)), refreshed=1)

  monkeypatch.setattr(single_run.time, 'sleep', nap)
  fake(monkeypatch, lambda _: 'preempted')
  assert run(folder) == (2 if lives else 42)
  assert 'waiting up to 90 s' in capsys.readouterr().err
  held._stop.set()
