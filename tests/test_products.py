"""`mesh.products`: the path of the sparse products that a cell's configuration forces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import config, sharding, sparse
from sae_jax import step as stepping
from sae_jax.checkpoint import Checkpoints
from sae_jax.data.source import open_source
from sae_jax.errors import UserError
from sae_jax.evaluate import Evaluator
from sae_jax.kernels import dense
from sae_jax.member import Member
from tests import cells

SIZES = cells.cell()
B, D, F, K = SIZES.train.batch_tokens, SIZES.sae.d_model, SIZES.sae.n_latents, SIZES.sae.k
SHARD = (B, F, D, K)


def cell(**overrides) -> config.Cell:
  return cells.cell(**{'sae.k_aux': 0} | overrides)


def some_params():
  rng = np.random.default_rng(0)
  w_dec_FD = rng.standard_normal((F, D)).astype(np.float32)
  w_dec_FD /= np.linalg.norm(w_dec_FD, axis=1, keepdims=True)
  return {
    'w_enc_FD': w_dec_FD,
    'w_dec_FD': w_dec_FD,
    'b_enc_F': np.zeros(F, np.float32),
    'b_pre_D': np.zeros(D, np.float32),
  }


def test_a_forced_path_is_taken_and_gives_the_same_losses():
  mesh, source = sharding.make_mesh(cell().mesh), open_source(cell())
  dots, losses = {}, {}
  with jax.default_matmul_precision('float32'):
    for path in ('auto', 'dense'):
      init, step = stepping.make_step(cell(**{'mesh.products': path}), mesh)
      shapes = stepping.abstract_state(init, mesh, cell())
      state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
      state = state.replace(params=some_params(), scale=np.float32(1))
      dots[path] = str(step.trace(state, source.rows(0, B)).jaxpr).count('dot_general')
      # Without the new state, the gradients fall out of what is compiled; tests/test_sparse.py has them on every path.
      loss = jax.jit(lambda state, x_BD, step=step: step.__wrapped__(state, x_BD)[1]['train/loss'])
      losses[path] = [float(loss(state, source.rows(i * B, (i + 1) * B))) for i in range(3)]
  assert dots['dense'] > dots['auto'] > 0
  assert losses['dense'] == pytest.approx(losses['auto'], rel=1e-5) and len(set(losses['auto'])) == 3


def test_evaluation_takes_the_forced_path(monkeypatch):
  """Without it only the step would: what it measures then is another function than what was trained."""
  asked = []
  monkeypatch.setattr(dense, 'decode', lambda z_BK, idx_BK, w_FD, slots: asked.append(1) or w_FD[:B] * 0)
  config_ = cell(**{'mesh.products': 'dense'})
  mesh, source = sharding.make_mesh(config_.mesh), open_source(config_)
  Evaluator(config_, mesh, source)(some_params())
  assert asked


def test_describe_says_what_is_forced():
  with sparse.forced(cell(**{'mesh.products': 'dense'}).mesh.products):
    assert sparse.describe('cpu', *SHARD) == 'sparse products: dense matmuls, as forced'
    with sparse.forced('auto'):  # leaves the choice as it was
      assert 'forced' in sparse.describe('cpu', *SHARD)
  assert 'forced' not in sparse.describe('cpu', *SHARD)


def test_kernels_are_refused_where_they_cannot_run():
  forced = cell(**{'mesh.products': 'kernels'})
  with pytest.raises(UserError, match=r"mesh\.products='kernels' needs a CUDA device and this one is a cpu"):
    stepping.make_step(forced, sharding.make_mesh(forced.mesh))
  sparse.check('kernels', 'gpu', *SHARD[:3])
  with pytest.raises(UserError, match='cannot address'):
    sparse.check('kernels', 'gpu', 2**17, 2**18, 2**13)


@pytest.mark.parametrize(
  'saved,exact',
  [({}, True), ({'products': 'dense'}, False), ({'device_kind': 'TPU v5e'}, False), (None, True)],
)
def test_resuming_on_another_path_says_bits_may_differ(saved, exact, tmp_path):
  config_ = cell()
  mesh = sharding.make_mesh(config_.mesh)
  state = {'params': {'b_pre_D': jnp.arange(float(D))}}
  first = Member(config_, str(tmp_path), mesh, open_source(config_))
  first.state = state
  first.save(3)
  first.close()
  folder = Checkpoints(str(tmp_path), config_.id)
  state, facts = folder.restore(state, print)
  assert facts['products'] == 'auto' and facts['bit_exact'] is True
  if saved is None:  # as before these were kept
    facts = {key: value for key, value in facts.items() if key not in ('products', 'device_kind')}
  folder.save(5, state, facts | (saved or {}))
  folder.close()
  second = Member(config_, str(tmp_path), mesh, open_source(config_))
  second.start(state, lambda: None)
  second.save(7)
  second.close()
  folder = Checkpoints(str(tmp_path), config_.id)
  assert folder.restore(state, print)[1]['bit_exact'] is exact
  folder.close()
