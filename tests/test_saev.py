"""Shard folders of saev are read by its protocol, in the names of every version of it."""

import json
import pathlib

import numpy as np
import pytest

from sae_jax import config
from tests.test_inputs import D, imported, in_order, sequences
from tests.test_store_import import run

KEYS = {
  '1.0.0': ('d_vit', 'n_patches_per_img', 'n_imgs', 'max_patches_per_shard'),
  '2.0': ('d_model', 'patches_per_ex', 'n_ex', 'patches_per_shard'),
  '2.1': ('d_model', 'content_tokens_per_example', 'n_examples', 'max_tokens_per_shard'),
}


def write_saev(folder: pathlib.Path, protocol: str, x_BLTD: np.ndarray, changes: dict) -> None:
  """A folder by the protocol: files of five examples, the last one made in full and filled in part."""
  width, tokens, examples, budget = KEYS[protocol]
  n, layers, t, d = x_BLTD.shape
  facts = {
    width: d,
    tokens: t - 1,
    examples: n,
    budget: 5 * layers * t + 1,
    'cls_token': True,
    'layers': [3, 11],
    'dtype': 'float32',
    'protocol': protocol,
  }
  folder.mkdir()
  (folder / 'metadata.json').write_text(json.dumps(facts | changes))
  shards = []
  for i in range(0, n, 5):
    part = x_BLTD[i : i + 5]
    whole = np.zeros((5, layers, t, d), '<f4')
    whole[: len(part)] = part
    (folder / f'acts{i // 5:06}.bin').write_bytes(whole.tobytes())
    shards.append({'name': f'acts{i // 5:06}.bin', examples: len(part)})
  (folder / 'shards.json').write_text(json.dumps(shards))


@pytest.mark.parametrize('protocol', KEYS)
def test_layer_of_a_saev_folder(tmp_path, capsys, protocol):
  x_BLTD = np.stack([100 + sequences(), sequences()], axis=1)
  write_saev(tmp_path / 'acts', protocol, x_BLTD, {})
  train_BD, held_out_BD = imported(tmp_path, capsys, f'--from={tmp_path}/acts:11', '--held_out=9', '--drop_first=1')
  np.testing.assert_array_equal(held_out_BD, x_BLTD[-3:, 1, 1:].reshape(-1, D))
  np.testing.assert_array_equal(train_BD, in_order(x_BLTD[:-3, 1, 1:].reshape(-1, D)))
  names = config.read_store_file(str(tmp_path / 'out'))['provenance']['imported_from']
  assert names == [f'acts00000{i}.bin:11' for i in range(3)]


def test_saev_folders_that_are_not_whole_are_refused(tmp_path, capsys):
  x_BLTD = np.stack([sequences(), sequences()], axis=1)
  for name, changes, reason in (
    ('which', {}, 'no layer'),
    ('dtype', {'dtype': 'float16'}, 'with float16 is not known'),
    ('later', {'protocol': '3.0'}, 'protocol 3.0'),
    ('count', {'n_ex': 14}, 'metadata.json 14'),
    ('width', {'d_model': 8}, 'bytes, not'),
    ('key', {'patches_per_ex': 'x'}, "'x' is not a count"),
    ('both', {'d_vit': 7}, 'not a folder of saev'),
    ('nothing', {'layers': []}, 'not a folder of saev'),
  ):
    write_saev(tmp_path / name, '2.0', x_BLTD, changes)
    layer = '' if name == 'which' else ':3'
    code, _, error = run(capsys, 'import', f'--from={tmp_path}/{name}{layer}', f'--out={tmp_path}/s', '--held_out=5')
    assert code == 2 and error.count('\n') == 1 and reason in error, (name, error)
  for text, reason in (('[{"name": "../x", "n_ex": 13}]', 'is not the name'), ('{', 'not a folder of saev')):
    (tmp_path / 'which' / 'shards.json').write_text(text)
    code, _, error = run(capsys, 'import', f'--from={tmp_path}/which:3', f'--out={tmp_path}/s', '--held_out=5')
    assert code == 2 and reason in error, error
