"""Every family against autodiff of its loss as written, on one device and on a mesh, and trained from end to end.

One table: a row holds the family's codes in plain dense mathematics, and what else its loss adds. All contracts below
hold for every row.
"""

import functools
import json
import math
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import sae_jax
from experiments import tiny
from sae_jax import config, gradients, sae, schema, sharding, topk, training
from sae_jax.axes import Shard
from sae_jax.config import LossConfig, MeshConfig, SAEConfig
from sae_jax.data.source import open_source
from sae_jax.families import cs294a, jumprelu
from sae_jax.families.family import NAMES, family
from tests import cells

ROOT = pathlib.Path(__file__).parents[1]
B, D, F, K, AUX = 24, 7, 40, 3, 5
SCALE, COEFFICIENT = 1.7, 0.3


def size_of(name: str, **changes) -> SAEConfig:
  known = family(name)
  size = {'d_model': D, 'n_latents': F, 'k': None if known.penalised else K, 'activation': name}
  size |= {'k_aux': AUX if known.auxk else 0, 'bandwidth': 0.5}
  # Nothing exceeds the threshold, so that dead latents stay dead and have something to say all the same.
  return SAEConfig(**size | {'fired_threshold': 1e9, 'latent_bias': True} | changes)


LOSS = LossConfig(1 / 32, dead_tokens=10 * B)


# ----- the losses as their papers write them


def dense_topk(pre_BF: jax.Array, k: int) -> jax.Array:
  _, idx_BK = jax.lax.top_k(pre_BF, k)
  return jax.nn.relu(pre_BF) * jax.nn.one_hot(idx_BK, pre_BF.shape[1]).sum(1)


def mse(error_BD):
  return SCALE * jnp.mean(error_BD**2)


def topk_loss(params, pre_BF, errors, k):
  error_BD = errors(dense_topk(pre_BF, k))
  return mse(error_BD), error_BD


def multitopk_loss(params, pre_BF, errors, k):
  error_BD = errors(dense_topk(pre_BF, k))
  return mse(error_BD) + mse(errors(dense_topk(pre_BF, min(4 * k, F)))) / 8, error_BD


def batchtopk_loss(params, pre_BF, errors, k):
  offered_BF = dense_topk(pre_BF, min(4 * k, F))
  error_BD = errors(dense_topk(offered_BF.reshape(1, -1), k * B).reshape(offered_BF.shape))
  return mse(error_BD), error_BD


def matryoshka_loss(params, pre_BF, errors, k):
  z_BF, index_F = dense_topk(pre_BF, k), np.arange(F)
  found = [errors(jnp.where(index_F[None] % 2 ** (3 - level) == 0, z_BF, 0)) for level in range(4)]
  return sum(mse(error_BD) for error_BD in found), found[-1]


def ksparse_loss(params, pre_BF, errors, k):
  left = min(4 * k, F) - k  # at the start; after 170 of 200 steps 5 of 12 latents are kept where k is 3
  error_BD = errors(dense_topk(pre_BF, k + math.ceil(left * 30 / 200)))
  return mse(error_BD), error_BD


def relu_loss(params, pre_BF, errors, k):
  z_BF = jax.nn.relu(pre_BF)
  error_BD = errors(z_BF)
  return mse(error_BD) + COEFFICIENT * jnp.mean(z_BF.sum(1)), error_BD


def gated_loss(params, pre_BF, errors, k):
  gate_BF = jax.nn.relu(pre_BF)
  product_BF = pre_BF - params['b_enc_F'][None]
  magnitude_BF = jnp.exp(params['r_mag_F'])[None] * product_BF + params['b_mag_F'][None]
  error_BD = errors(jnp.where(pre_BF > 0, jax.nn.relu(magnitude_BF), 0))
  frozen = (jax.lax.stop_gradient(params[key]) for key in ('w_dec_FD', 'b_pre_D'))
  return mse(error_BD) + mse(errors(gate_BF, *frozen)) + COEFFICIENT * jnp.mean(gate_BF.sum(1)), error_BD


