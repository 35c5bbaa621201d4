"""The measurements against other libraries: fair turns, honest refusals, and planted answers found. No time is asserted."""

import json
import mmap
import stat
import sys

import numpy as np
import pytest

from bench import alternate, command, figure, scaling, side_by_side, step_ours, sweep, worker
from sae_jax import flags
from sae_jax.errors import UserError
from sweeps import grid, ledger
from tests import cells

TOY = """
import sys, time
from bench import worker

name, log = sys.argv[-1].split('=')[1].split(':')

def work():
  with open(log, 'a') as f:
    print(name, 'begins', file=f, flush=True)
    time.sleep(0.002)
    print(name, 'ends', file=f, flush=True)

def begin():
  print('a library that prints must not break the protocol')
  if name == 'broken':
    raise ValueError('no such layer')
  return {'step': work}, {'name': name}

worker.serve(lambda: begin)
"""


@pytest.fixture
def toy(tmp_path):
  """Starts a worker that writes down when it computes; stands in for an interpreter with a library in it."""
  (tmp_path / 'toy.py').write_text(TOY)
  interpreter = tmp_path / 'python'
  interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "toy.py"} "$@"\n')
  interpreter.chmod(interpreter.stat().st_mode | stat.S_IXUSR)
  log = tmp_path / 'log'

  def start(name):
    return alternate.Worker('any', [f'--as={name}:{log}'], str(interpreter), {'PYTHONPATH': str(alternate.ROOT)})

  return start, log


def test_workers_take_turns_and_the_first_one_changes(toy, monkeypatch):
  monkeypatch.setattr(alternate, '_PAUSE_S', 0.05)
  monkeypatch.setattr(alternate, '_SETTLE_S', 0.0)
  start, log = toy
  with alternate.started({name: start(name) for name in ('a', 'b')}) as workers:
    seconds, load = alternate.alternate(workers, rounds=2)
  lines = log.read_text().splitlines()
  assert all(f'{a.split()[0]} ends' == b for a, b in zip(lines[::2], lines[1::2], strict=True))
  order = [line.split()[0] for line in lines[::2]]
  turns = [name for i, name in enumerate(order[4:]) if i == 0 or order[4:][i - 1] != name]
  assert turns == ['a', 'b', 'a']  # a b, then b a
  assert [len(rounds) for rounds in seconds.values()] == [2, 2] and 0 <= load <= 1
  assert all(s >= 0.002 for rounds in seconds.values() for block in rounds for s in block)


def test_worker_that_dies_says_why_in_one_line(toy):
  start, _ = toy
  with pytest.raises(UserError, match='ended with code 1: ValueError: no such layer'):
    with alternate.started({'broken': start('broken')}):
      pass


def test_worker_of_a_missing_interpreter_is_refused():
  with pytest.raises(UserError, match='cannot start'):
    alternate.Worker('any', [], '/nowhere/python')


class Planted:
  """A worker without a process: `seconds_of(arguments)` a step."""

  peak_bytes = 0

  def __init__(self, module, args, python=''):
    name = next((a.split('=')[1] for a in args if a.startswith('--library')), 'sae_jax')
    self.facts = {'error': self.error_of(name), 'threads': 1, 'versions': {name: '1.0'}}
    self._seconds = self.seconds_of(args)

  def seconds(self, do, times):
    return [self._seconds] * times

  def close(self):
    pass


@pytest.fixture
def plant(monkeypatch):
  """Replaces workers and pauses; takes the seconds of a step by arguments, and each library's error."""

  def apply(module, seconds_of, error_of=lambda name: 0.7):
    fake = type('Fake', (Planted,), {'seconds_of': staticmethod(seconds_of), 'error_of': staticmethod(error_of)})
    monkeypatch.setattr(module, 'Worker', fake)
    monkeypatch.setattr(alternate, 'cpu_time', iter((float(t), float(t)) for t in range(10**6)).__next__)
    monkeypatch.setattr(alternate.time, 'sleep', lambda s: None)

  return apply


