"""A key that changes nothing, and tokens that are not trained on, are said; a cell whose every key counts is silent."""

import dataclasses
import pathlib

import pytest

from experiments import tiny
from sae_jax import config, distributed, notes, train, training
from sweeps import grid, launch
from tests import cells

ROOT = pathlib.Path(__file__).parents[1]


def found(**overrides):
  return notes.of(config.resolve(config.override(tiny.get_config(), overrides)))


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    (
      {'data.site': 'resid_post.3', 'data.epochs': 2},
      "data.site='resid_post.3', data.epochs=2: not read, for data.source='planted'",
    ),
    ({'data.normalize': 'center_unit'}, "data.normalize='center_unit': not read"),
    ({'data.path': '/elsewhere'}, "data.path='/elsewhere': not read"),
    (
      {'data.source': 'live', 'data.subject': 'x', 'data.planted.seed': 3},
      'data.planted.n_features=64, data.planted.active=3.0, data.planted.seed=3: not read',
    ),
    ({'sae.recall_target': 0.9}, "sae.recall_target=0.9: not read, for sae.selection='exact'"),
    (
      {'train.tokens': 1000},
      'train.tokens=1000: 768 count, for 3 batches of train.batch_tokens=256 are whole and 232 tokens',
    ),
  ],
)
def test_what_does_not_count_is_said(overrides, words):
  (line,) = found(**overrides)
  assert line.startswith(words) and '\n' not in line


def test_what_counts_is_not_doubted():
  assert found() == []
  assert found(**{'data.planted.noise': 0.5, 'data.seed': 3, 'mesh.data': 2, 'train.tokens': 512}) == []
  assert found(**{'sae.selection': 'approximate', 'sae.recall_target': 0.9}) == []
  live = {f'data.{k}': v for k, v in dict(subject='x', site='y', text='z', epochs=2, window_tokens=64).items()}
  planted = config.flatten(config.template())
  back = {key: value for key, value in planted.items() if key.startswith('data.planted.')}
  assert found(**{'data.source': 'live', **live, **back}) == []


def test_findings_of_many_cells_are_said_once():
  some = [config.resolve(config.override(tiny.get_config(), {'train.tokens': n})) for n in (1000, 1000, 512)]
  (line,) = notes.of_all(some)
  assert line.endswith('(in 2 of 3 cells)') and '(in' not in notes.of_all(some[:2])[0]
  assert notes.of_all(c for _, c in grid.build(str(ROOT / 'sweeps' / 'grids' / 'tiny.py')).cells) == []


def test_train_and_dry_run_say_it_in_a_line(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(distributed, 'initialize', lambda: None)  # jax has started already
  monkeypatch.setattr(distributed, 'stop_flag', cells.NeverTold)
  monkeypatch.setattr(training, 'train', lambda config, workdir, **_: 'preempted')
  arguments = [f'--workdir={tmp_path / "cell"}', '--config.data.site=resid_post.3']
  with pytest.raises(SystemExit):
    train.main([f'--config={ROOT / "experiments" / "tiny.py"}', *arguments])
  lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith('note: ')]
  assert len(lines) == 1 and "data.site='resid_post.3': not read" in lines[0]
  (tmp_path / 'some.py').write_text(
    'from experiments import tiny\nfrom sweeps import grid\nEXPERIMENT = tiny\n'
    'def sweep(): return grid.param("train.tokens", [1000, 5120])\n'
  )
  with pytest.raises(SystemExit) as code:
    launch.main(
      [f'--sweep={tmp_path / "some.py"}', f'--ledger={tmp_path / "ledger"}', '--dry_run', '--flops_per_second=1e12']
    )
  assert code.value.code == 0
  assert '\nnote: train.tokens=1000: 768 count' in capsys.readouterr().out


def test_store_reads_no_planted_dictionary():
  tiny_cell = config.resolve(tiny.get_config())
  stored = dataclasses.replace(tiny_cell, data=dataclasses.replace(tiny_cell.data, source='store', path='/somewhere'))
  (line,) = notes.of(stored)
  assert line.startswith("data.planted.n_features=64, data.planted.active=3.0: not read, for data.source='store'")


def test_notes_of_many_cells_look_the_defaults_up_once(monkeypatch):
  made, many, template = [], [cells.cell(**{'train.seed': seed}) for seed in range(5)], config.template
  notes._usual.cache_clear()
  monkeypatch.setattr(config, 'template', lambda: made.append(1) or template())
  notes.of_all(many)
  assert len(made) == 1