def surrogate(z_BF, *terms):
  """z in value; in gradient the sum of given factors times arguments. Written without the rules under test."""
  linear = sum(jax.lax.stop_gradient(factor) * (a - jax.lax.stop_gradient(a)) for factor, a in terms)
  return jax.lax.stop_gradient(z_BF) + linear


def prolu_loss(straight_through, params, pre_BF, errors, k):
  b_BF = jnp.broadcast_to(params['b_enc_F'][None], pre_BF.shape)
  m_BF = pre_BF - b_BF
  open_BF = ((m_BF > 0) & (pre_BF > 0)).astype(m_BF.dtype)
  to_m, to_b = (open_BF * (1 + m_BF), open_BF * m_BF) if straight_through else (open_BF, open_BF)
  z_BF = surrogate(open_BF * m_BF, (to_m, m_BF), (to_b, b_BF))
  error_BD = errors(z_BF)
  return mse(error_BD) + COEFFICIENT * jnp.mean(z_BF.sum(1)), error_BD


def jumprelu_loss(smooth, params, pre_BF, errors, k):
  theta_BF = jnp.broadcast_to(jnp.exp(params['log_theta_F'])[None], pre_BF.shape)
  open_BF = (pre_BF > theta_BF).astype(pre_BF.dtype)
  near_BF = (jnp.abs(pre_BF - theta_BF) < 0.25) / 0.5
  z_BF = surrogate(open_BF * pre_BF, (open_BF, pre_BF), (-theta_BF * near_BF, theta_BF))
  counted_BF = surrogate(open_BF, (-near_BF, theta_BF))
  penalty_B = jnp.tanh(4 * np.sqrt(D) * z_BF).sum(1) if smooth else counted_BF.sum(1)
  error_BD = errors(z_BF)
  return mse(error_BD) + COEFFICIENT * jnp.mean(penalty_B), error_BD


LOSSES = {
  'topk': topk_loss,
  'multitopk': multitopk_loss,
  'batchtopk': batchtopk_loss,
  'matryoshka': matryoshka_loss,
  'ksparse': ksparse_loss,
  'relu': relu_loss,
  'prolu_relu': functools.partial(prolu_loss, False),
  'prolu_ste': functools.partial(prolu_loss, True),
  'gated': gated_loss,
  'jumprelu_step': functools.partial(jumprelu_loss, False),
  'jumprelu_tanh': functools.partial(jumprelu_loss, True),
}


def cs294a_loss(params, x_BD, rho=0.05, decay=1e-4):
  scale = 3 / np.sqrt(D)
  y_BD = 0.5 + 0.4 * jnp.clip(x_BD / scale, -1, 1)
  a_BF = jax.nn.sigmoid(y_BD @ params['w_enc_FD'].T + params['b_enc_F'][None])
  h_BD = jax.nn.sigmoid(a_BF @ params['w_dec_FD'] + params['b_pre_D'][None])
  mean_F = a_BF.mean(0)
  divergence = jnp.sum(rho * jnp.log(rho / mean_F) + (1 - rho) * jnp.log((1 - rho) / (1 - mean_F)))
  weights = sum(jnp.sum(params[key] ** 2) for key in ('w_enc_FD', 'w_dec_FD'))
  main = jnp.sum((h_BD - y_BD) ** 2) / (2 * len(x_BD))
  return main + decay / 2 * weights + COEFFICIENT * divergence


def written_loss(name, params, x_BD, dead_F, k_aux, k):
  if name == 'cs294a':
    return cs294a_loss(params, x_BD)
  w_enc_FD = params.get('w_enc_FD', params['w_dec_FD'])
  pre_BF = (x_BD - params['b_pre_D'][None]) @ w_enc_FD.T + params['b_enc_F'][None]

  def errors(z_BF, w_dec_FD=params['w_dec_FD'], b_pre_D=params['b_pre_D']):
    return x_BD - (z_BF @ w_dec_FD + b_pre_D[None])

  main, error_BD = LOSSES[name](params, pre_BF, errors, k)
  if not k_aux:
    return main
  target_BD = jax.lax.stop_gradient(error_BD)
  aux_hat_BD = dense_topk(jnp.where(dead_F[None], pre_BF, -jnp.inf), AUX) @ params['w_dec_FD']
  aux = jnp.mean((aux_hat_BD - target_BD) ** 2) / jnp.mean((target_BD - target_BD.mean(0)[None]) ** 2)
  return main + aux / 32


