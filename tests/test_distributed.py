"""Two real processes over gloo end with the bits of one process on the same mesh."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from sae_jax import distributed
from sae_jax.errors import UserError
from sae_jax.families.family import NAMES
from tests import cells

BATCH = cells.cell().train.batch_tokens
ROOT = pathlib.Path(__file__).parents[1]
# Compiles in half the time, to slower code: programs of these meshes are compiled anew in every process, see
# `sharding.make_mesh`. All processes that are compared have it; gangs of a ledger, in test_gang.py, have what users have.
QUICK = '--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false'


def start(workdir, processes: int, **overrides) -> list[subprocess.Popen]:
  flags = [f'--config.{key}={value}' for key, value in (cells.ON_MESH | overrides).items()]
  return launch(['-m', 'sae_jax.train', '--config=experiments/tiny.py', f'--workdir={workdir}', *flags], processes)


def launch(argv: list[str], processes: int, devices: int = 8) -> list[subprocess.Popen]:
  """The same Python command as the ranks of a gang, or as one process of all devices."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  gang = []
  for rank in range(processes):
    env = os.environ | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices // processes),
      'XLA_FLAGS': f'{os.environ.get("XLA_FLAGS", "")} {QUICK}',
    }
    if processes > 1:
      env |= {
        'JAX_COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'JAX_NUM_PROCESSES': str(processes),
        'JAX_PROCESS_ID': str(rank),
      }
    gang.append(
      subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
    )
  return gang


def finish(gang) -> list[int]:
  outputs = [process.communicate() for process in gang]
  codes = [process.returncode for process in gang]
  assert len(set(codes)) == 1 and codes[0] in (0, 42), (codes, [err[-2000:] for _, err in outputs])
  return codes


def result(workdir) -> dict:
  kept = json.loads((workdir / 'result.json').read_text())
  return {key: value for key, value in kept.items() if key not in ('wall_s', 'digest')}


GIVEN = {'JAX_COORDINATOR_ADDRESS': 'head:8476', 'JAX_NUM_PROCESSES': '4', 'JAX_PROCESS_ID': '3'}


def test_gang_is_what_is_stated():
  whole = {'coordinator_address': 'head:8476', 'num_processes': 4, 'process_id': 3}
  assert distributed.stated_gang(GIVEN) == whole
  assert distributed.stated_gang({}, 'head:8476', 4, 3) == whole
  assert distributed.stated_gang(GIVEN | {'JAX_PROCESS_ID': '1'}, process_id=3) == whole
  in_a_pod = {'JOB_COMPLETION_INDEX': '3'} | GIVEN
  del in_a_pod['JAX_PROCESS_ID']
  assert distributed.stated_gang(in_a_pod) == whole


@pytest.mark.parametrize(
  'environ',
  [{}, {'JOB_COMPLETION_INDEX': '0'}, {'JAX_COORDINATOR_ADDRESS': 'head:8476', 'SLURM_STEP_NUM_TASKS': '4'}],
)
def test_no_gang_is_stated_by_what_others_use(environ):
  assert distributed.stated_gang(environ) is None


@pytest.mark.parametrize(
  ('change', 'line'),
  [
    ({'JAX_PROCESS_ID': None}, '--process_id (JAX_PROCESS_ID)'),
    (
      {'JAX_COORDINATOR_ADDRESS': None, 'JAX_NUM_PROCESSES': None},
      '--coordinator (JAX_COORDINATOR_ADDRESS), --num',
    ),
    ({'JAX_COORDINATOR_ADDRESS': 'head'}, "'head' is not HOST:PORT"),
    ({'JAX_COORDINATOR_ADDRESS': ':8476'}, 'is not HOST:PORT'),
    ({'JAX_NUM_PROCESSES': 'many'}, 'num_processes=many is not a whole number of at least 1'),
    ({'JAX_NUM_PROCESSES': '0'}, 'of at least 1'),
    ({'JAX_PROCESS_ID': '-1'}, 'of at least 0'),
    ({'JAX_PROCESS_ID': '4'}, 'process_id 4 is not below num_processes 4'),
  ],
)
def test_half_a_gang_is_one_line(change, line):
  environ = {name: value for name, value in (GIVEN | change).items() if value is not None}
  with pytest.raises(UserError) as found:
    distributed.stated_gang(environ)
  assert line in str(found.value)


# The command, and after it a group of one cell a family in the same process.
AND_FAMILIES = """
import sys
from sae_jax import train, training
from sae_jax.families.family import family
from tests import cells
folder, *names = sys.argv[1:]
try:
  flags = [f'--config.{key}={value}' for key, value in (cells.ON_MESH | {'train.tokens': 40 * 12}).items()]
  train.main(['--config=experiments/tiny.py', f'--workdir={folder}/topk', *flags])
except SystemExit as end:
  assert end.code == 0
few = {'mesh.data': 2, 'mesh.latent': 4, 'train.tokens': 40 * 4}
aux = {True: {'sae.k_aux': 5, 'loss.dead_tokens': 80}, False: {}}
group = [(cells.of_family(name, **few | aux[family(name).auxk]), f'{folder}/{name}') for name in names]
assert training.train_group(group) == ['done'] * len(group)
"""
FEW = ('batchtopk', 'gated', 'cs294a')  # of each kind of codes


@pytest.mark.parametrize(
  'names', [FEW, pytest.param([name for name in NAMES if name not in (*FEW, 'topk')], marks=pytest.mark.chaos)]
)
def test_two_processes_equal_one_bit_for_bit(names, tmp_path):
  for gang in [launch(['-c', AND_FAMILIES, str(tmp_path / str(count)), *names], count) for count in (1, 2)]:
    finish(gang)
  for name in ('topk', *names):
    assert result(tmp_path / '1' / name) == result(tmp_path / '2' / name), name


@pytest.mark.chaos
def test_two_processes_stop_at_one_step_when_either_is_told_to(tmp_path):
  long = {'train.tokens': BATCH * 20_000, 'train.checkpoint_every': 20_000}
  gang = start(tmp_path, 2, **long)
  while not (tmp_path / 'metrics.jsonl').exists() and gang[0].poll() is None:
    time.sleep(0.05)
  gang[1].send_signal(signal.SIGTERM)  # one rank only, and not the one that writes
  assert finish(gang) == [42, 42]
  (step,) = [int(p.name) for p in (tmp_path / 'ckpt').iterdir()]
  assert 0 < step < 20_000


@pytest.mark.chaos
@pytest.mark.parametrize('dead', [0, 1])
def test_survivor_asks_for_a_restart_and_blames_no_cell(tmp_path, monkeypatch, dead):
  monkeypatch.setenv('SAE_JAX_HEARTBEAT_S', '3')
  gang = start(tmp_path, 2, **{'train.tokens': BATCH * 20_000})
  while not (tmp_path / 'metrics.jsonl').exists() and gang[0].poll() is None:
    time.sleep(0.05)
  gang[dead].kill()
  survivor = gang[1 - dead]
  _, said = survivor.communicate()
  gang[dead].communicate()
  assert survivor.returncode in (distributed.BROKEN, -signal.SIGABRT), said[-2000:]
  assert not (tmp_path / 'failure.json').exists()
