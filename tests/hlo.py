"""Reads a compiled program's text: its collectives, and which of them sit inside a loop body."""

import re
from typing import NamedTuple

_KINDS = (
  'all-reduce',
  'all-gather',
  'all-to-all',
  'reduce-scatter',
  'collective-permute',
  'collective-broadcast',
)


class Collective(NamedTuple):
  kind: str
  results: list[str]  # e.g. ['f32[11,7]']
  in_loop: bool


def collectives(text: str) -> list[Collective]:
  """Every collective of a compiled module (`jax.stages.Compiled.as_text()`)."""
  bodies: dict[str, list[str]] = {}
  name = ''
  for line in text.splitlines():
    if head := re.match(r'^(?:ENTRY )?%?([\w.\-]+) .*\{$', line):
      name = head[1]
      bodies[name] = []
    elif name:
      bodies[name].append(line)
  looped, queue = set(), []
  for lines in bodies.values():
    for line in lines:
      queue += re.findall(r'(?:body|condition)=%?([\w.\-]+)', line) if ' while(' in line else []
  while queue:
    called = queue.pop()
    if called not in looped:
      looped.add(called)
      for line in bodies.get(called, []):
        queue += re.findall(r'(?:to_apply|calls|body|condition)=%?([\w.\-]+)', line)
        for branches in re.findall(r'branch_computations=\{([^}]*)\}', line):
          queue += re.findall(r'[\w.\-]+', branches)
  found = []
  for name, lines in bodies.items():
    for line in lines:
      if m := re.search(rf'= (.*?) ({"|".join(_KINDS)})(?:-start)?\(', line):
        found.append(Collective(m[2], re.findall(r'\w+\[[\d,]*\]', m[1]), name in looped))
  return found