def random_params(name: str) -> sae.Params:
  rng = np.random.default_rng(7)
  made = {key: rng.standard_normal(shape) for key, shape in sae.shapes(size_of(name)).items()}
  for key in made:
    made[key] *= 1.0 if key.startswith('w_') else 0.2
  made['w_dec_FD'] /= np.linalg.norm(made['w_dec_FD'], axis=1, keepdims=True)
  return {key: jnp.asarray(value) for key, value in made.items()}


def hand_written(name, params, idle_F, x_BD, data, latent, chunks, **sizes):
  """`loss_and_grads` on a mesh; the gradients are those of the whole arrays."""
  mesh = sharding.make_mesh(MeshConfig(data, latent))
  size, scatter = size_of(name, **sizes), data > 1
  layouts = sharding.layouts(sae.shapes(size))
  out = {key: P(('latent', 'data'), *spec[1:]) if spec and scatter else spec for key, spec in layouts.items()}
  shard = Shard(sharding.axes_of(mesh), chunks=chunks, scatter=scatter)

  def grads(params, idle_F, x_BD):
    return gradients.loss_and_grads(
      params,
      idle_F,
      x_BD,
      jnp.asarray(SCALE),
      sae=size,
      loss=LOSS,
      batch=B,
      shard=shard,
      step=170,
      coefficient=COEFFICIENT,
    )

  specs = (layouts, P('latent'), sharding.BATCH)
  f = jax.shard_map(grads, mesh=mesh, in_specs=specs, out_specs=(out, P('latent'), P()), check_vma=False)
  return jax.device_get(jax.jit(f)(params, idle_F, x_BD))


ALONE, ON_A_MESH, ROWS, LATENTS = (1, 1, 1), (2, 4, 3), (2, 1, 1), (1, 2, 1)
SELECTING = tuple(name for name in NAMES if not family(name).penalised)
# One of each way through the skeleton is in `make test`; compiling them all would take a tenth of it.
FEW = ('topk', 'batchtopk', 'gated', 'cs294a')


def every(name: str) -> object:
  return name if name in FEW else pytest.param(name, marks=pytest.mark.chaos)


def rows(names, mesh, k, about, quick):
  """Of the table: those of these names are in `make test`."""
  for name in names:
    yield pytest.param(name, mesh, k, id=f'{name} {about}', marks=() if name in quick else pytest.mark.chaos)


# AuxK is compiled once a family, and its own tests are in test_sae. In float64 every search is XLA's own.
@pytest.mark.parametrize(
  'name, mesh, k',
  [
    *rows(NAMES, ALONE, K, 'alone', NAMES),
    *rows(NAMES, ON_A_MESH, K, 'on a mesh, in chunks, with AuxK', FEW),
    *rows(NAMES, ROWS, K, 'with rows on two devices', ('multitopk',)),
    *rows(NAMES, LATENTS, K, 'with latents on two devices', ('multitopk',)),
    *rows(SELECTING, ALONE, F, 'with all latents selected', ('multitopk',)),
    *rows(SELECTING, ROWS, F, 'with all latents selected and rows on two devices', ()),
    *rows(SELECTING, LATENTS, F, 'with all latents selected and latents on two devices', ()),
  ],
)
def test_gradients_are_those_of_the_written_loss(name, mesh, k, x64):
  params = random_params(name)
  x_BD = jnp.asarray(np.random.default_rng(8).standard_normal((B, D)))
  idle_F = jnp.where(jnp.arange(F) < 9, 99, 1).astype(jnp.int32)
  k_aux = AUX if mesh == ON_A_MESH and family(name).auxk else 0
  sizes = {'k_aux': k_aux} if family(name).penalised else {'k_aux': k_aux, 'k': k}
  grads, new_idle_F, sums = hand_written(name, params, idle_F, x_BD, *mesh, **sizes)
  dead_F = new_idle_F > 10
  assert dead_F.sum() == sums.n_dead == (0 if name == 'cs294a' else 9)
  loss, expected = jax.value_and_grad(functools.partial(written_loss, name))(params, x_BD, dead_F, k_aux, k)
  if sae.kind_of(size_of(name)).unit_norm:
    w_FD = params['w_dec_FD']
    along_F1 = jnp.sum(expected['w_dec_FD'] * w_FD, axis=1, keepdims=True)
    expected['w_dec_FD'] -= along_F1 * w_FD
  assert grads.keys() == expected.keys()
  for key, grad in grads.items():
    np.testing.assert_allclose(grad, expected[key], rtol=1e-9, atol=1e-12, err_msg=key)
  if name in ('topk', 'batchtopk', 'ksparse', 'relu', 'prolu_relu', 'prolu_ste', 'jumprelu_step', 'jumprelu_tanh'):
    found = SCALE * sums.square_error / (B * D) + sums.aux_loss / 32 + COEFFICIENT * sums.penalty / B
    np.testing.assert_allclose(found, loss, rtol=1e-12)


