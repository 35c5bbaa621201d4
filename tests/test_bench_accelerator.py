"""The first minutes on an accelerator, rehearsed on a CPU: every part runs, and nothing that goes wrong takes the others along."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import jax
import numpy as np
import pytest

from bench import accelerator, numerics, on_device, parts
from sae_jax.families.family import NAMES, family
from sae_jax.kernels import dense
from sae_jax.plan import CHIPS
from tests.test_families import ROOT


@pytest.fixture(scope='module')
def rehearsed(tmp_path_factory):
  """What a dry run prints, and its record."""
  out = tmp_path_factory.mktemp('accelerator') / 'out.json'
  command = [sys.executable, '-m', 'bench.accelerator', '--dry_run', f'--json={out}', '--peers_python=/nowhere/python']
  ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
  assert ran.returncode == 0, ran.stderr
  return ran, json.loads(out.read_text())


def test_a_dry_run_goes_through_every_part(rehearsed):
  ran, record = rehearsed
  assert record['dry_run']
  status = {one['part']: one['status'] for one in record['parts']}
  assert status.pop('sparsify') == 'skipped'
  assert set(status.values()) == {'done'}, record['parts']
  named = [part.name for part in accelerator.parts(accelerator.TOY, [])]
  assert list(status) == [name for name in named if name != 'sparsify']
  said = ran.stderr.splitlines()
  assert [line.split(':')[0] for line in said if ' s left' in line] == named
  assert 'has sparsify and CUDA for torch' in ran.stdout


def test_a_dry_run_writes_what_each_part_promises(rehearsed):
  found = {one['part']: one['rows'] for one in rehearsed[1]['parts']}
  (machine,) = found['machine']
  assert machine['platform'] == 'cpu' and machine['versions'] and machine['date'] and machine['runtime']
  products = found['numerics of products']
  assert {row['path'] for row in products} == {'loops', 'kernels', 'dense'}
  judged = [row for row in products if 'tolerance' in row]
  # Float32 against float64: an error of 0 would be one of nothing.
  assert len(judged) == 6 and all(0 < max(row['errors'].values()) < numerics.TOLERANCE for row in judged)
  rounded = [row for row in products if row['precision'] == 'bfloat16']
  assert len(rounded) == 3 and all(max(row['errors'].values()) > numerics.TOLERANCE for row in rounded)
  assert [row['family'] for row in found['numerics of steps']] == list(accelerator.TOY.families)
  assert all('params.w_dec_FD' in row['errors'] for row in found['numerics of steps'])
  assert [row.get('wrong_rows', row.get('recall')) for row in found['exact selection']] == [0, 0, 0, 1]
  for row in found['time of selection'] + found['time of products']:
    assert row['gb_per_s'] > 0 and row['ms_low'] <= row['ms'] <= row['ms_high']
  for dtype in ('float32', 'bfloat16'):
    (step,) = found[f'step, n=96, {dtype}']
    assert step['tokens_per_s'] == pytest.approx(12e3 / step['ms']) and step['dead_fraction'] == 0
    assert step['predicted_bytes'] > 4 * 4 * 2 * 96 * 8  # parameters, two moments and the average of two matrices
  assert 'random' in found['harvest'][0]['weights'] and found['harvest'][0]['tokens_per_s'] > 0
  assert all('meaningless' in row['note'] and row['recall'] == 1 for row in found['approximate selection'])
  (auxk,) = found['AuxK']
  assert [round(96 * row['dead_fraction']) for row in auxk['dead']] == [0, 9, 48]
  assert auxk['dead'][0]['times_none'] == 1


# ----- order, deadline, file


def rows(*values):
  """Rows as a part gives them; an exception is raised, anything else is called where it can be."""

  def measure(value):
    if isinstance(value, Exception):
      raise value
    return value() if callable(value) else value

  return lambda: (({'row': i}, lambda value=value: measure(value)) for i, value in enumerate(values))


def ran(*listed, seconds=60.0):
  record = {}
  parts.run([parts.Part(f'part {i}', *one) for i, one in enumerate(listed)], seconds, record, None)
  return record['parts']


def test_a_part_that_goes_wrong_fails_alone():
  out_of_memory = RuntimeError('RESOURCE_EXHAUSTED: Out of memory\nallocating 5 bytes')
  found = ran(
    (1, rows({'ms': 1}, out_of_memory, {'ms': 3})),
    (1, rows({'ms': 1}, lambda: os.kill(os.getpid(), signal.SIGKILL))),
    (1, lambda: 1 / 0),
    (1, rows(float)),
    (1, rows({'ms': float('nan')})),
    (1, rows(parts.Skipped('no such thing'))),
    (1, rows({'ms': 5})),
  )
  assert [one['status'] for one in found] == ['failed'] * 5 + ['skipped', 'done']
  error = 'RuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes'
  assert found[0]['error'] == f'1 of 3 rows: {error}'
  assert found[0]['rows'][1] == {'row': 1, 'status': 'failed', 'error': error}
  assert [row.get('ms') for row in found[0]['rows']] == [1, None, 3]
  assert found[1]['error'] == 'its process ended with code -9' and len(found[1]['rows']) == 1
  assert 'ZeroDivisionError' in found[2]['error'] and found[5]['reason'] == 'no such thing'
  assert 'not JSON compliant' in found[4]['error']
  json.dumps(found, allow_nan=False)


def test_time_that_is_up_stops_a_part_and_skips_others(monkeypatch):
  monkeypatch.setattr(parts, '_PATIENCE', 300)  # a busy machine needs time to fork and answer
  found = ran((0.01, rows({'ms': 1}, lambda: time.sleep(60))), (100, rows({})), (0.01, rows({})), seconds=20)
  assert [one['status'] for one in found] == ['failed', 'skipped', 'done']
  assert found[0]['error'].startswith('stopped after') and found[0]['rows'] == [{'row': 0, 'status': 'done', 'ms': 1}]
  assert 'it takes about 100' in found[1]['reason']


KILLED = """
import sys, time
from bench import parts

