import json
import os
import pathlib

import pytest

from sae_jax import metrics, schema
from sae_jax.errors import UserError
from sweeps import ledger, retry, status
from tests import cells


@pytest.fixture
def store(tmp_path):
  """Four cells: done, failed for good, running at step 7, waiting."""
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(cells.sweep(*({'sae.k': k} for k in (2, 3, 5, 7))))
  done, failed, running, _ = (store.folder(entry.id) for entry in store.entries())
  first, _, third, _ = store.entries()
  cells.finish(done, first.cell, nmse=0.125)
  metrics.record_failure(failed, UserError('no such \x1b[2J file'))
  spent = {'tokens': 7 * 256, 'wall_s': 14.0, 'flops_dense': 7.0}
  metrics.MetricsFile(running, third.id).write(7, {'eval/nmse': 0.5} | spent)
  with store.claim(store.entries()[2].id):
    yield store


def run(main, *argv):
  with pytest.raises(SystemExit) as ended:
    main(list(argv))
  return ended.value.code


def test_status_shows_counts_progress_and_reasons(store, capsys):
  failed_id = store.entries()[1].id
  log = pathlib.Path(store.path) / 'logs' / 'worker-0.log'
  log.parent.mkdir()
  log.write_text(f'cell {failed_id} k=3: starts\nlast \x1b[2J words\n\ncell 0123456789ab k=9: starts\nof another\n')
  assert run(status.main, f'--ledger={store.path}') == 0
  head, names, *rows = capsys.readouterr().out.splitlines()
  assert head.startswith('sweep primes: 1 done, 1 running, 1 failed, 1 waiting, ') and ' left ' in head
  assert names.split() == ['id', 'cell', 'state', 'step', 'nmse', 'tokens/s', 'left', 'why']
  running, failed, waiting, done = (row.split() for row in rows)
  assert done[1:] == ['k=2', 'done', '200/200', '0.1250']
  assert failed[1:3] == ['k=3', 'failed'] and failed[3:8] == ['UserError:', 'no', 'such', '?[2J', 'file']
  assert rows[1].endswith('| worker-0.log: last ?[2J words')
  # 193 steps of 2 s each
  assert running[1:10] == [
    'k=5',
    'running',
    '7/200',
    '0.5000',
    '128',
    '6',
    'min',
    'process',
    str(os.getpid()),
  ]
  assert waiting[1:] == ['k=7', 'waiting']


def test_last_words_cost_one_read_of_the_end_of_each_log(store, monkeypatch):
  second, fourth = (store.entries()[i].id for i in (1, 3))
  metrics.record_failure(store.folder(fourth), UserError('no such file'))
  logs = pathlib.Path(store.path) / 'logs'
  logs.mkdir()
  (logs / 'worker-0.log').write_text(f'cell {second} k=3: starts\nold\n')
  long = logs / 'worker-1.log'
  long.touch()
  os.truncate(long, 10 * 2**30)
  with open(long, 'a') as f:
    f.write(f'\ncell {fourth} k=7: starts\nfourth\ncell {second} k=3: starts\nnew\n')
  os.utime(logs / 'worker-0.log', (1, 1))
  read, tail = [], status.log_tail
  monkeypatch.setattr(status, 'log_tail', lambda path: read.append(path.name) or tail(path))
  rows = status.report(store, 3)['cells']
  assert [row.get('log') for row in rows] == [None, 'worker-1.log: new', None, 'worker-1.log: fourth']
  assert read == ['worker-0.log', 'worker-1.log']


def test_screen_holds_what_fits():
  shown = status.fitted('\n'.join(f'line {i}' for i in range(9)), columns=4, lines=5)
  assert shown.splitlines()[:3] == ['line'] * 3 and len(shown.splitlines()) == 4
  assert status.fitted('a\nb', columns=80, lines=24) == 'a\nb'


def test_status_json_has_the_same(store, capsys):
  assert run(status.main, f'--ledger={store.path}', '--json') == 0
  found = json.loads(capsys.readouterr().out)
  assert found['counts'] == dict.fromkeys(schema.STATES, 0) | dict.fromkeys(('done', 'running', 'failed', 'waiting'), 1)
  assert [c['overrides'] for c in found['cells']] == [{'sae.k': k} for k in (2, 3, 5, 7)]
  assert [c.get('left_s') for c in found['cells']] == [None, None, 2.0 * 193, None]
  assert [c.get('nmse') for c in found['cells']] == [0.125, None, 0.5, None]


def test_watch_ends_when_nothing_is_left(store, capsys, monkeypatch):
  def finish(_):
    for s in store.states():
      if s.state in ('running', 'waiting'):
        cells.finish(store.folder(s.entry.id), s.entry.cell)

  monkeypatch.setattr(status.time, 'sleep', finish)
  assert run(status.main, f'--ledger={store.path}', '--watch') == 0
  heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith('sweep')]
  assert '1 waiting' in heads[0] and heads[-1].endswith('3 done, 0 running, 1 failed, 0 waiting')


def test_retry_clears_what_failed(store, capsys):
  assert run(retry.main, f'--ledger={store.path}') == 0
  assert 'UserError: no such' in capsys.readouterr().out
  assert [s.state for s in store.states()] == ['done', 'waiting', 'running', 'waiting']
  assert retry.retry(store, []) == []


def test_retry_refuses_cells_without_a_failure(store):
  done, failed, running, waiting = (entry.id for entry in store.entries())
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
