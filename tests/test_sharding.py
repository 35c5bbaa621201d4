"""The same answer on every mesh, and a compiled step that sends only what it must."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import PartitionSpec as P

from sae_jax import config, evaluate, optim, sharding, training
from sae_jax.ahead import hlo
from sae_jax.data.source import open_source
from sae_jax.errors import UserError
from sae_jax.evaluate import Evaluator
from sae_jax.sae import SAMPLE
from sae_jax.startup import start_up_sample
from tests import cells

SIZES = cells.cell()
B, D, F, K = SIZES.train.batch_tokens, SIZES.sae.d_model, SIZES.sae.n_latents, SIZES.sae.k
MESHES = [(1, 1), (8, 1), (1, 8), (2, 4)]


def cell(data=1, latent=1, **overrides) -> config.Cell:
  return cells.cell(**{'mesh.data': data, 'mesh.latent': latent} | overrides)


def dying(data=1, latent=1, **overrides) -> config.Cell:
  """Some latents are dead after one batch without firing, so that AuxK is active."""
  return cell(data, latent, **{'loss.dead_tokens': B} | overrides)


@functools.cache
def first_state(one_device: config.Cell, dtype):
  """The fresh state, made on one device: `init` on a mesh gives the same, as a test says, and takes a compilation."""
  init, _ = training.make_step(one_device, sharding.make_mesh(one_device.mesh))
  sample = start_up_sample(open_source(one_device), one_device.train.tokens)
  return jax.device_get(init(*(a.astype(dtype) for a in sample)))


def run(config_: config.Cell, steps: int, dtype):
  mesh = sharding.make_mesh(config_.mesh)
  source = open_source(config_)
  _, step = training.make_step(config_, mesh)
  fresh = first_state(dataclasses.replace(config_, mesh=config.MeshConfig(1, 1)), dtype)
  state = jax.device_put(fresh, sharding.shardings(mesh, fresh))
  losses = []
  for i in range(steps):
    x_BD = sharding.place_rows(mesh, (B, D), lambda a, b, i=i: source.rows(i * B + a, i * B + b).astype(dtype))
    state, values = step(state, x_BD)
    losses.append({key: float(value) for key, value in values.items()})
  return state, losses


@pytest.fixture(scope='module')
def float64_runs():
  with jax.enable_x64(True):
    yield {mesh: jax.device_get(run(dying(*mesh), 17, np.float64)) for mesh in MESHES}


@pytest.mark.parametrize('mesh', MESHES[1:])
def test_mesh_does_not_change_parameters_in_float64(float64_runs, mesh):
  (expected, expected_losses), (got, losses) = float64_runs[1, 1], float64_runs[mesh]
  assert expected_losses[-1]['sae/dead_fraction'] > 0  # AuxK was active
  for name in expected.params:
    np.testing.assert_allclose(got.params[name], expected.params[name], rtol=0, atol=1e-9, err_msg=name)
    np.testing.assert_allclose(got.ema[name], expected.ema[name], rtol=0, atol=1e-9, err_msg=name)
  np.testing.assert_array_equal(got.idle_F, expected.idle_F)
  for a, b in zip(losses, expected_losses, strict=True):
    assert a == pytest.approx(b, abs=1e-9)


@pytest.mark.parametrize('mesh', MESHES[1:])
def test_mesh_does_not_change_losses_in_float32(mesh, float32_losses):
  _, losses = run(cell(*mesh), 7, np.float32)
  for a, b in zip(losses, float32_losses, strict=True):
    assert a == pytest.approx(b, abs=1e-5)


@pytest.fixture(scope='module')
def float32_losses():
  return run(cell(), 7, np.float32)[1]


@pytest.mark.parametrize(
  'mesh,overrides',
  [
    ((1, 1), {'mesh.row_chunks': 5}),
    ((2, 4), {'mesh.row_chunks': 4, 'mesh.exchange': 'count'}),
  ],
)
def test_row_chunks_and_exchange_do_not_change_parameters_in_float64(float64_runs, mesh, overrides):
  expected, expected_losses = float64_runs[1, 1]
  with jax.enable_x64(True):
    got, losses = jax.device_get(run(dying(*mesh, **overrides), 17, np.float64))
  for name in expected.params:
    np.testing.assert_allclose(got.params[name], expected.params[name], rtol=0, atol=1e-9, err_msg=name)
  np.testing.assert_array_equal(got.idle_F, expected.idle_F)
  assert losses[-1] == pytest.approx(expected_losses[-1], abs=1e-9)


def test_mesh_does_not_change_what_gathered_dead_latents_get():
  """With k_aux = 2 each of four shards gathers up to 8 of its 22 latents and counts for the best two over all."""
  few = {'sae.k_aux': 2, 'sae.k': 3, 'loss.dead_tokens': B}
  with jax.enable_x64(True):
    (expected, expected_losses), (got, losses) = (
      jax.device_get(run(cell(*mesh, **few), 11, np.float64)) for mesh in ((1, 1), (2, 4))
    )
  assert 3 / F < expected_losses[-1]['sae/dead_fraction'] <= 32 / F
  for name in expected.params:
    np.testing.assert_allclose(got.params[name], expected.params[name], rtol=0, atol=1e-9, err_msg=name)
  assert losses[-1] == pytest.approx(expected_losses[-1], abs=1e-9)


COMPILED = {
  'both axes': ((2, 4), {}),
  'data': ((8, 1), {}),
  'counting': ((2, 4), {'mesh.exchange': 'count', 'mesh.row_chunks': 4}),
}


@pytest.fixture(scope='module', params=COMPILED)
def compiled_step(request):
  mesh_shape, overrides = COMPILED[request.param]
  config_ = cell(*mesh_shape, **overrides)
  mesh = sharding.make_mesh(config_.mesh)
  init, step = training.make_step(config_, mesh)
  abstract = training.abstract_state(init, mesh, config_)
  x_BD = jax.ShapeDtypeStruct((B, D), np.float32, sharding=jax.NamedSharding(mesh, sharding.BATCH))
  text = step.lower(abstract, x_BD).compile().as_text()
  return config_, hlo.collectives(text, dict(mesh.shape))


def test_compiled_step_has_no_collective_in_a_loop_but_the_rounds_of_counting(compiled_step):
  config_, found = compiled_step
  looped = [c for c in found if c.in_loop]
  assert found and all(c.per_step for c in found)
  if config_.mesh.exchange == 'count':
    # One count a row, 32 rounds, for the main codes and in two branches for AuxK: the number does not grow with k.
    assert [(c.op, c.shapes, c.axis, c.per_step) for c in looped] == [
      ('all-reduce', (f's32[{B // config_.mesh.data}]',), 'latent', 32)
    ] * 3
  else:
    assert not looped


def test_compiled_step_gathers_nothing_of_batch_by_latents(compiled_step):
  config_, found = compiled_step
  data, latent = config_.mesh.data, config_.mesh.latent
  local, per_shard, most = B // data, F // latent, max(K, config_.sae.k_aux)
  for c in found:
    for shape in c.shapes:
      size = int(np.prod(hlo.elements(shape), dtype=int))
      weights = c.axis == 'data' and size in (per_shard * D, per_shard * D // data)
      # Candidates (k, and k_aux of AuxK, from every shard) are the largest thing that may move besides.
      assert weights or size <= max(local * latent * min(most, per_shard), local * D, F), c
      assert not (size >= local * F and local * F > per_shard * D), c


def test_compiled_step_reduces_gradients_and_fired_mask_once(compiled_step):
  config_, found = compiled_step
  data, per_shard = config_.mesh.data, F // config_.mesh.latent
  moved = [(c.op, s, c.axis) for c in found for s in c.shapes]
  # Each chip ends with the sums of its own part of the latents, and parameters are gathered for the next step.
  assert moved.count(('reduce-scatter', f'f32[{per_shard // data},{D}]', 'data')) == 2  # encoder and decoder
  assert moved.count(('all-gather', f'f32[{per_shard},{D}]', 'data')) == 2
  assert not [m for m in moved if m[0] == 'all-reduce' and m[1] == f'f32[{per_shard},{D}]']
  masks = [m for m in moved if m[1] in (f's8[{per_shard}]', f's32[{per_shard}]', f'u8[{per_shard}]')]
  assert [(op, axis) for op, _, axis in masks] == [('all-reduce', 'data')]


def test_array_without_a_layout_is_an_error():
  for name in ('theta', 'log_theta_K', 'w_enc_fd', 'FD'):
    with pytest.raises(ValueError, match=f'{name} .* has no layout'):
      sharding.layout(name, (8, 3))
  assert sharding.layout('count', ()) == P()
  assert sharding.layout('r_mag_F', (8,)) == P('latent')


def test_state_at_rest_is_split_over_both_axes_where_latents_divide():
  for latents, split in ((88, 11), (92, 23)):  # 92 latents on 2 x 4 devices: whole latent shards of 23
    config_ = cell(2, 4, **{'sae.n_latents': latents})
    mesh = sharding.make_mesh(config_.mesh)
    shapes = {
      'w_dec_FD': jax.ShapeDtypeStruct((latents, D), np.float32),
      'idle_F': jax.ShapeDtypeStruct((latents,), int),
    }
    for tree in (shapes, {'mu': shapes}):
      flat = jax.tree.map(lambda where, leaf: where.shard_shape(leaf.shape), sharding.shardings(mesh, tree), tree)
      assert flat.get('mu', flat) == {'w_dec_FD': (split, D), 'idle_F': (latents // 4,)}
    assert config_.state_is_split == (latents == 88)


def test_step_keeps_state_types_and_traces_once():
  config_ = cell(2, 4)
  mesh = sharding.make_mesh(config_.mesh)
  init, step = training.make_step(config_, mesh)
  state = init(jnp.zeros(D), jnp.float32(1), jnp.zeros((SAMPLE, D)))
  before = jax.tree.map(lambda a: (jax.typeof(a), a.sharding), state)
  x_BD = sharding.place_rows(mesh, (B, D), lambda a, b: np.ones((b - a, D), np.float32))
  with jax.log_compiles(False):
    for i in range(3):
      state, _ = step(state, x_BD)
      assert int(state.step) == i + 1
  after = jax.tree.map(lambda a: (jax.typeof(a), a.sharding), state)
  assert jax.tree.all(jax.tree.map(lambda a, b: a == b, before, after, is_leaf=lambda a: isinstance(a, tuple)))


def test_decoder_rows_have_unit_norm_after_every_step(float64_runs):
  state, _ = float64_runs[2, 4]
  np.testing.assert_allclose(np.linalg.norm(state.params['w_dec_FD'], axis=1), 1, rtol=1e-12)


@pytest.mark.parametrize('mesh', [(1, 8), (2, 4)])
def test_sharded_init_builds_each_shard_on_its_device(mesh):
  config_ = cell(*mesh)
  init, _ = training.make_step(config_, sharding.make_mesh(config_.mesh))
  one, _ = training.make_step(cell(), sharding.make_mesh(cell().mesh))
  given = jnp.zeros(D), jnp.float32(1), jnp.zeros((SAMPLE, D))
  sharded, plain = init(*given), one(*given)
  shapes = {s.data.shape for s in sharded.params['w_enc_FD'].addressable_shards}
  assert shapes == {(F // 8, D)}
  sharded, plain = jax.device_get((sharded, plain))
  np.testing.assert_array_equal(sharded.params['w_dec_FD'], plain.params['w_dec_FD'])
  np.testing.assert_allclose(sharded.params['w_enc_FD'], plain.params['w_enc_FD'], rtol=1e-6)
  jax.tree.map(np.testing.assert_array_equal, sharded.replace(params={}), plain.replace(params={}))


def test_host_rows_are_read_only_for_the_devices_that_hold_them():
  mesh = sharding.make_mesh(config.MeshConfig(data=4, latent=2))
  asked = []

  def rows(start, stop):
    asked.append((start, stop))
    return np.arange(start, stop, dtype=np.float32)[:, None] * np.ones((1, D), np.float32)

  x_BD = sharding.place_rows(mesh, (B, D), rows)
  assert sorted(asked) == [(0, 10), (10, 20), (20, 30), (30, 40)]
  np.testing.assert_array_equal(np.asarray(x_BD)[:, 0], np.arange(B))


@pytest.mark.parametrize('mesh', [(1, 1), (2, 4), (8, 1)])
def test_evaluation_does_not_depend_on_mesh_or_batch(mesh, one_evaluation):
  params, expected = one_evaluation
  config_ = cell(*mesh, **{'eval.batch_tokens': 64})
  quality = Evaluator(config_, sharding.make_mesh(config_.mesh), open_source(config_))(params)[0]
  assert quality.nmse == pytest.approx(expected.nmse, rel=1e-6)
  assert quality.l0 == expected.l0


@pytest.fixture(scope='module')
def one_evaluation():
  config_ = cell()
  state, _ = run(config_, 5, np.float32)
  params = jax.device_get(state.params)
  return params, Evaluator(config_, sharding.make_mesh(config_.mesh), open_source(config_))(params)[0]


def test_evaluation_gathers_split_parameters_once_and_changes_no_bit(monkeypatch):
  config_ = cell(2, 4)
  assert config_.state_is_split
  mesh, source = sharding.make_mesh(config_.mesh), open_source(config_)
  rng = np.random.default_rng(0)
  shapes = {'w_enc_FD': (F, D), 'w_dec_FD': (F, D), 'b_enc_F': (F,), 'b_pre_D': (D,)}
  params = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
  at_rest = jax.device_put(params, sharding.shardings(mesh, params))
  make, calls = evaluate._make_token_sums, []

  def recorded(*args):
    token_sums = make(*args)
    return lambda params, x_BD: calls.append((token_sums, params, x_BD)) or token_sums(params, x_BD)

  monkeypatch.setattr(evaluate, '_make_token_sums', recorded)
  evaluate.Evaluator(config_, mesh, source)(at_rest)
  (token_sums, gathered, x_BD), again = calls[0], calls[1]

  def weights_gathered(params):
    text = token_sums.lower(params, x_BD).compile().as_text()
    found = hlo.collectives(text, dict(mesh.shape))
    return [c for c in found if c.op == 'all-gather' and c.axis == 'data']

  assert len(weights_gathered(at_rest)) >= 2 and not weights_gathered(gathered)
  assert again[1]['w_dec_FD'] is gathered['w_dec_FD']
  for got, expected in zip(*(token_sums(p, x_BD).values() for p in (gathered, at_rest)), strict=True):
    np.testing.assert_array_equal(got, expected)


def test_predicting_the_mean_scores_one():
  config_ = cell(2, 4)
  evaluator = Evaluator(config_, sharding.make_mesh(config_.mesh), open_source(config_))
  params = {
    'w_enc_FD': np.zeros((F, D), np.float32),
    'w_dec_FD': np.ones((F, D), np.float32),
    'b_enc_F': np.full(F, -1, np.float32),
    'b_pre_D': evaluator.mean_D.astype(np.float32),
  }
  quality = evaluator(params)[0]
  assert quality.nmse == pytest.approx(1, abs=1e-6) and quality.l0 == 0


def test_nmse_equals_its_definition(one_evaluation):
  params, quality = one_evaluation
  x_BD = open_source(cell()).held_out(0, cell().eval.tokens).astype(np.float64)
  pre_BF = (x_BD - params['b_pre_D']) @ params['w_enc_FD'].T + params['b_enc_F']
  kept = np.argsort(-pre_BF, axis=1, kind='stable')[:, :K]
  z_BF = np.zeros_like(pre_BF)
  np.put_along_axis(z_BF, kept, np.maximum(np.take_along_axis(pre_BF, kept, 1), 0), 1)
  x_hat_BD = z_BF @ params['w_dec_FD'] + params['b_pre_D']
  nmse = np.sum((x_BD - x_hat_BD) ** 2) / np.sum((x_BD - x_BD.mean(0)) ** 2)
  assert quality.nmse == pytest.approx(nmse, rel=1e-5)
  assert quality.mse == pytest.approx(np.mean((x_BD - x_hat_BD) ** 2), rel=1e-5)
  assert quality.l0 == pytest.approx(np.mean(np.sum(z_BF > 0, 1)))


def test_ema_of_constant_weights_is_those_weights():
  weights = {'w_dec_FD': jnp.full((3, 2), 0.25)}
  for rule in ({'ema_decay': 0.9}, {'ema_width': 0.1}):
    how = dataclasses.replace(cell().optim, **rule)
    ema = jax.tree.map(jnp.zeros_like, weights)
    for step in range(1, 6):
      ema = optim.ema_update(ema, weights, how, jnp.asarray(step))
    np.testing.assert_allclose(optim.ema_weights(ema, jnp.asarray(5), how)['w_dec_FD'], 0.25, rtol=1e-6)


def test_mesh_that_needs_more_devices_is_refused():
  with pytest.raises(UserError, match=r'needs 9 devices'):
    sharding.make_mesh(config.MeshConfig(data=9, latent=1))


def test_programs_of_a_mesh_of_processors_are_neither_kept_nor_read(tmp_path):
  """From jax's cache they come without the order of the collectives in their loops, and may wait for each other for ever."""
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  before = [getattr(jax.config, name) for name in names]
  try:
    for name, value in zip(names, (str(tmp_path), 0), strict=True):
      jax.config.update(name, value)
    kept = []
    for shape in ((1, 1), (2, 4)):
      compilation_cache.reset_cache()
      x_BD = sharding.place_rows(
        sharding.make_mesh(config.MeshConfig(*shape)), (8, 4), lambda a, b: np.ones((b - a, 4))
      )
      jax.jit(lambda x_BD: jnp.sum(x_BD @ x_BD.T))(x_BD)
      kept.append(len(list(tmp_path.iterdir())))
    assert kept[0] > 0 and kept[1] == kept[0]
  finally:
    for name, value in zip(names, before, strict=True):
      jax.config.update(name, value)
    compilation_cache.reset_cache()  # jax holds on to the folder it opened


def test_row_chunks_keep_the_product_small_on_a_cpu():
  mesh = sharding.make_mesh(config.MeshConfig(1, 1))
  assert sharding.row_chunks(cell(), mesh) == 1
  large = cell(**{'sae.n_latents': 32768, 'train.batch_tokens': 8192, 'train.tokens': 8192})
  chunks = sharding.row_chunks(large, mesh)
  assert 8192 % chunks == 0 and 4 * 8192 * 32768 <= chunks * 2**28 < 2 * 4 * 8192 * 32768
  stated = cell(**{'sae.n_latents': 32768, 'train.batch_tokens': 8192, 'train.tokens': 8192, 'mesh.row_chunks': 64})
  assert sharding.row_chunks(stated, mesh) == 64
