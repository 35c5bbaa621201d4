"""Reads a compiled program's text: its collectives, what each sends, along which mesh axis and how often.

XLA's own cost analysis counts a loop's body once whatever its length, so loops are followed here.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

KINDS = (
  'all-reduce',
  'all-gather',
  'all-to-all',
  'reduce-scatter',
  'collective-permute',
  'collective-broadcast',
)
_BYTES = {'pred': 1, 'bf16': 2, 'f16': 2, 'f32': 4, 'f64': 8} | {
  f'{kind}{bits}': bits // 8 for kind in 'su' for bits in (8, 16, 32, 64)
}


SHAPE = re.compile(r'\b(?:pred|bf16|[fsu]\d+)\[[\d,]*\]')


class Collective(NamedTuple):
  """One collective instruction. Shapes and bytes are those of one chip."""

  op: str  # one of KINDS
  shapes: tuple[str, ...]  # of its results, e.g. ('f32[11,7]',)
  axis: str  # 'data', 'latent', 'data+latent', or 'other' for groups that are no mesh axes
  group: int  # chips that take part together
  bytes: int  # the array as every chip ends or begins with it: result, or operand of a reduce-scatter
  per_step: int | None  # executions, loops followed; None when a loop's length is not in the text
  in_loop: bool
  branch: str  # 'conditional/branch' of the outermost conditional around it, '' where every step runs it

  @property
  def wire_bytes(self) -> float:
    """What each chip of a ring sends in one execution."""
    others = self.group - 1
    passes = 2 if self.op == 'all-reduce' else 1
    if self.op in ('collective-permute', 'collective-broadcast'):
      return float(self.bytes)
    return passes * self.bytes * others / self.group


class Call(NamedTuple):
  """One computation that another runs."""

  computation: str
  times: int | None  # None when a loop's length is not in the text
  loop: bool
  branch: str  # 'conditional/branch' of an alternative, else ''


def shape_bytes(shape: str) -> int:
  """Bytes of e.g. 'f32[2048,7]'."""
  kind, dims = shape.split('[')
  return _BYTES.get(kind, 4) * math.prod(elements(shape)) if dims else 0


def elements(shape: str) -> list[int]:
  """The dimensions of e.g. 'f32[2048,7]'."""
  return [int(n) for n in shape.split('[')[1].rstrip(']').split(',') if n]


def collectives(text: str, axes: dict[str, int] | None = None) -> list[Collective]:
  """Every collective of a compiled module (`jax.stages.Compiled.as_text()`), in the order of the text.

  Args:
    text: the module after partitioning.
    axes: mesh axes and sizes in order; names the axis of each collective.
  """
  bodies = computations(text)
  entry = next(name for name, lines in bodies.items() if lines and lines[0] == 'ENTRY')
  reached: dict[str, list[tuple[int | None, bool, str]]] = {}
  _follow(bodies, entry, 1, False, '', reached)
  found = []
  for name, lines in bodies.items():
    if _continues(name, lines):
      continue
    for line in lines:
      match = re.search(rf'= (.*?) ({"|".join(KINDS)})(-start)?\(', line)
      if not match or name not in reached:
        continue
      shapes = SHAPE.findall(match[1])
      op, started = match[2], match[3]
      # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
      if op == 'all-reduce' and 'all-reduce-scatter' in name:
        op = 'reduce-scatter'
      elif op == 'reduce-scatter':
        shapes = shapes[len(shapes) // 2 :] if started else shapes
      elif started and op in ('all-gather', 'collective-permute'):  # (operands…, results…)
        shapes = shapes[len(shapes) // 2 :] if op == 'all-gather' else shapes[1:2]
      groups = _groups(line)
      group = len(groups[0]) if groups else math.prod((axes or {}).values())
      size = sum(shape_bytes(s) for s in shapes)
      if match[2] == 'reduce-scatter':
        size *= group
      times = [t for t, _, _ in reached[name]]
      found.append(
        Collective(
          op,
          tuple(shapes),
          _axis(groups, axes or {}),
          group,
          size,
          None if None in times else sum(t for t in times if t is not None),
          any(loop for _, loop, _ in reached[name]),
          '' if any(not branch for _, _, branch in reached[name]) else reached[name][0][2],
        )
      )
  return found


def sent(found: Iterable[Collective]) -> dict[str, float]:
  """Bytes that a chip sends in a step, by axis: of each conditional only the branch that sends most."""
  by_branch: dict[str, dict[str, float]] = {}
  for c in found:
    axes = by_branch.setdefault(c.branch, {})
    axes[c.axis] = axes.get(c.axis, 0.0) + c.wire_bytes * (c.per_step or 1)
  dearest: dict[str, dict[str, float]] = {}
  for branch, axes in by_branch.items():
    conditional = branch.split('/')[0]
    if sum(axes.values()) > sum(dearest.get(conditional, {}).values()):
      dearest[conditional] = axes
  names = dict.fromkeys(name for axes in dearest.values() for name in axes)
  return {name: sum(axes.get(name, 0.0) for axes in dearest.values()) for name in names}


def _continues(name: str, lines: list[str]) -> bool:
  """Whether a TPU fusion goes on with, or ends, a transfer that another began: all of them spell the collective."""
  return name.startswith('async_collective_fusion') or any('"AsyncCollectiveDone"' in line for line in lines)


def computations(text: str) -> dict[str, list[str]]:
  """The lines of each computation of a module, by its name. The first line of the entry is 'ENTRY'."""
  bodies: dict[str, list[str]] = {}
  name = ''
  for line in text.splitlines():
    if head := re.match(r'^(ENTRY )?%?([\w.\-]+) .*\{$', line):
      name = head[2]
      bodies[name] = ['ENTRY'] if head[1] else []
    elif name:
      bodies[name].append(line)
  return bodies


def _follow(
  bodies: dict[str, list[str]],
  name: str,
  times: int | None,
  loop: bool,
  branch: str,
  reached: dict[str, list[tuple[int | None, bool, str]]],
) -> None:
  reached.setdefault(name, []).append((times, loop, branch))
  for call in calls(bodies, name):
    if call.computation in bodies:
      inner = None if times is None or call.times is None else times * call.times
      _follow(bodies, call.computation, inner, loop or call.loop, branch or call.branch, reached)


def calls(bodies: dict[str, list[str]], name: str) -> Iterator[Call]:
  """What a computation runs, in the order of its lines."""
  for line in bodies[name]:
    if ' while(' in line:
      body, condition = re.search(r'body=%?([\w.\-]+)', line), re.search(r'condition=%?([\w.\-]+)', line)
      if body and condition:
        times = _trip_count(bodies, name, line, condition[1])
        yield Call(body[1], times, True, '')
        yield Call(condition[1], times, True, '')
      continue
    for called in re.findall(r'(?:to_apply|calls|called_computation)=%?([\w.\-]+)', line):
      yield Call(called, 1, False, '')
    alternatives = re.findall(r'(?:true|false)_computation=%?([\w.\-]+)', line)
    for branches in re.findall(r'branch_computations=\{([^}]*)\}', line):
      alternatives += re.findall(r'[\w.\-]+', branches)
    for called in alternatives:
      yield Call(called, 1, False, f'{line.split("=")[0].split()[-1].lstrip("%")}/{called}')


def _trip_count(bodies: dict[str, list[str]], name: str, line: str, condition: str) -> int | None:
  """Of a loop that counts up by one from zero, as `fori_loop` and `scan` do."""
  if known := re.search(r'known_trip_count[^}]*?n[":\s]+(\d+)', line):
    return int(known[1])
  lines = bodies.get(condition, [])
  limits = [int(n) for text in lines for n in re.findall(r's32\[\][^=]* constant\((\d+)\)', text)]
  if limits:
    return max(limits)
  # The limit may have been hoisted: the condition compares two members of the loop's tuple.
  members = [int(n) for text in lines for n in re.findall(r's32\[\].*get-tuple-element\(.*index=(\d+)', text)]
  operands = re.search(r' while\(%?([\w.\-]+)\)', line)
  inputs = _definition(bodies[name], operands[1]) if operands else ''
  names = re.findall(r'%([\w.\-]+)', inputs.split(' tuple(')[-1]) if ' tuple(' in inputs else []
  constants = [
    int(n)
    for i in members
    if i < len(names)
    for n in re.findall(r's32\[\][^=]* constant\((\d+)\)', _definition(bodies[name], names[i]))
  ]
  return max(constants) if constants and max(constants) > 0 else None


def _definition(lines: Sequence[str], name: str) -> str:
  return next((text for text in lines if re.match(rf'\s*(?:ROOT )?%?{re.escape(name)} = ', text)), '')


def _groups(line: str) -> list[tuple[int, ...]]:
  if pairs := re.search(r'source_target_pairs=\{(\{[\d,{}\s]*\})\}', line):
    return [tuple(int(n) for n in pair.split(',')) for pair in re.findall(r'\{([\d,]+)\}', pairs[1])]
  if listed := re.search(r'replica_groups=\{(\{[\d,{}\s]*\})\}', line):
    return [tuple(int(n) for n in group.split(',')) for group in re.findall(r'\{([\d,]+)\}', listed[1])]
  if iota := re.search(r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', line):
    shape, reshape = ([int(n) for n in iota[i].split(',')] for i in (1, 2))
    ids = np.arange(math.prod(reshape)).reshape(reshape)
    if iota[3]:
      ids = ids.transpose([int(n) for n in iota[3].split(',')])
    return [tuple(int(i) for i in row) for row in ids.reshape(shape)]
  return []


def _axis(groups: list[tuple[int, ...]], axes: dict[str, int]) -> str:
  """The mesh axes along which the members of every group differ."""
  wide = [name for name, size in axes.items() if size > 1]
  if not groups:
    return '+'.join(wide) or 'other'
  shape = tuple(axes.values())
  if not shape or max(max(g) for g in groups) >= math.prod(shape):
    return 'other'
  varying = set()
  for group in groups:
    places = np.stack(np.unravel_index(group, shape))
    varying |= {name for name, row in zip(axes, places, strict=True) if len(set(row.tolist())) > 1}
  expected = math.prod(axes[name] for name in varying)
  whole = all(len(group) == expected for group in groups)
  pairs = all(len(group) == 2 for group in groups)  # of a permutation
  return '+'.join(name for name in axes if name in varying) if varying and (whole or pairs) else 'other'