def rows(*measures):
  return lambda: (({}, measure) for measure in measures)

def wait():
  print('waits', flush=True)
  time.sleep(600)

listed = [parts.Part('first', 1, rows(lambda: {'ms': 1})), parts.Part('second', 300, rows(lambda: {'ms': 2}, wait)), parts.Part('third', 1, rows())]
parts.run(listed, 600, {'minutes': 10}, sys.argv[1])
"""


def test_a_killed_run_leaves_what_it_had_and_no_process(tmp_path):
  out = tmp_path / 'out.json'
  command = [sys.executable, '-c', KILLED, str(out)]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
    process.stdout.readline()
    while b'"ms": 2' not in out.read_bytes():  # written by the parent at its own pace
      time.sleep(0.01)
    process.kill()
    process.stdout.read()  # ends with the last process that may write to it
  record = json.loads(out.read_text())
  assert record['minutes'] == 10
  first, second, third = record['parts']
  assert first['status'] == 'done' and first['rows'] == [{'status': 'done', 'ms': 1}]
  assert (second['status'], second['error'], second['rows'][0]['ms']) == ('failed', 'cut off', 2)
  assert (third['status'], third['reason']) == ('skipped', 'not reached')


def test_a_machine_without_an_accelerator_is_refused(capsys, monkeypatch):
  monkeypatch.setattr(accelerator, 'run', None)
  # A forked child keeps the handlers of signals of its parent, a test runner's too, and may then not be ended.
  monkeypatch.setattr(os, 'fork', None)
  with pytest.raises(SystemExit) as stopped:
    accelerator.main([])
  assert stopped.value.code == 2 and '--dry_run' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('script', 'message'),
  [
    ('sleep 600', 'jax opened no device within 1 s'),
    ('echo broken driver >&2; exit 3', 'cannot open a device: broken driver'),
  ],
)
def test_a_device_that_does_not_open_is_one_line(script, message, monkeypatch, tmp_path, capsys):
  stand_in = tmp_path / 'python'
  stand_in.write_text(f'#!/bin/sh\nexec 3>&1\n{script}\n')
  stand_in.chmod(0o755)
  monkeypatch.setattr(accelerator, '_ANSWER_SECONDS', 1)
  monkeypatch.setattr(sys, 'executable', str(stand_in))
  with pytest.raises(SystemExit):
    accelerator.main([])
  assert message in capsys.readouterr().err


# ----- what is wrong is said to be


def test_a_wrong_product_fails_in_every_row_that_is_judged():
  shape, precisions = accelerator.TOY.numerics, (numerics.EXACT,)
  right = dense.code_gradient

  def wrong(idx_BK, w_FD, g_BD, slots=None):
    return right(idx_BK, w_FD, g_BD, slots) * (1 + 1e-4 if slots is None else np.nan)

  with mock.patch.object(dense, 'code_gradient', wrong):
    found = [
      about | measure() for about, measure in numerics.products(shape, precisions, True) if about['path'] == 'dense'
    ]
  assert [row['status'] for row in found] == ['failed'] * 2
  assert 'code_gradient is off by 1.0e-04' in found[0]['error'] and 'code_gradient is off by inf' in found[1]['error']
  assert found[1]['errors'].pop('code_gradient') is None and max(found[1]['errors'].values()) < numerics.TOLERANCE


def test_a_selection_that_breaks_ties_otherwise_fails():
  def last_of_ties(product_BF, bias_F, k):
    _, idx_BK = jax.lax.top_k((product_BF + bias_F[None])[:, ::-1], k)
    return product_BF.shape[1] - 1 - idx_BK

  with mock.patch.dict(numerics.WAYS, {'two_stage': last_of_ties}):
    found = [about | measure() for about, measure in numerics.selection([(5, 64, 4)]) if about['way'] == 'two_stage']
  assert [row['status'] for row in found] == ['failed'] and found[0]['wrong_rows'] > 0


def test_every_family_has_a_step_to_compare():
  for name in NAMES:
    for precision in numerics.PRECISIONS:
      cell = numerics.step_cell(name, accelerator.REAL.numerics, precision)
      assert cell.sae.activation == name and (cell.sae.k_aux > 0) == family(name).auxk
      assert cell.train.compute_dtype == ('bfloat16' if precision == 'bfloat16' else 'float32')
  assert tuple(accelerator.REAL.families) == NAMES


@pytest.mark.parametrize(
  'kind, chip',
  [
    ('NVIDIA H100 80GB HBM3', CHIPS['h100']),
    ('TPU v5 lite', CHIPS['v5e']),
    ('TPU v5', CHIPS['v5p']),
    ('TPU v5p', CHIPS['v5p']),
    ('TPU v6 lite', CHIPS['v6e']),
    ('cpu', None),
  ],
)
def test_a_device_is_known_by_its_kind(kind, chip):
  assert on_device.chip_of(kind) == chip


def test_an_h200_is_an_h100_with_another_memory():
  chip = on_device.chip_of('NVIDIA H200')
  assert chip.memory_bandwidth > CHIPS['h100'].memory_bandwidth and chip.memory > CHIPS['h100'].memory
  same = {field: getattr(CHIPS['h100'], field) for field in ('name', 'memory', 'memory_bandwidth')}
  assert dataclasses.replace(chip, **same) == CHIPS['h100']


def test_pre_activations_of_large_steps_come_in_chunks():
  chunks = [on_device.row_chunks(shape[1], shape[2]) for shape in accelerator.REAL.steps]
  assert chunks == [1, 1, 2, 8]


LIBRARY = """
import sys, time
from bench import worker

