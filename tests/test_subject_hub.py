"""Models by their name at the hub, from its cache on disk: the library that users have, and no network."""

import pathlib
import shutil

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import pytest

from sae_jax import subjects
from sae_jax.errors import UserError

TINY = pathlib.Path(__file__).parent / 'subjects' / 'llama'
REVISION = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """The cache of a user who has downloaded one model, and has no network now."""
  model = tmp_path / 'models--someone--tiny'
  shutil.copytree(TINY, model / 'snapshots' / REVISION)
  (model / 'refs').mkdir()
  (model / 'refs' / 'main').write_text(REVISION)
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
  monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)


def test_name_at_the_hub_is_the_folder_of_its_files(cache):
  ids_BT = np.arange(12).reshape(2, 6)
  want = subjects.load(str(TINY))
  for name in ('someone/tiny', f'someone/tiny@{REVISION}'):
    found = subjects.load(name)
    np.testing.assert_array_equal(found.logits(ids_BT), want.logits(ids_BT))
    assert (found.provenance['subject'], found.provenance['subject_revision']) == (name, REVISION)
    assert found.provenance['subject_files'] == want.provenance['subject_files']


@pytest.mark.parametrize('name', ['someone/other', 'someone/tiny@v2'])
def test_model_that_is_not_there_is_refused_in_one_line(cache, name):
  with pytest.raises(UserError, match='is no folder here, and the hub gives no such model') as found:
    subjects.load(name)
  assert '\n' not in str(found.value)


@pytest.mark.parametrize('name', ['../etc', 'a/b/c', '/no/such/folder', 'gpt5', 'a/..', '', 'a b/c', 'x' * 5000])
def test_name_that_is_none_is_refused_without_asking_the_hub(name, monkeypatch):
  monkeypatch.setattr(huggingface_hub, 'snapshot_download', lambda *args, **settings: pytest.fail('it asked'))
  with pytest.raises(
    UserError, match=r'is not a subject; use smollm2-135m, .*a folder that holds a model, or a name at'
  ):
    subjects.load(name)
