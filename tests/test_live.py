"""A live subject gives the numbers of a store harvested with the same settings, over epochs too."""

import json

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from sae_jax import config, sharding, training
from sae_jax.data import feed, harvest, live_mesh, reading
from sae_jax.data.source import open_source
from sae_jax.errors import UserError
from tests.test_harvest import settings, toy, toy_subject  # noqa: F401  the toy subject's fixture


def cell(source: str, path: str, dtype: str = 'float32', **changes) -> config.Cell:
  flat = {
    'data.source': source,
    'data.path': path,
    'data.epochs': 2,
    'sae.d_model': 6,
    'train.batch_tokens': 16,
    'train.tokens': 320,
    'eval.tokens': 43,
    'eval.batch_tokens': 16,
  }
  if source == 'live':
    flat['data.identity'] = toy_subject('').provenance['subject_sha256']
  return config.resolve(config.override(settings(dtype=dtype), flat | changes))


def test_live_cell_names_the_weights_of_a_subject_whose_files_may_change(toy):  # noqa: F811
  with pytest.raises(UserError, match=r"data.identity='' but the weights of toy are none; set data.identity to that"):
    open_source(cell('live', '', **{'data.identity': ''}))


@pytest.mark.parametrize('dtype', ['float32', 'float16'])
def test_live_equals_store(toy, tmp_path, dtype):  # noqa: F811
  harvest.harvest(settings(dtype=dtype), str(tmp_path), progress=False)
  store, live = open_source(cell('store', str(tmp_path), dtype)), open_source(cell('live', '', dtype))
  for start, stop in ((0, 16), (31, 77), (160, 200), (300, 346)):  # across blocks and into the second epoch
    np.testing.assert_array_equal(live.rows(start, stop), store.rows(start, stop))
  np.testing.assert_array_equal(live.held_out(0, 43), store.held_out(0, 43))
  assert live.flops_per_token == store.flops_per_token > 0


@pytest.mark.parametrize('size, said', [(1e-9, 'loses a share of'), (1e5, 'exceed the range of float16')])
def test_live_refuses_what_its_dtype_does_not_hold(toy, monkeypatch, size, said):  # noqa: F811
  genuine = reading.Reading.block
  monkeypatch.setattr(reading.Reading, 'block', lambda *args: tuple(np.float32(size) * x_BD for x_BD in genuine(*args)))
  small = open_source(cell('live', '', 'float16', **{'data.normalize': 'none'}))
  with pytest.raises(UserError, match=f'block 0 of train: .*{said}'):
    small.rows(0, 16)
  assert np.isfinite(open_source(cell('live', '', 'float16')).rows(0, 16)).all()


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


@pytest.mark.parametrize('shape', [(2, 4), (8, 1), (1, 8)])
def test_live_on_a_mesh_gives_the_rows_of_the_host(toy, shape):  # noqa: F811
  source = open_source(cell('live', ''))
  mesh = sharding.make_mesh(config.MeshConfig(*shape))
  for start, stop in ((0, 20), (7, 13)):  # all blocks and both epochs; and from the middle, as a resumed run
    got = list(feed.batches(source, mesh, 16, start, stop))
    for step, x_BD in enumerate(got, start):
      expected_BD = source.rows(step * 16, step * 16 + 16)
      np.testing.assert_allclose(np.asarray(x_BD), expected_BD, rtol=1e-4, atol=1e-5)  # rows have norm 1
      assert x_BD.sharding.is_equivalent_to(NamedSharding(mesh, sharding.BATCH), 2)


def test_live_on_a_mesh_of_processors_leaves_nothing_in_flight(toy, monkeypatch):  # noqa: F811
  """Else a launch can hold the thread that a collective waits for: see sharding.settled."""
  waited = []
  genuine = jax.block_until_ready
  monkeypatch.setattr(jax, 'block_until_ready', lambda array: waited.append(array.shape) or genuine(array))
  source, mesh = open_source(cell('live', '')), sharding.make_mesh(config.MeshConfig(2, 4))
  assert len(list(feed.batches(source, mesh, 16, 0, 5))) == waited.count((16, 6)) == 5
  assert len(waited) > 5  # forward passes too


def test_live_on_a_mesh_is_a_function_of_the_step(toy):  # noqa: F811
  source, mesh = open_source(cell('live', '')), sharding.make_mesh(config.MeshConfig(2, 4))
  straight = [np.asarray(x) for x in feed.batches(source, mesh, 16, 0, 20)]
  resumed = [np.asarray(x) for x in feed.batches(source, mesh, 16, 11, 20)]
  np.testing.assert_array_equal(straight[11:], resumed)


def test_live_trains_on_a_mesh_as_on_one_device(toy, tmp_path):  # noqa: F811
  nmse = []
  for shape in ((1, 1), (2, 4)):
    changes = {'mesh.data': shape[0], 'mesh.latent': shape[1], 'eval.tokens': 43, 'train.checkpoint_every': 9}
    folder = tmp_path / str(shape[0])
    assert training.train(cell('live', '', **changes), str(folder)) == 'done'
    record = json.loads((folder / 'result.json').read_text())
    assert record['mesh'] == list(shape) and record['flops_subject'] > 0
    nmse.append(record['nmse'])
  assert nmse[0] == pytest.approx(nmse[1], rel=1e-4)


def test_live_on_a_mesh_runs_every_block_once(toy, monkeypatch):  # noqa: F811
  source, mesh = open_source(cell('live', '')), sharding.make_mesh(config.MeshConfig(2, 4))
  calls = []
  dispatch = live_mesh._Feed._dispatch

  def counted(self, block, count):
    before = len(block.outputs)
    dispatch(self, block, count)
    calls.extend([block.order_B.size] * max(0, len(block.outputs) - before))

  monkeypatch.setattr(live_mesh._Feed, '_dispatch', counted)
  list(feed.batches(source, mesh, 16, 0, 20))
  stream = source.reading.streams['train']
  assert len(calls) <= 2 * stream.blocks  # two epochs, one call a block at this size; the last may not be needed
