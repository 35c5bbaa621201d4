"""Approximate selection: what training then selects, and that its measured recall can tell."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import config, gradients, sae, sharding, topk
from sae_jax.axes import Shard
from sae_jax.data.source import open_source
from sae_jax.evaluate import Evaluator
from sae_jax.member import Member
from sae_jax.step import TrainState
from tests import cells

SIZES = cells.cell()
B, D, F, K = SIZES.train.batch_tokens, SIZES.sae.d_model, SIZES.sae.n_latents, 5
BINS, TOKENS = 11, SIZES.eval.tokens  # two columns a bin of a shard's 22
MESHES = [(1, 1), (2, 4)]


def cell(data=1, latent=1, **overrides) -> config.Cell:
  return cells.cell(
    **{'sae.k': K, 'mesh.data': data, 'mesh.latent': latent, 'sae.selection': 'approximate'} | overrides
  )


def binned(product_BF, bias_F, k, recall_target):
  """What `approx_max_k` does on a TPU: the k largest of the largest of each bin."""
  columns_GB = np.arange(bias_F.shape[0]).reshape(-1, BINS)
  pre_BGb = (product_BF + bias_F[None])[:, columns_GB]
  v_BK, bin_BK = jax.lax.top_k(pre_BGb.max(1), k)
  return v_BK, jnp.asarray(columns_GB)[jnp.take_along_axis(pre_BGb.argmax(1), bin_BK, axis=1), bin_BK]


def binned_winners(pre_F, shards) -> set[int]:
  """The same for one token in plain Python, over all shards."""
  width = F // shards
  best = [
    max((pre_F[s * width + c], s * width + c) for c in range(b, width, BINS))
    for s in range(shards)
    for b in range(BINS)
  ]
  return {column for _, column in sorted(best)[-K:]}


def some_params() -> sae.Params:
  rng = np.random.default_rng(0)
  w_dec_FD = rng.standard_normal((F, D)).astype(np.float32)
  return {
    'w_enc_FD': rng.standard_normal((F, D)).astype(np.float32),
    'w_dec_FD': w_dec_FD / np.linalg.norm(w_dec_FD, axis=1, keepdims=True),
    'b_enc_F': 0.1 * rng.standard_normal(F).astype(np.float32),
    'b_pre_D': np.zeros(D, np.float32),
  }


@pytest.fixture
def lossy(monkeypatch):
  """Overrides for an approximate selection that loses some.

  A process keeps compiled programs by configuration. No other test asks for this recall, so none gets this selection.
  """
  monkeypatch.setattr(topk, 'approximate', binned)
  return {'sae.recall_target': 0.625}


def quality(config_, params):
  return Evaluator(config_, sharding.make_mesh(config_.mesh), open_source(config_))(params)[0]


@pytest.mark.parametrize('mesh', MESHES)
def test_recall_counts_what_a_lossy_selection_finds(mesh, lossy):
  params = some_params()
  exact = quality(cell(*mesh, **{'sae.selection': 'exact'}), params)
  found_by_bins = quality(cell(*mesh, **lossy), params)
  pre_TF = open_source(cell()).held_out(0, TOKENS) @ params['w_enc_FD'].T + params['b_enc_F']
  found = sum(len(set(np.argsort(-pre_F)[:K].tolist()) & binned_winners(pre_F.tolist(), mesh[1])) for pre_F in pre_TF)
  assert found_by_bins.topk_recall == found / (TOKENS * K) and 0.3 < found_by_bins.topk_recall < 0.99
  # The autoencoder is scored on its exact top k either way.
  assert exact.topk_recall is None and (found_by_bins.nmse, found_by_bins.l0) == (exact.nmse, exact.l0)


@pytest.mark.parametrize('chunks', [1, 5])
def test_training_takes_the_latents_that_the_selection_finds(chunks, lossy):
  config_, params = cell(**lossy), jax.tree.map(jnp.asarray, some_params())
  x_BD = jnp.asarray(open_source(config_).rows(0, B))

  @jax.jit
  def fires(params, x_BD):
    _, idle_F, sums = gradients.loss_and_grads(
      params,
      jnp.full(F, 7, jnp.int32),
      x_BD,
      jnp.float32(1),
      sae=config_.sae,
      loss=config_.loss,
      batch=B,
      shard=Shard(chunks=chunks),
    )
    return idle_F == 1, sums.active

  fired_F, active = fires(params, x_BD)
  pre_BF = np.asarray(x_BD @ params['w_enc_FD'].T + params['b_enc_F'][None])
  chosen = [{j for j in binned_winners(pre_F.tolist(), 1) if pre_F[j] > 0} for pre_F in pre_BF]
  fired = {j for row, pre_F in zip(chosen, pre_BF, strict=True) for j in row if pre_F[j] > config_.sae.fired_threshold}
  assert set(np.flatnonzero(fired_F).tolist()) == fired
  assert int(active) == sum(map(len, chosen))


def test_a_cell_records_its_recall_where_it_has_one(tmp_path):
  mesh, source = sharding.make_mesh(cell().mesh), open_source(cell())
  params = jax.tree.map(jnp.asarray, some_params())
  state = TrainState(
    step=jnp.int32(3),
    params=params,
    ema=params,
    opt_state=(),
    idle_F=jnp.ones(F, jnp.int32),
    aux_steps=jnp.int32(0),
    scale=jnp.float32(1),
    carried={},
  )
  line, result = {}, {}
  for selection in ('exact', 'approximate'):
    member = Member(cell(**{'sae.selection': selection}), str(tmp_path / selection), mesh, source)
    member.state = state
    member.hear(3, {'sae/dead_fraction': 0.0})
    member.evaluate(3)
    member.close()
    member.finish()
    line[selection] = json.loads((tmp_path / selection / 'metrics.jsonl').read_text())
    result[selection] = json.loads((tmp_path / selection / 'result.json').read_text())
  # XLA sorts on this platform, so nothing is missed.
  assert line['approximate'].pop('eval/topk_recall') == result['approximate'].pop('topk_recall') == 1
  assert set(line['exact']) == set(line['approximate']) and set(result['exact']) == set(result['approximate'])
  assert result['exact']['nmse'] == result['approximate']['nmse']