# ----- from end to end


@pytest.mark.parametrize('name', [every(name) for name in NAMES if name != 'topk'])  # which all other tests train
def test_a_cell_trains_resumes_and_is_loaded(name, tmp_path):
  whole, halves = tmp_path / 'whole', tmp_path / 'halves'
  one = cells.of_family(name, **{'train.checkpoint_every': 10**6})
  assert training.train(one, str(whole)) == 'done'
  seen = iter([False] * 11 + [True])
  assert training.train(one, str(halves), should_stop=lambda: next(seen)) == 'preempted'
  assert training.train(one, str(halves)) == 'done'
  results = [json.loads((folder / 'result.json').read_text()) for folder in (whole, halves)]
  for key in ('params_digest', 'nmse', 'l0', 'flops_useful'):
    assert results[0][key] == results[1][key], key
  result = results[0]
  assert result['activation'] == name and result['nmse'] < 1.1 and 0 < result['l0'] <= 88
  autoencoder = sae_jax.load(whole)
  x_BD = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
  z_BK, idx_BK = autoencoder.encode(x_BD)
  assert (np.diff(np.asarray(z_BK), axis=1) <= 0).all() and (np.asarray(z_BK) > 0).any(axis=0).all()
  for straight, jitted in zip((z_BK, idx_BK), jax.jit(autoencoder.encode)(x_BD), strict=True):
    np.testing.assert_allclose(straight, np.asarray(jitted)[:, : z_BK.shape[1]], rtol=1e-6)
  assert autoencoder.reconstruct(x_BD).shape == x_BD.shape


def test_flops_of_a_penalised_cell_count_the_latents_that_were_active(tmp_path):
  assert training.train(cells.of_family('relu'), str(tmp_path)) == 'done'
  lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  result = json.loads((tmp_path / 'result.json').read_text())
  n, d, batch = 88, 24, 40
  encoder = 20 * (2 * n * d * batch + 2 * n * d)
  per_active = (result['flops_useful'] - encoder) / (20 * 8 * d * batch)  # without AuxK, which the threshold leaves out
  l0s = [line['train/l0'] for line in lines]
  assert min(l0s) < per_active < max(l0s) and result['k'] == 9
  known = {field.line for field in schema.CURVES if field.line}
  assert all(set(schema.content(line)) <= known for line in lines)
  assert {'train/penalty', 'train/coefficient'} <= set(lines[0])


# ----- a planted dictionary


def recovered(folder, config) -> float:
  """Mean over the planted directions of the largest cosine with a decoder row."""
  w_FD = np.asarray(sae_jax.load(folder, 'raw').sae.w_dec_FD[...])
  cosine_GF = open_source(config).dictionary_GD @ (w_FD / np.linalg.norm(w_FD, axis=1, keepdims=True)).T
  return float(cosine_GF.max(1).mean())


