"""The dearest operations of a compiled program: cycles times trips, bytes without an estimate, one branch of each conditional."""

import pytest

from sae_jax import plan
from sae_jax.ahead import dearest

CHIP = plan.CHIPS['v5p']
PROGRAM = """HloModule step
%fused (x: f32[512,4]) -> f32[512,4] {
  ROOT %inside = f32[512,4]{1,0} add(%x, %x), backend_config={"estimated_cycles":"1000000000"}
}
%body (p: (s32[], f32[512,4])) -> (s32[], f32[512,4]) {
  %x = f32[512,4]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %row = f32[1,4]{1,0} slice(%x), slice={[0:1], [0:4]}, backend_config={"estimated_cycles":"10"}
  %put = f32[512,4]{1,0} dynamic-update-slice(%x, %row, %i), backend_config={}
  %coded = bf16[64,2]{1,0} fusion(%x), kind=kOutput, calls=%fused, metadata={op_name="jit(step)/encode/dot"}, backend_config={"estimated_cycles":"700"}
}
%condition (p: (s32[], f32[512,4])) -> pred[] {
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}
%dear (x: f32[512,4]) -> f32[512,4] {
  %sorted = (f32[512,4]{0,1}, s32[512,4]{0,1}) sort(%x, %y), dimensions={1}, to_apply=%greater
  %copied = f32[512,4]{0,1} copy(%x), backend_config={"estimated_cycles":"3000"}
}
%cheap (x: f32[512,4]) -> f32[512,4] {
  %once = f32[512,4]{0,1} copy(%x), backend_config={"estimated_cycles":"2000"}
}
ENTRY %main (x: f32[512,4]) -> f32[512,4] {
  %a = f32[512,4]{1,0} parameter(0)
  %loop = (s32[], f32[512,4]) while(%t), condition=%condition, body=%body
  %choice = f32[512,4] conditional(%p, %a, %a), branch_computations={%cheap, %dear}
  %summed = f32[512,4] all-reduce(%a), replica_groups={{0,1}}, to_apply=%add
  ROOT %odd = f32[512,4] fusion(%a), kind=kCustom, calls=%fused, backend_config={"estimated_cycles":"9223372036854775807"}
}
"""


def test_operations_count_trips_bytes_and_the_dearest_branch():
  found = {o.name: o for o in dearest.operations(PROGRAM, CHIP)}
  assert set(found) == {'coded', 'copied', 'sorted', 'odd', 'put', 'row', 'less'}
  coded = found['coded']
  assert (coded.op, coded.shape, coded.source, coded.times) == ('fusion', 'bf16[64,2]', 'jit(step)/encode/dot', 7)
  assert coded.seconds == pytest.approx(7 * 700 / CHIP.clock) and coded.estimated
  matrix = 4 * 512 * 4
  for name, moved in {'sorted': 2 * matrix, 'odd': 2 * matrix, 'put': 7 * 2 * 16}.items():
    assert found[name].seconds == pytest.approx(moved / CHIP.memory_bandwidth) and not found[name].estimated
  costs = [o.seconds for o in found.values()]
  assert costs == sorted(costs, reverse=True) and dearest.total(found.values()) == pytest.approx(sum(costs))