worker.serve(lambda: lambda: ({'step': lambda: time.sleep(0.05)}, {'error': 0.5, 'versions': {'torch': '2'}}))
"""


def test_sparsify_is_timed_in_turns_where_a_python_has_it(tmp_path, monkeypatch):
  monkeypatch.setenv('XLA_PYTHON_CLIENT_PREALLOCATE', '')  # put back afterwards
  (tmp_path / 'library.py').write_text(LIBRARY)
  without, has = tmp_path / 'without', tmp_path / 'python'
  without.write_text('#!/bin/sh\nexit 1\n')
  # Says that it can import what is asked for, and is the library whenever it is to be one.
  served = f'PYTHONPATH={ROOT} exec {sys.executable} {tmp_path}/library.py'
  has.write_text(f'#!/bin/sh\ncase "$1" in -c) exit 0;; esac\necho "$@" > {tmp_path}/asked\n{served}\n')
  for path in (without, has):
    path.chmod(0o755)
  begun = ({'step': lambda: time.sleep(0.002)}, {'error': 0.5})
  with mock.patch.object(on_device.step_ours, 'begin', lambda *args: begun):
    ((_, measure),) = on_device.sparsify((8, 96, 12, 3), [str(without), '/nowhere', str(has)], 0.1)
    row = measure()
  assert 1 < row['times_ours_low'] <= row['times_ours'] <= row['times_ours_high'] and row['sparsify_ms'] >= 50
  assert '--library=sparsify --device=cuda' in (tmp_path / 'asked').read_text()