def planted(name: str, steps: int, **overrides):
  """64 directions, 3 of them active on average."""
  known = family(name)
  own = {'sae.k': 3} if known.penalised and known.steered else {'sae.k': 4}
  own = own if known.steered else {'sae.k': None, 'loss.sparsity': 0.01}
  settings = {'sae.activation': name, 'train.tokens': 256 * steps, 'train.checkpoint_every': 10**6} | own | overrides
  return config.resolve(config.override(tiny.get_config(), settings))


def test_steering_finds_its_target_without_swings_and_directions_are_recovered(tmp_path):
  settings = {'sae.k_aux': 0, 'eval.per_decade': 12}
  steered = [planted('relu', 1600, **settings), planted('gated', 1600, **settings, **{'loss.steer_start': 0.02})]
  folders = [tmp_path / one.sae.activation for one in steered]
  training.train_group([(one, str(folder)) for one, folder in zip(steered, folders, strict=True)])
  for one, folder in zip(steered, folders, strict=True):
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    late = [line['eval/l0'] for line in lines if line['step'] > 800]
    assert len(late) > 3 and max(abs(np.log(l0 / 3)) for l0 in late) < 0.1, late
    assert lines[0]['train/coefficient'] == pytest.approx(one.loss.steer_start)
    assert lines[0]['train/l0'] > 50 and recovered(folder, one) > 0.9


@pytest.mark.chaos
@pytest.mark.parametrize('mesh', [(1, 1), (2, 4)])
def test_a_planted_dictionary_is_recovered_by_every_family(mesh, tmp_path):
  # The sigmoid autoencoder of the notes has no sparse codes, and finds no directions.
  names, on_mesh = (
    [name for name in NAMES if name != 'cs294a'],
    dict(zip(('mesh.data', 'mesh.latent'), mesh, strict=True)),
  )
  group = [(planted(name, 800, **on_mesh), str(tmp_path / name)) for name in names]
  assert training.train_group(group) == ['done'] * len(group)
  found = {name: recovered(folder, one) for name, (one, folder) in zip(names, group, strict=True)}
  assert min(found.values()) > 0.9, found


# Ends this process as soon as a checkpoint is complete.
KILLED = """
import os, signal, sys
from sae_jax import checkpoint, train
save = checkpoint.Checkpoints.save
def killed(self, *args):
  save(self, *args)
  self.wait()
  os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoints.save = killed
train.main(sys.argv[1:])
"""


@pytest.mark.chaos
@pytest.mark.parametrize('name', NAMES)
def test_a_family_that_was_killed_ends_with_the_bits_of_one_that_was_not(name, tmp_path):
  flags = [f'--config.{key}={value}' for key, value in (cells.SHARED | cells.family_keys(name)).items()]
  argv = ['--config=experiments/tiny.py', f'--workdir={tmp_path / "killed"}', *flags]
  ran = subprocess.run([sys.executable, '-c', KILLED, *argv], cwd=ROOT, capture_output=True, text=True)
  assert ran.returncode == -signal.SIGKILL, ran.stderr
  assert [path.name for path in (tmp_path / 'killed' / 'ckpt').iterdir()] == ['5']
  for folder in ('killed', 'whole'):
    assert training.train(cells.of_family(name), str(tmp_path / folder)) == 'done'
  killed, whole = (json.loads((tmp_path / folder / 'result.json').read_text()) for folder in ('killed', 'whole'))
  assert killed['bit_exact'] and killed['params_digest'] == whole['params_digest'] and killed['id'] == whole['id']


# ----- what families share


@pytest.mark.parametrize('name', ['topk', 'relu', 'cs294a'])  # one of each kind
def test_latents_without_a_bias_have_none_to_learn(name):
  params = random_params(name)
  grads, _, _ = gradients.loss_and_grads(
    params,
    jnp.zeros(F, jnp.int32),
    jnp.ones((B, D)),
    SCALE,
    sae=size_of(name, latent_bias=False, fired_threshold=0.0),
    loss=LOSS,
    batch=B,
    shard=Shard(),
    coefficient=COEFFICIENT,
  )
  assert not np.any(grads['b_enc_F']) and np.any(grads['w_dec_FD'])


