"""Reads the autoencoders of a ledger's finished cells to the last byte, for `sweeps.status --verify`."""

import dataclasses
import sys

from tqdm import tqdm

from sae_jax import cell_state, product, schema
from sweeps import ledger


def verify(store: ledger.Ledger, states: list[ledger.EntryState]) -> list[ledger.EntryState]:
  """The states, in which finished cells are invalid when their autoencoders cannot be believed.

  Says on standard error how far it is. Says there, too, what was read.
  """
  finished = [s for s in states if s.state in schema.FINISHED]
  sizes = [product.size(store.folder(s.entry.id), s.result or {}) for s in finished]
  broken: dict[str, ledger.EntryState] = {}
  unverified = 0
  # Only on a terminal: in a log a bar is thousands of lines.
  with tqdm(total=sum(sizes), desc='verify', unit='B', unit_scale=True, disable=None) as bar:
    for s in finished:
      try:
        unverified += not product.check(store.folder(s.entry.id), lambda piece: bar.update(len(piece)))
      except (schema.Broken, OSError) as error:
        if isinstance(error, FileNotFoundError) and s.result is not None and not s.result.get('artifact_bytes'):
          unverified += 1  # its result is from before results said that there was one
        else:
          found = cell_state.product_is_broken(error)
          broken[s.entry.id] = dataclasses.replace(s, state=found.state, reason=found.reason, result=None)
  said = f'verified the autoencoders of {len(finished) - unverified - len(broken)} cells, {sum(sizes):,} bytes'
  print(said + (f'; {unverified} have no digests' if unverified else ''), file=sys.stderr)
  if broken:
    print(
      f'{len(broken)} are damaged; python -m sweeps.retry --ledger={store.path} {" ".join(broken)} has them trained again',
      file=sys.stderr,
    )
  return [broken.get(s.entry.id, s) for s in states]
