import json

import pytest

from experiments import tiny
from sae_jax import config, metrics
from sae_jax.errors import UserError
from sweeps import grid, ledger, retry, status


@pytest.fixture
def store(tmp_path):
  """Four cells: done, failed for good, running at step 7, waiting."""
  cells = [{'sae.k': k} for k in (2, 3, 5, 7)]
  resolved = tuple((o, config.resolve(config.override(tiny.get_config(), o))) for o in cells)
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(grid.Sweep('primes', 'experiments/tiny.py', resolved, dropped=0))
  done, failed, running, _ = (store.folder(cell.id) for cell in store.cells())
  metrics.commit_result(done, {'steps': 200, 'nmse': 0.125})
  metrics.record_failure(failed, UserError('no such \x1b[2J file'))
  metrics.MetricsFile(running).write(7, {'eval/nmse': 0.5})
  with store.claim(store.cells()[2].id):
    yield store


def run(main, *argv):
  with pytest.raises(SystemExit) as ended:
    main(list(argv))
  return ended.value.code


def test_status_shows_counts_progress_and_reasons(store, capsys):
  assert run(status.main, f'--ledger={store.path}') == 0
  head, _, *rows = capsys.readouterr().out.splitlines()
  assert head == 'sweep primes: 1 done, 1 running, 1 failed, 1 waiting'
  done, failed, running, waiting = (row.split() for row in rows)
  assert done[1:] == ['k=2', 'done', '200/200', '0.1250']
  assert failed[1:3] == ['k=3', 'failed'] and failed[3:8] == ['UserError:', 'no', 'such', '?[2J', 'file']
  assert running[1:6] == ['k=5', 'running', '7/200', '0.5000', 'process']
  assert waiting[1:] == ['k=7', 'waiting']


def test_status_json_has_the_same(store, capsys):
  assert run(status.main, f'--ledger={store.path}', '--json') == 0
  found = json.loads(capsys.readouterr().out)
  assert found['counts'] == {'done': 1, 'running': 1, 'failed': 1, 'waiting': 1}
  assert [c['overrides'] for c in found['cells']] == [{'sae.k': k} for k in (2, 3, 5, 7)]
  assert [c.get('nmse') for c in found['cells']] == [0.125, None, 0.5, None]


def test_watch_ends_when_nothing_is_left(store, capsys, monkeypatch):
  def finish(_):
    for s in store.states():
      if s.state in ('running', 'waiting'):
        metrics.commit_result(store.folder(s.cell.id), {'steps': 200, 'nmse': 0.25})

  monkeypatch.setattr(status.time, 'sleep', finish)
  assert run(status.main, f'--ledger={store.path}', '--watch') == 0
  heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith('sweep')]
  assert heads[0].endswith('1 waiting') and heads[-1].endswith('3 done, 0 running, 1 failed, 0 waiting')


def test_retry_clears_what_failed(store, capsys):
  assert run(retry.main, f'--ledger={store.path}') == 0
  assert 'UserError: no such' in capsys.readouterr().out
  assert [s.state for s in store.states()] == ['done', 'waiting', 'running', 'waiting']
  assert retry.retry(store, []) == []


def test_retry_refuses_cells_without_a_failure(store):
  done, failed, running, waiting = (cell.id for cell in store.cells())
  for cell_id, rule in (
    (done, 'is done'),
    (running, 'is running'),
    (waiting, 'is waiting'),
    ('../x', 'no cell'),
  ):
    with pytest.raises(UserError, match=rule):
      retry.retry(store, [failed, cell_id])
  assert store.states()[1].state == 'failed'  # nothing is cleared when one name is wrong


@pytest.mark.parametrize('main', [status.main, retry.main])
def test_no_ledger_is_one_line(main, tmp_path, capsys):
  assert run(main, f'--ledger={tmp_path}') == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert 'start one with python -m sweeps.launch' in line
