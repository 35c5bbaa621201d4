"""Four real processes end with the bits of one, and what they saved is gone on with by two, by one, by another mesh."""

import json
import shutil

import pytest

from tests.test_distributed import finish, launch, result, start

pytestmark = pytest.mark.chaos


@pytest.fixture(scope='module')
def four(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('four')
  finish(start(workdir, 4))
  return workdir


def from_last_checkpoint(four, folder):
  """The folder as a kill just after the last checkpoint would leave it."""
  shutil.copytree(four, folder, ignore=shutil.ignore_patterns('result.json', 'sae'))
  assert {p.name for p in (folder / 'ckpt').iterdir()} == {'20', '25'}
  return folder


def test_four_processes_equal_one_bit_for_bit(four, tmp_path):
  finish(start(tmp_path, 1))
  assert result(tmp_path) == result(four)


@pytest.mark.parametrize('processes', [1, 2])
def test_checkpoint_of_four_processes_is_restored_by_fewer(four, tmp_path, processes):
  folder = from_last_checkpoint(four, tmp_path / 'cell')
  finish(start(folder, processes))
  assert result(folder) == result(four)


def test_checkpoint_on_another_mesh_goes_on_and_says_so(four, tmp_path):
  folder = from_last_checkpoint(four, tmp_path / 'cell')
  finish(start(folder, 1, **{'mesh.data': 4, 'mesh.latent': 2}))
  other, expected = result(folder), result(four)
  assert other['bit_exact'] is False and expected['bit_exact'] is True
  assert other['mesh'] == [4, 2]
  assert other['nmse'] == pytest.approx(expected['nmse'], rel=1e-5)
  # Each line up to the checkpoint is what four processes wrote.
  lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
  assert [line['step'] for line in lines if line['step'] <= 25] == [
    json.loads(line)['step']
    for line in (four / 'metrics.jsonl').read_text().splitlines()
    if json.loads(line)['step'] <= 25
  ]


LIVE_GROUP = """
import sys
from sae_jax import distributed, subjects, training
from sae_jax.subjects import text
from tests import test_harvest, test_live
subjects.load, text.load = test_harvest.toy_subject, test_harvest.toy_text
distributed.initialize()
mesh = {'mesh.data': 2, 'mesh.latent': 2, 'train.checkpoint_every': 9}
cells = [(test_live.cell('live', '', **mesh, **{'sae.k': int(k)}), f'{sys.argv[1]}/{k}') for k in sys.argv[2:]]
assert training.train_group(cells) == ['done'] * len(cells)
"""


def test_group_on_a_live_subject_ends_with_the_bits_of_one_process_and_of_each_alone(tmp_path):
  together = launch(['-c', LIVE_GROUP, str(tmp_path / 'two'), '2', '3'], 2, devices=4)
  alone = [launch(['-c', LIVE_GROUP, str(tmp_path / 'one'), k], 1, devices=4) for k in ('2', '3')]
  for gang in (together, *alone):
    finish(gang)
  for k in ('2', '3'):
    assert result(tmp_path / 'two' / k) == result(tmp_path / 'one' / k)
