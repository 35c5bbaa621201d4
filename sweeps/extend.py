"""Lets the cells of a grid go on from finished cells of the ledger that had fewer tokens."""

import collections
import dataclasses
import functools
import json

from sae_jax import cell, extend, files, schema
from sweeps import grid, groups, ledger

_NO_SHORTER = 'no finished cell differs in train.tokens alone and has fewer'


def extended(sweep: grid.Sweep, store: ledger.Ledger, max_failures: int) -> tuple[grid.Sweep, str]:
  """The sweep with `train.extends` set where a cell can go on from a finished one, and a line for people.

  That one differs in `train.tokens` alone and has fewer. Of several that can be used the one with the most tokens is taken.
  The ids stay: an extended cell ends with the bits of one trained from the start. Cells that are finished, or have a
  checkpoint of their own, stay as they were registered. The line counts neither them nor cells that are not to be trained.
  """
  # The first launch finds no ledger.
  states = store.states(max_failures) if files.exists(files.join(store.path, schema.SWEEP)) else []
  known = {s.entry.id: s for s in states}
  finished: dict[str, list[cell.Cell]] = {}
  for s in states:
    if s.state == schema.DONE and s.entry.cell.one_curve:
      finished.setdefault(_curve(s.entry.cell), []).append(s.entry.cell)

  @functools.cache
  def why_anew(cell_id: str) -> str:
    return extend.why_anew(known[cell_id].entry.cell, store.folder(cell_id))

  def shorter(one: cell.Cell) -> tuple[str, str]:
    """The id of the cell to go on from, or nothing and why there is none."""
    if not one.one_curve:
      return '', extend.obstacle(one)
    fewer = [other for other in finished.get(_curve(one), []) if other.train.tokens < one.train.tokens]
    longest_first = [other.id for other in sorted(fewer, key=lambda other: -other.train.tokens)]
    usable = next((cell_id for cell_id in longest_first if not why_anew(cell_id)), '')
    return usable, '' if usable else why_anew(longest_first[0]) if fewer else _NO_SHORTER

  going_on = 0
  anew: collections.Counter[str] = collections.Counter()
  cells: list[tuple[grid.Overrides, cell.Cell]] = []
  for overrides, one in sweep.cells:
    s = known.get(one.id) or store.state(ledger.Entry(one.id, overrides, one), max_failures)
    if s.state in schema.FINISHED or groups.saved_steps(store, one.id):
      cells.append((overrides, _extending(one, one.train.extends or s.entry.cell.train.extends)))
      continue
    extends, why = (one.train.extends, '') if one.train.extends else shorter(one)
    cells.append((overrides, _extending(one, extends)))
    if s.state in schema.UNFINISHED and extends:
      going_on += 1
    elif s.state in schema.UNFINISHED:
      anew[why] += 1
  line = f'{going_on} cells go on from shorter ones, {anew.total()} are trained from the start'
  whys = '; '.join(f'{count}: {why}' for why, count in anew.items())
  return dataclasses.replace(sweep, cells=tuple(cells)), line + (f' ({whys})' if whys else '')


def _extending(one: cell.Cell, extends: str) -> cell.Cell:
  return dataclasses.replace(one, train=dataclasses.replace(one.train, extends=extends))


def _curve(one: cell.Cell) -> str:
  """Equal for cells that differ in their budget alone."""
  return json.dumps(one.identity() | {'train.tokens': 0}, sort_keys=True)
