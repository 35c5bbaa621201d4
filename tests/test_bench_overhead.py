"""What a cell costs beyond its steps: every second of its process belongs to one part, by name."""

import json
import pathlib
import subprocess
import sys
import time

import pytest

from bench import command, overhead, overhead_cell
from sae_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize('text', ['256', '256,8,3', '256,0', 'a,b', ''])
def test_what_is_no_cell_is_one_line(text):
  with pytest.raises(UserError, match='is not N,K'):
    overhead.size(text)
  assert overhead.size('256,8') == (256, 8)


def test_a_record_that_cannot_be_written_is_one_line_and_said_before_anything_is_measured(tmp_path):
  parser = command.parser('one', 'Measures nothing.')
  for text in (str(tmp_path), ''):
    with pytest.raises(UserError, match='is no name of a file'):
      parser.parse_args([f'--json={text}'])
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write .* choose another --json'):
    command.report({}, '', str(tmp_path / 'file' / 'found.json'))


def test_time_within_a_part_is_the_inner_ones_and_the_first_call_has_its_own(monkeypatch):
  clock = iter(range(100))
  monkeypatch.setattr(time, 'time', lambda: next(clock))
  monkeypatch.setattr(time, 'process_time', lambda: 0.0)
  parts = overhead_cell.Parts(-5.0)
  inner = parts.timed(lambda: None, 'inner', first='compiled')
  parts.timed(lambda: [inner() for _ in range(3)], 'outer')()
  assert {name: seconds for name, (seconds, _) in parts.spent.items()} == {
    overhead_cell.PROCESS: 5,
    'outer': 4,
    'compiled': 1,
    'inner': 2,
  }


def test_the_parts_of_a_cell_add_up_to_its_process(tmp_path):
  argv = [sys.executable, '-m', 'bench.overhead_cell', f'--began={(began := time.time())}']
  flags = ['--config=experiments/tiny.py', f'--workdir={tmp_path}', '--config.train.tokens=15360']
  ran = subprocess.run([*argv, *flags], cwd=ROOT, stdout=subprocess.PIPE, check=True)
  found = json.loads(ran.stdout.splitlines()[-1])
  assert sum(seconds for seconds, _ in found['parts'].values()) == pytest.approx(found['ended'] - began, abs=0.1)
  compiled = {'first state, compiled', 'first step, compiled', 'first evaluation, compiled'}
  others = {
    overhead_cell.PROCESS,
    overhead_cell.STEPS,
    'claims',
    'data and sample',
    'evaluations',
    'checkpoints',
    'other',
  }
  assert set(found['parts']) == compiled | others | {'autoencoder and result'}


def test_the_table_has_a_row_a_part_and_the_share_of_what_is_not_a_step():
  made = {'parts': {'claims': [1.0, 0.5], overhead_cell.STEPS: [4.0, 2.0]}, 'over_steps': [0.25, 0.25]}
  text = overhead.lines({'rows': [{'n_latents': 256, 'k': 8, 'cold': made, 'warm': made}]})
  assert '| claims | 1.00 | 0.50 | 1.00 | 0.50 |' in text and '| 25% | 25% | 25% | 25% |' in text