def test_side_by_side_reports_ratios_and_draws_them(plant):
  plant(side_by_side, lambda args: 3.0 if '--library=sparsify' in args else 1.5 if '--no_ema' in args else 2.0)
  row = side_by_side.measure((7, 61, 13, 3), ['sparsify'], '', rounds=3)
  assert row['times_ours']['sparsify'] == {'ratio': 1.5, 'low': 1.5, 'high': 1.5, 'rounds': 3}
  assert row['times_ours_without_ema']['sparsify']['ratio'] == 2.0
  assert '| sparsify 1.0 | 3,000 ms | 1.50 (1.50 to 1.50) | 2.00' in side_by_side.table([row])
  assert command.load_of_others({'a': [row]}) == 1.0  # what the planted clock says
  (ax,) = figure.side_by_side([row]).axes
  assert [t.get_text() for t in ax.get_yticklabels()] == ['sae_jax without EMA', 'sparsify 1.0']
  json.dumps(row, allow_nan=False)


@pytest.mark.parametrize('error', [0.71, float('nan')])
def test_side_by_side_refuses_what_does_not_compute_the_same(plant, error):
  plant(side_by_side, lambda args: 1.0, lambda name: error if name == 'sparsify' else 0.7)
  with pytest.raises(UserError, match='sparsify reconstructs with relative error'):
    side_by_side.measure((7, 61, 13, 3), ['sparsify'], '', rounds=1)


def test_ratio_compares_within_rounds():
  slow_then_fast = [[4.0, 4.0], [1.0, 1.0]]  # the machine changed between the rounds, the libraries did not
  assert alternate.ratio(slow_then_fast, [[2.0], [0.5]]) == {
    'ratio': 2.0,
    'low': 2.0,
    'high': 2.0,
    'rounds': 2,
  }


def test_scaling_finds_a_planted_exponent(plant):
  plant(scaling, lambda args: 1e-6 * int(args[0].split(',')[1]) ** 0.75)
  row = scaling.along('n', [64, 128, 256, 512, 1024], {'d': 8, 'n': 64, 'B': 16, 'k': 4}, rounds=1)
  assert row['exponent']['estimate'] == pytest.approx(0.75, abs=1e-6)
  assert row['exponent_larger_half']['estimate'] == pytest.approx(0.75, abs=1e-6)
  assert 0.75 < row['exponent_flops_useful']['estimate'] <= 1


@pytest.mark.parametrize('text', ['7,61', '7,61,13,0', '7,61,13,-3', '7,61,13,x', ''])
def test_broken_shape_is_refused(text):
  with pytest.raises(UserError, match='is not D,N,B,K'):
    flags.shape(text)


def test_planted_dead_latents_nearly_fire_and_never_do():
  pool_PBD, w_FD = worker.inputs(13, 101, 29)
  bias_F, dead_F, slots = step_ours.just_below(pool_PBD[0], w_FD, k=5, share=0.3)
  pre_BF = pool_PBD[0] @ w_FD.T + bias_F
  fired_BK = np.argsort(-pre_BF, axis=1)[:, :5]
  assert dead_F.sum() == 30 and not dead_F[fired_BK].any()
  weakest = np.take_along_axis(pre_BF, fired_BK, axis=1).min()
  assert pre_BF[:, dead_F].max() == pytest.approx(weakest, rel=2e-3)
  assert slots == (pre_BF[:, dead_F] > 0).sum(axis=1).max() > 0


