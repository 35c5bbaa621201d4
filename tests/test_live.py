"""A live subject gives the numbers of a store harvested with the same settings, over epochs too."""

import numpy as np
import pytest

from sae_jax import config
from sae_jax.data import harvest
from sae_jax.data.source import open_source
from sae_jax.errors import UserError
from tests.test_harvest import settings, toy  # noqa: F401  the toy subject's fixture


def cell(source: str, path: str, dtype: str = 'float32', **changes) -> config.Config:
  flat = {
    'data.source': source, 'data.path': path, 'data.epochs': 2, 'sae.d_model': 6, 'train.batch_tokens': 16,
    'train.tokens': 320, 'eval.tokens': 43, 'eval.batch_tokens': 16,
  }  # fmt: skip
  return config.resolve(config.override(settings(dtype=dtype), flat | changes))


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_live_equals_store(toy, tmp_path, dtype):  # noqa: F811
  harvest.harvest(settings(dtype=dtype), str(tmp_path), progress=False)
  store, live = open_source(cell('store', str(tmp_path), dtype)), open_source(cell('live', '', dtype))
  for start, stop in ((0, 16), (31, 77), (160, 200), (300, 346)):  # across blocks and into the second epoch
    np.testing.assert_array_equal(live.rows(start, stop), store.rows(start, stop))
  np.testing.assert_array_equal(live.held_out(0, 43), store.held_out(0, 43))
  assert live.flops_per_token == store.flops_per_token > 0


def test_live_is_a_function_of_position(toy):  # noqa: F811
  used, fresh = open_source(cell('live', '')), open_source(cell('live', ''))
  used.rows(0, 300)
  np.testing.assert_array_equal(used.rows(31, 77), fresh.rows(31, 77))


def test_live_refuses_more_tokens_than_its_stream(toy):  # noqa: F811
  with pytest.raises(UserError, match='raise either or lower'):
    open_source(cell('live', '', **{'train.tokens': 347}))


def test_live_refuses_another_width(toy):  # noqa: F811
  with pytest.raises(UserError, match='has width 6'):
    open_source(cell('live', '', **{'sae.d_model': 7}))
