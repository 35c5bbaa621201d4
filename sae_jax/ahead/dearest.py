"""The operations of a compiled step that cost most, by the compiler's own estimate where it has one.

A TPU's compiler writes estimated cycles on most operations. Every other operation, and all of a GPU's, counts the time
that its operands and results need at the chip's memory bandwidth. A sort or a kernel takes no less, and often far more.
A gather may take less, for it reads a part of its operand.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from sae_jax.ahead import hlo

# No work of their own, or work that is counted with what they call. The plan counts collectives.
_FREE = {
  *('parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'after-all', 'while', 'conditional', 'call'),
  *('async-start', 'partition-id', *hlo.KINDS, *(f'{kind}-start' for kind in hlo.KINDS)),
}
_UNKNOWN = 2**62  # the TPU's compiler writes a larger number where it cannot tell


class Operation(NamedTuple):
  """One instruction of one chip's program."""

  name: str
  op: str  # fusion, sort, custom-call, …
  shape: str  # of its first result
  source: str  # what jax calls it
  times: int  # executions a step; a loop counts once where the text does not tell its length
  seconds: float  # of all executions
  estimated: bool  # by the compiler; else by bytes


def operations(text: str, chip: Any) -> list[Operation]:
  """What a step executes, the dearest first. Of the branches of a conditional the dearest counts.

  Args:
    text: a compiled module (`jax.stages.Compiled.as_text()`).
    chip: `clock` in cycles/s and `memory_bandwidth` in bytes/s, as of `plan.CHIPS`.
  """
  bodies = hlo.computations(text)
  lines = [line for body in bodies.values() for line in body if ' fusion(' in line]
  fused = {name for line in lines for name in re.findall(r' calls=%?([\w.\-]+)', line)}

  def run(name: str, times: int) -> list[Operation]:
    found, branches = list(_own(bodies[name], times, chip)), {}
    for call in hlo.calls(bodies, name):
      if call.computation not in bodies or call.computation in fused:
        continue
      inside = run(call.computation, times * (call.times or 1))
      if call.branch:
        branches.setdefault(call.branch.partition('/')[0], []).append(inside)
      else:
        found += inside
    return found + [o for alternatives in branches.values() for o in max(alternatives, key=total)]

  entry = next(name for name, body in bodies.items() if body and body[0] == 'ENTRY')
  return sorted(run(entry, 1), key=lambda o: -o.seconds)


def total(found: Iterable[Operation]) -> float:
  """Seconds of all."""
  return sum(o.seconds for o in found)


def _own(body: list[str], times: int, chip: Any) -> Iterator[Operation]:
  sizes: dict[str, int] = {}
  for line in body:
    match = re.match(r'\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(([^)]*)', line)
    if not match:
      continue
    name, shapes, op, operands = match.groups()
    found = hlo.SHAPE.findall(shapes)
    sizes[name] = sum(map(hlo.shape_bytes, found))
    if op in _FREE or op.endswith('-done'):
      continue
    written = re.search(r'"estimated_cycles":"(\d+)"', line)
    cycles = int(written[1]) if written else 0
    estimated = 0 < cycles < _UNKNOWN
    read = [sizes.get(operand, 0) for operand in re.findall(r'%([\w.\-]+)', operands)]
    moved = 2 * sum(read[1:2]) if op == 'dynamic-update-slice' else sizes[name] + sum(read)  # updates are in place
    seconds = cycles / chip.clock if estimated else moved / chip.memory_bandwidth
    source = re.search(r'op_name="([^"]*)"', line)
    yield Operation(name, op, ''.join(found[:1]), source[1] if source else '', times, times * seconds, estimated)
