"""A report says whose it is."""

import datetime

from analysis import heading, read_ledger
from sweeps import grid, ledger
from tests import cells

DAY = datetime.date(2026, 11, 28)


def write(path, name, *configs):
  resolved = tuple(({}, c) for c in configs)
  ledger.Ledger(str(path)).register(grid.Sweep(name, 'experiments/tiny.py', resolved, dropped=0))
  for c in configs:
    cells.write(str(path), c, git_commit='abc123')
  return read_ledger.load_ledger(str(path))


def test_title_names_the_sweep_and_what_it_studied(tmp_path):
  done = write(tmp_path / 'ledger', 'widths & <ks>', cells.cell(), cells.cell(**{'train.seed': 1}))
  title, facts = heading.heading(str(tmp_path / 'ledger'), done, DAY)
  assert title == 'widths & <ks>: planted dictionary'
  assert facts == 'Trained by the code of abc123. Report of 2026-11-28 by sae_jax 0.1.0.'
  studied = done.assign(source='store', subject='smollm2-135m', site='resid_post.12', text='sotu')
  title, facts = heading.heading(str(tmp_path / 'ledger'), studied, DAY)
  assert title == 'widths & <ks>: smollm2-135m, resid_post.12' and facts.startswith('Text: sotu. ')
  studied['site'] = ['resid_post.12', 'resid_post.20']
  assert heading.heading(str(tmp_path / 'ledger'), studied, DAY)[0].endswith(', resid_post.12, resid_post.20')


def test_title_of_a_ledger_without_a_record_is_its_folder(tmp_path):
  cells.write(str(tmp_path / 'mine'), cells.cell())
  done = read_ledger.load_ledger(str(tmp_path / 'mine'))
  for broken in (None, b'', b'[' * 10_000, b'{"name": 3}'):
    if broken is not None:
      (tmp_path / 'mine' / 'sweep.json').write_bytes(broken)
    assert heading.heading(f'{tmp_path}/mine/', done, DAY)[0] == 'mine: planted dictionary'


def test_title_of_an_empty_ledger(tmp_path):
  (tmp_path / 'cells').mkdir()
  done = read_ledger.load_ledger(str(tmp_path))
  assert heading.heading(str(tmp_path), done, DAY) == (
    tmp_path.name,
    'Report of 2026-11-28 by sae_jax 0.1.0.',
  )
