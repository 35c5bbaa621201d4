"""The benchmark runs and reports what it promises; no time is asserted."""

import json

import pytest

from sae_jax import bench


def test_bench_writes_rows_with_the_promised_fields(tmp_path):
  out = tmp_path / 'bench.json'
  with pytest.raises(SystemExit) as stopped:
    bench.main(['--shape=7,61,13,3', '--repeats=1', f'--json={out}'])
  assert stopped.value.code == 0
  (row,) = json.loads(out.read_text())
  assert row['shape'] == [7, 61, 13, 3]
  assert row['ratio'] == pytest.approx(row['step_ms'] / (row['encoder_matmul_ms'] + row['state_pass_ms']))
  assert {'encoder_matmul', 'top_k', 'decode', 'weight_gradients', 'update'} <= set(row['parts'])
  assert row['machine']['date'] and row['machine']['versions']


def test_bench_refuses_a_broken_shape(capsys):
  with pytest.raises(SystemExit) as stopped:
    bench.main(['--shape=7,61'])
  assert stopped.value.code == 2 and 'is not D,N,B,K' in capsys.readouterr().err
