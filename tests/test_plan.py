"""Planning: collectives read from a compiled step, bytes by hand, and the sixteen-million case for a pod."""

import dataclasses
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import gpt4_16m, tiny
from sae_jax import config, flops, plan, sharding
from sae_jax.ahead import compile, hlo
from sae_jax.codes import Elementwise
from sae_jax.errors import UserError
from sae_jax.families.family import NAMES, family
from tests import cells

ROOT = pathlib.Path(__file__).parents[1]
B, D, F, K = 40, 11, 88, 13
KEYS = {'memory_fraction', 'collectives', 'flops', 'seconds', 'bound'}  # what other tools read


def cell(**overrides) -> config.Cell:
  sizes = {
    'sae.d_model': D,
    'sae.n_latents': F,
    'sae.k': K,
    'train.batch_tokens': B,
    'train.tokens': 23 * B,
    'eval.batch_tokens': 40,
    'data.planted.n_features': 61,
    'mesh.data': 2,
    'mesh.latent': 4,
  }
  return config.resolve(config.override(tiny.get_config(), sizes | overrides))


@pytest.fixture(scope='module')
def counted_plan():
  config_ = cell(**{'mesh.row_chunks': 4, 'mesh.exchange': 'count', 'train.compute_dtype': 'bfloat16'})
  compiled = compile.compile_step(config_, sharding.make_mesh(config_.mesh))
  return config_, plan.account(config_, 'v5e:2x4', plan.CHIPS['v5e'], compiled)


