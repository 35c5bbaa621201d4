"""Four real processes end with the bits of one, and what they saved is gone on with by two, by one, by another mesh."""

import json
import shutil

import pytest

from tests.test_distributed import finish, result, start


@pytest.fixture(scope='module')
def four(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('four')
  finish(start(workdir, 4))
  return workdir


def from_last_checkpoint(four, folder):
  """The folder as a kill just after the last checkpoint would leave it."""
  shutil.copytree(four, folder, ignore=shutil.ignore_patterns('result.json', 'sae'))
  assert {p.name for p in (folder / 'ckpt').iterdir()} == {'5', '10'}
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
  assert [line['step'] for line in lines if line['step'] <= 10] == [
    json.loads(line)['step'] for line in (four / 'metrics.jsonl').read_text().splitlines()
    if json.loads(line)['step'] <= 10
  ]  # fmt: skip