def test_our_step_starts_from_the_given_weights_and_keeps_planted_latents_dead():
  d, n, batch, k = shape = (13, 101, 29, 5)
  pool_PBD, w_FD = worker.inputs(d, n, batch)
  work, facts = step_ours.begin(shape, (1, 1), False, 0.3, pool_PBD, w_FD)  # checks that the average stays put
  work['step']()
  work['matmul']()
  assert facts['dead_fraction'] == pytest.approx(30 / n) and facts['aux_slots'] > 0
  bias_F, _, _ = step_ours.just_below(pool_PBD[0], w_FD, k, 0.3)
  pre_BF = pool_PBD[0] @ w_FD.T + bias_F
  kth_B1 = np.sort(pre_BF, axis=1)[:, -k][:, None]
  x_hat_BD = np.where(pre_BF >= kth_B1, np.maximum(pre_BF, 0), 0) @ w_FD
  error = ((pool_PBD[0] - x_hat_BD) ** 2).sum() / (pool_PBD[0] ** 2).sum()
  assert facts['error'] == pytest.approx(error, rel=1e-5)


def test_worker_memory_sees_an_allocation():
  before = worker.memory()
  with mmap.mmap(-1, 2**26) as held:  # an array may be given pages that this process already holds
    held.write(b'1' * len(held))
    after = worker.memory()
  assert after['VmRSS'] - before['VmRSS'] > 0.9 * 2**26 and after['VmHWM'] >= after['VmRSS']


@pytest.fixture
def launched(monkeypatch):
  """Replaces the commands of bench.sweep by one that fills ledgers at once; takes a cell's digest by its group's size."""

  def apply(digest_of):
    ledgers = {}

    def run(module, *flags):
      given = dict(flag.removeprefix('--').split('=', 1) for flag in flags)
      if module != 'sweeps.launch':
        return {'seconds': 7.0, 'load_of_others': 0.0}
      size, store = int(given['group']), ledger.Ledger(given['ledger'])
      store.register(grid.build(given['sweep']))
      ledgers[size] = [entry.cell for entry in store.entries()]
      for entry in store.entries():
        result = {'wall_s': 2.0, 'flops_subject': 11.0, 'flops_useful': 3.0}
        cells.finish(store.folder(entry.id), entry.cell, **result, params_digest=digest_of(entry, size))
      return {'seconds': 100.0 / size, 'load_of_others': 0.25 / size}

    monkeypatch.setattr(sweep, 'run', run)
    return ledgers

  return apply


def test_sweep_compares_launches_of_live_cells_that_can_share_a_pass(launched):
  ledgers = launched(lambda cell, size: cell.id)
  row = sweep.measure(tokens=1536, every=5)
  assert {size: len(configs) for size, configs in ledgers.items()} == {1: 4, 4: 4}
  assert len({config.group_key for config in ledgers[4]}) == 1 and len({c.sae.n_latents for c in ledgers[4]}) == 4
  assert all(c.data.source == 'live' and c.train.tokens == 1536 for c in ledgers[1])
  apart, together = row['runs'].values()
  assert row['share'] == 0.25 and (apart['subject_passes'], together['subject_passes']) == (4, 1)
  assert (apart['flops_subject'], together['flops_subject'], together['training_s']) == (44.0, 11.0, 8.0)
  assert command.load_of_others(row) == 0.25
  assert '| one group | 25 s | 8 s | 1 |' in sweep.lines(row)
  json.dumps(row, allow_nan=False)


def test_sweep_refuses_cells_that_end_differently_in_a_group(launched, tmp_path):
  launched(lambda cell, size: f'{cell.id} {size if cell.overrides["sae.k"] == 4 else 0}')
  with pytest.raises(UserError, match='3 of 6 cells do not end with the same parameters'):
    sweep.compare(alternate.ROOT / 'sweeps' / 'grids' / 'tiny.py', tmp_path)


def test_command_that_fails_is_not_timed():
  with pytest.raises(UserError, match=r'json\.tool ended with code'):
    sweep.run('json.tool', '/nowhere')
  took = sweep.run('this')
  assert took['seconds'] > 0 and 0 <= took['load_of_others'] <= 1


def test_peak_memory_of_a_command_counts_the_processes_below_it():
  inner = 'import time; x = b"x" * 10**8; time.sleep(1)'
  took = sweep.run('timeit', '-n1', '-r1', f'import subprocess, sys; subprocess.run([sys.executable, "-c", {inner!r}])')
  assert 10**8 < took['peak_bytes'] < 10**9
