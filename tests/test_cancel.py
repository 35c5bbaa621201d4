import pathlib
import time

import pytest

from sae_jax import metrics
from sae_jax.errors import UserError
from sweeps import cancel, ledger, work
from tests import cells


@pytest.fixture
def store(tmp_path):
  """Three cells: k = 2 is done, 3 and 5 wait."""
  store = ledger.Ledger(str(tmp_path / 'ledger'), refresh_s=0.01)
  store.register(cells.sweep(*({'sae.k': k} for k in (2, 3, 5))))
  finish(store, 0)
  return store


def finish(store, at):
  entry = store.entries()[at]
  cells.finish(store.folder(entry.id), entry.cell)


def run(*argv):
  with pytest.raises(SystemExit) as ended:
    cancel.main(list(argv))
  return ended.value.code


def found(store):
  return [s.state for s in store.states()]


def commit(group, *, should_stop, label, **_):
  ((cell, folder),) = group
  return [cells.finish(folder, cell)]


def test_cancelled_cell_is_left_out_until_undone(store, capsys):
  three = store.entries()[1].id
  assert run(f'--ledger={store.path}', three) == 0
  assert found(store) == ['done', 'cancelled', 'waiting']
  assert store.claim(three) is None
  assert work.run(store, commit, stop=lambda: False) == work.SOME_FAILED
  assert found(store) == ['done', 'cancelled', 'done']
  assert run(f'--ledger={store.path}', '--all', '--undo') == 0
  assert '1 cells to train again' in capsys.readouterr().out
  assert work.run(store, commit, stop=lambda: False) == 0
  assert found(store) == ['done'] * 3


def test_running_cell_is_saved_and_left_while_the_worker_goes_on(store):
  order = []

  def train(group, *, should_stop, label, **_):
    ((cell, _),) = group
    order.append(cell.sae.k)
    if len(order) == 1:
      cancel.cancel(store, [cell.id])
      assert store.states()[2].state == 'running'
      while not should_stop():
        time.sleep(0.01)
      return ['preempted']
    return commit(group, should_stop=should_stop, label=label)

  assert work.run(store, train, stop=lambda: False) == work.SOME_FAILED
  assert sorted(order) == [3, 5] and found(store).count('cancelled') == 1


def test_all_takes_what_is_unfinished(store):
  metrics.record_failure(store.folder(store.entries()[1].id), UserError('bad value'))
  assert [s.entry.overrides['sae.k'] for s in cancel.cancel(store, [])] == [5]
  assert found(store) == ['done', 'failed', 'cancelled']


def test_result_wins_over_a_cancel_that_came_late(store):
  three = store.entries()[1].id
  cancel.cancel(store, [three])
  finish(store, 1)
  assert found(store)[1] == 'done'


def test_cancel_refuses_what_it_cannot_do(store, capsys):
  done, three, _ = (entry.id for entry in store.entries())
  with pytest.raises(UserError, match='is done'):
    cancel.cancel(store, [three, done])
  with pytest.raises(UserError, match='no cell'):
    cancel.undo(store, ['../x'])
  assert found(store) == ['done', 'waiting', 'waiting']  # nothing is changed when one name is wrong
  for flags in ([], [three, '--all']):
    assert run(f'--ledger={store.path}', *flags) == 2
    assert 'name cells, or give --all' in capsys.readouterr().err
  assert not list(pathlib.Path(store.path).rglob('cancel.json'))
