"""Lets the cells of a grid go on from finished cells of the ledger that had fewer tokens."""

import dataclasses
import json

from sae_jax import cell, schema
from sweeps import grid, ledger


def extended(sweep: grid.Sweep, store: ledger.Ledger, max_failures: int) -> grid.Sweep:
  """The sweep with `train.extends` set where a finished cell differs in `train.tokens` alone and has fewer.

  The one with the most tokens is taken. The ids stay: an extended cell ends with the bits of one trained from the start.
  """
  shorter: dict[str, list[cell.Cell]] = {}
  for state in store.states(max_failures):
    if state.state == schema.DONE and state.entry.cell.one_curve:
      shorter.setdefault(_curve(state.entry.cell), []).append(state.entry.cell)

  def from_shorter(one: cell.Cell) -> cell.Cell:
    fewer = [other for other in shorter.get(_curve(one), []) if other.train.tokens < one.train.tokens]
    if one.train.extends or not fewer:
      return one
    longest = max(fewer, key=lambda other: other.train.tokens)
    return dataclasses.replace(one, train=dataclasses.replace(one.train, extends=longest.id))

  return dataclasses.replace(sweep, cells=tuple((overrides, from_shorter(one)) for overrides, one in sweep.cells))


def _curve(one: cell.Cell) -> str:
  """Equal for cells that differ in their budget alone."""
  return json.dumps(one.identity() | {'train.tokens': 0}, sort_keys=True)