def test_plan_names_axis_bytes_and_loop_of_each_collective(counted_plan):
  _, made = counted_plan
  of = [(c['op'], c['axis'], c['bytes'], c['per_step'], c['conditional']) for c in made.collectives]
  weights, rows = 4 * (F // 4) * D, B // 2
  assert of.count(('reduce-scatter', 'data', weights, 1, False)) == 2
  assert of.count(('all-gather', 'data', weights, 1, False)) == 2
  assert of.count(('all-reduce', 'latent', 4 * rows * D, 1, False)) == 1  # partial reconstructions
  for in_auxk, selections in ((False, 1), (True, 2)):  # AuxK selects from listed candidates, or from all latents
    assert of.count(('all-reduce', 'latent', 4 * rows, 32, in_auxk)) == selections  # one count a row and round
    assert of.count(('all-gather', 'latent', 4 * 4 * rows, 1, in_auxk)) == selections  # ties of four shards
  sent = [
    sum(c['wire_bytes'] * c['per_step'] for c in made.collectives if c['axis'] == 'data' and keep(c))
    for keep in (lambda c: not c['conditional'], lambda c: True)
  ]
  assert sent[0] < made.network_bytes['data'] < sent[1]  # one branch of AuxK, not all
  assert set(made.network_bytes) <= {'data', 'latent', 'data+latent'}


def test_plan_adds_up(counted_plan):
  config_, made = counted_plan
  record = json.loads(made.to_json())
  assert set(record) >= KEYS and all({'op', 'axis', 'bytes', 'per_step'} <= set(c) for c in record['collectives'])
  parts = made.memory
  assert parts['params'] + parts['moments'] + parts['ema'] + parts['counters'] + parts['batch'] == pytest.approx(
    parts['arguments'], abs=200
  )
  assert parts['params'] == 4 * (2 * F * D + F) // 8 + 4 * D  # rows over all eight devices, b_pre on each
  assert made.memory_fraction == made.memory_total / (16 * 2**30)
  assert made.seconds == max(made.seconds_by.values()) == made.seconds_by[made.bound]
  assert made.chip_hours == pytest.approx(made.seconds * config_.train.steps * 8 / 3600)
  assert made.tokens_per_s == pytest.approx(B / made.seconds)


def test_plan_adds_nothing_in_bfloat16_and_carries_no_batch_by_latents(counted_plan):
  _, made = counted_plan
  assert not made.warnings
  for c in made.collectives:
    assert not any(shape.startswith('bf16') for shape in c['shapes']), c


def test_plan_warns_of_what_carries_batch_by_latents():
  config_ = config.resolve(gpt4_16m.get_config())
  rows, width = 2**15, 2**17
  for shape in (
    f'f32[{rows},{width}]',
    f'f32[{rows},{128 * 4096}]',
    f'bf16[{rows // 16},{2**24}]',
    f's32[128,{rows},4096]',
  ):
    assert plan.carries_batch_by_latents((shape,), config_), shape
  for shape in (
    f'f32[{rows},8192]',
    f'f32[{width},8192]',
    f's32[{rows}]',
    f'f32[{rows},256]',
    f'f32[2,{width},8192]',
  ):
    assert not plan.carries_batch_by_latents((shape,), config_), shape
  as_many_rows_as_wide = dataclasses.replace(config_, mesh=dataclasses.replace(config_.mesh, row_chunks=4))
  assert not plan.carries_batch_by_latents((f'f32[{width},8192]',), as_many_rows_as_wide)


def test_chip_counts_sum_to_those_of_the_step():
  one, many = cell(**{'mesh.data': 1, 'mesh.latent': 1}), cell()
  useful = flops.step_flops(F, K, D, B)['useful']
  for config_ in (one, many):
    chips = config_.mesh.data * config_.mesh.latent
    parts = flops.chip_parts(config_, aux=False)
    total = chips * sum(p['useful'] for name, p in parts.items() if name != 'pre_bias_gradient')
    assert total == pytest.approx(useful - 2 * F * D)
    assert parts['encode']['executed'] == 2 * B * F * D / chips
  chunked = dataclasses.replace(many, mesh=dataclasses.replace(many.mesh, row_chunks=4))
  parts, whole = flops.chip_parts(chunked, aux=True), flops.chip_parts(many, aux=True)
  assert parts.keys() == whole.keys() and 'aux_encode' not in parts  # AuxK's candidates are of the same pass
  assert parts['encode']['bytes'] - whole['encode']['bytes'] == 3 * 4 * D * F / 4  # the encoder, three more times
  assert parts['optimizer']['bytes'] == flops.state_pass_bytes(F / 4, D) / 2


def test_a_family_that_offers_more_than_k_counts_those_slots():
  base = {'mesh.data': 1, 'mesh.latent': 1, 'sae.k_aux': 0}
  topk, multi = (
    flops.chip_parts(cell(**base, **{'sae.activation': name}), aux=False) for name in ('topk', 'multitopk')
  )
  offered = min(4 * K, F)
  for name in ('decode', 'code_gradient', 'decoder_gradient', 'encoder_gradient'):
    assert topk[name]['executed'] == 0 and multi[name]['executed'] == 2 * B * (offered - K) * D
    assert multi[name]['useful'] == topk[name]['useful'] and multi[name]['bytes'] > topk[name]['bytes']


def test_every_product_of_a_dense_family_is_counted():
  for name in (name for name in NAMES if family(name).penalised):
    mathematics = family(name).mathematics()
    if isinstance(mathematics, Elementwise):
      assert family(name).heads == len(mathematics.heads)
    counted = []
    for chunks in (1, 4):
      size = {'mesh.data': 1, 'mesh.latent': 1, 'mesh.row_chunks': chunks}
      parts = flops.chip_parts(cell(**size, **cells.family_keys(name)), aux=False)
      counted.append(
        {key: part['executed'] / (2 * B * F * D) for key, part in parts.items() if key != 'pre_bias_gradient'}
      )
    assert sum(counted[0].values()) == {'gated': 7}.get(name, 5)
    assert sum(counted[1].values()) == {'gated': 8}.get(name, 6)  # encoded again on the way back


PROGRAM = """HloModule step, num_partitions=8
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %r = f32[] add(%a, %b)
}
%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %sum = f32[4]{0:T(128)} all-reduce(%x), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
}
%condition (p: (s32[], f32[4], s32[])) -> pred[] {
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} get-tuple-element(%p), index=2
  ROOT %less = pred[] compare(%i, %n), direction=LT
}
%outer (p: (s32[])) -> (s32[]) {
  %zero = s32[] constant(0)
  %limit = s32[]{:T(128)} constant(7)
  %init = (s32[], f32[4], s32[]) tuple(%zero, %x, %limit)
  %inner = (s32[], f32[4], s32[]) while(%init), condition=%condition, body=%body
}
%outer_condition (p: (s32[])) -> pred[] {
  %three = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %three), direction=LT
}
%dead (x: f32[4]) -> f32[8] {
  %gathered = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}
%alive (x: f32[4]) -> f32[8] {
}
%async_collective_fusion.3 (x: f32[4]) -> f32[8] {
  %going = f32[8]{0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
}
%ending (x: f32[4]) -> f32[8] {
  %again = f32[8]{0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  ROOT %done = f32[8]{0} custom-call(%again), custom_call_target="AsyncCollectiveDone"
}
%unknown (p: (s32[])) -> (s32[]) {
  %moved = f32[4]{0} collective-permute(%x), source_target_pairs={{0,4},{4,0}}
}
%unknown_condition (p: (s32[])) -> pred[] {
}
ENTRY %main (x: f32[4]) -> f32[8] {
  %loop = (s32[]) while(%t), condition=%outer_condition, body=%outer
  %choice = f32[8] conditional(%p, %a, %b), branch_computations={%alive, %dead}
  %overlapped = f32[8] fusion(%x), kind=kOutput, calls=%async_collective_fusion.3
  %ended = f32[8] fusion(%x), kind=kCustom, calls=%ending
  %scattered = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  %forever = (s32[]) while(%t), condition=%unknown_condition, body=%unknown
}
"""


def test_collectives_follow_loops_branches_and_groups():
  listed = hlo.collectives(PROGRAM, {'data': 2, 'latent': 4})
  found = {c.op: c for c in listed}
  assert len(listed) == 4  # one all-gather, though three fusions spell it
  rounds = found['all-reduce']
  assert (rounds.per_step, rounds.axis, rounds.group, rounds.bytes) == (21, 'latent', 4, 16)
  assert rounds.in_loop and not rounds.branch and rounds.wire_bytes == 2 * 16 * 3 / 4
  gathered = found['all-gather']
  assert (gathered.shapes, gathered.axis, gathered.per_step) == (
    ('f32[8]',),
    'data',
    1,
  ) and gathered.branch == 'choice/dead'
  scattered = found['reduce-scatter']
  assert (scattered.axis, scattered.bytes, scattered.wire_bytes) == ('data+latent', 64, 56)
  assert found['collective-permute'].per_step is None and found['collective-permute'].axis == 'data'


def test_sent_bytes_are_those_of_the_dearest_branch_of_each_conditional():
  def moved(bytes_, axis, branch):
    return hlo.Collective('all-gather', (), axis, 2, 2 * bytes_, 3, False, branch)

  found = [
    moved(7, 'data', ''),
    moved(5, 'latent', 'first/few'),
    moved(2, 'data', 'first/few'),
    moved(6, 'latent', 'first/many'),
    moved(11, 'latent', 'second/many'),
  ]
  assert hlo.sent(found) == {'data': 3 * (7 + 2), 'latent': 3 * (5 + 11)}
  assert hlo.sent([]) == {}


def test_impossible_topologies_are_refused():
  with pytest.raises(UserError, match=r"'v9:2x2' is of no known chip; use v5e, v5p, v6e, h100"):
    plan.plan(cell(), 'v9:2x2')
  with pytest.raises(UserError, match=r'h100:9.* is not h100:N'):
    compile.devices('h100:9')


def test_mesh_follows_the_slice():
  chip = plan.CHIPS['v5p']
  assert plan.with_mesh(cell(), 8, chip, None).mesh == cell().mesh  # as many devices as it asks for
  assert plan.with_mesh(cell(), 8, chip, 2).mesh == dataclasses.replace(cell().mesh, data=4, latent=2)
  assert plan.with_mesh(cell(), 4, chip, None).mesh.latent == 1  # small: whole on each chip
  with pytest.raises(UserError, match='latent_shards=3 does not divide 8'):
    plan.with_mesh(cell(), 8, chip, 3)
  big = dataclasses.replace(config.resolve(gpt4_16m.get_config()), mesh=cell().mesh)
  assert plan.with_mesh(big, 512, chip, None).mesh.latent > 32  # 1.1 TB of weights, twice, on 95 GiB each


@pytest.mark.tpu
def test_a_second_plan_does_not_read_programs_of_absent_chips(tmp_path, monkeypatch):
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(tmp_path / 'kept'))
  command = [sys.executable, '-m', 'sae_jax.plan', '--config=experiments/tiny.py', '--topology=v5e:2x2']
  for _ in range(2):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]