def codes_of(name: str, product_BF, **latents):
  zeros = {'b_enc_F': jnp.zeros(F)} | {key: jnp.zeros(F) for key in sae.kind_of(size_of(name)).latents}
  zs, penalty_B = sae.kind_of(size_of(name)).codes(product_BF, zeros | latents, size_of(name))
  return zs, penalty_B


def test_families_meet_where_their_parameters_do():
  product_BF = jax.random.normal(jax.random.key(0), (B, F))
  (relu_BF,), sum_B = codes_of('relu', product_BF)
  (gated_BF, gate_BF), gate_B = codes_of('gated', product_BF)
  for found in (gated_BF, gate_BF, codes_of('jumprelu_step', product_BF, log_theta_F=jnp.full(F, -30.0))[0][0]):
    np.testing.assert_array_equal(found, relu_BF)
  np.testing.assert_array_equal(gate_B, sum_B)
  for name in ('prolu_relu', 'prolu_ste'):  # a bias that is not negative changes nothing
    np.testing.assert_array_equal(codes_of(name, product_BF, b_enc_F=jnp.full(F, 0.5))[0][0], relu_BF)
  counted_B = codes_of('jumprelu_step', product_BF, log_theta_F=jnp.zeros(F))[1]
  np.testing.assert_array_equal(counted_B, (product_BF > 1).sum(1))


def test_few_latents_of_jumprelu_start_as_open_as_many():
  product_BF = jax.random.normal(jax.random.key(3), (400, 16))
  log_theta_F = jumprelu.start(product_BF, size_of('jumprelu_step', n_latents=16))['log_theta_F']
  assert float(jnp.mean(product_BF > jnp.exp(log_theta_F)[None])) == pytest.approx(1 / 8, abs=0.001)


def test_selections_are_topk_where_there_is_nothing_else_to_choose():
  def select(name, rows, **knobs):
    bias_F, xc_BD = jnp.zeros(F), jnp.zeros((rows, D))
    product_BF = jax.random.normal(jax.random.key(1), (rows, F))
    pre = topk.Preactivations(product_BF, lambda _: product_BF, xc_BD, bias_F)
    kind, size = sae.kind_of(size_of(name)), size_of(name, **knobs)
    parts = kind.parts(pre, size, Shard(), jnp.asarray(10**6)) if kind.parts else (kind.select(pre, size, Shard()),)
    dense_BF = np.zeros((rows, F))
    for part in parts[: kind.main % len(parts) + 1]:
      np.put_along_axis(dense_BF, np.asarray(part.idx_BK), np.asarray(part.z_BK), axis=1)
    return dense_BF

  np.testing.assert_array_equal(select('batchtopk', 1), select('topk', 1))
  for name, knobs in (('multitopk', {}), ('matryoshka', {'levels': 1}), ('ksparse', {})):
    np.testing.assert_array_equal(select(name, B, **knobs), select('topk', B))


def test_a_token_of_batchtopk_takes_more_than_is_searched_for_at_first():
  size, noise_BF = size_of('batchtopk'), jax.random.normal(jax.random.key(1), (B, F))
  alike_BF = noise_BF[:1] + noise_BF / 100
  for product_BF, least, most in ((alike_BF, 1, 2 * K), (alike_BF.at[0].multiply(10), 4 * K, 4 * K)):
    pre = topk.Preactivations(product_BF, lambda _: None, jnp.zeros((B, D)), jnp.zeros(F))
    codes = sae.kind_of(size).select(pre, size, Shard())
    offered_BF = dense_topk(product_BF, 4 * K)
    expected_BF = dense_topk(offered_BF.reshape(1, -1), K * B).reshape(offered_BF.shape)
    found_BF = np.zeros((B, F))
    np.put_along_axis(found_BF, np.asarray(codes.idx_BK), np.asarray(codes.z_BK), axis=1)
    np.testing.assert_array_equal(found_BF, expected_BF)
    assert least <= codes.active().max() <= most


def test_the_penalty_of_the_notes_is_at_rest_where_the_mean_is_as_asked():
  pull = jax.grad(lambda mean: cs294a.divergence(mean, 0.05))
  assert abs(float(pull(0.05))) < 1e-6 and float(pull(0.2)) > 0 > float(pull(0.01))