@pytest.mark.tpu
def test_sixteen_million_latents_fit_a_v5p_pod(tmp_path):
  out = tmp_path / 'plan.json'
  command = [sys.executable, '-m', 'sae_jax.plan', '--config=experiments/gpt4_16m.py', '--topology=v5p:8x8x8']
  done = subprocess.run([*command, f'--json={out}'], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
  record = json.loads(out.read_bytes())
  assert set(record) >= KEYS and record['chips'] == 512
  assert record['memory_fraction'] <= 0.6
  assert not record['warnings']  # no B x n, no bfloat16 sum, no loop of unknown length
  shares = [o['share'] for o in record['operations']]
  assert shares == sorted(shares, reverse=True) and 0.3 < sum(shares) <= 1
  first = record['operations'][0]
  assert first['estimated'] and first['op'] == 'fusion' and first['source'].startswith('jit(step)/shard_map')
  assert any(o['times'] > 1 for o in record['operations'])  # loops were followed
  config_ = config.resolve(gpt4_16m.get_config())
  rows, width = config_.train.batch_tokens // config_.mesh.data, config_.sae.n_latents // config_.mesh.latent
  for c in record['collectives']:
    assert c['axis'] in ('data', 'latent', 'data+latent') and c['per_step'] in (1, 32), c
    sizes = [int(np.prod(hlo.elements(shape))) for shape in c['shapes']]
    assert max(sizes) < rows * width / 3, c
    reduces = c['op'] in ('all-reduce', 'reduce-scatter')
    assert not reduces or all(shape.split('[')[0] in ('f32', 's32', 'u32') for shape in c['shapes']), c
