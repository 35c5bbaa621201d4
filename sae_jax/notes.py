"""What a valid configuration says and does not do: keys that its source does not read, tokens that make no whole batch."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sae_jax import config
from sae_jax.config import Cell

_PLANTED = ('n_features', 'active', 'exponent', 'noise', 'seed')
# The data keys that each source does not read. A store's facts are compared with the keys where it is opened.
_UNREAD = {
  'planted': (
    'subject',
    'site',
    'text',
    'path',
    'epochs',
    'normalize',
    'window_tokens',
    'block_windows',
    'store_tokens',
    'held_out_tokens',
    'dtype',
  ),
  'store': tuple(f'planted.{key}' for key in _PLANTED),
  'live': ('path', 'identity', *(f'planted.{key}' for key in _PLANTED)),
}
_READS = {
  'planted': 'data.planted and data.seed',
  'store': 'data.path and the facts in its store.json',
  'live': 'data.subject, data.site, data.text and the order',
}


@functools.cache
def _usual(source: str) -> dict[str, Any]:
  return config.defaults(source)


def of(cell: Cell) -> list[str]:
  """A line for each finding; none for a cell whose every key counts."""
  flat, source = cell.flat(), cell.data.source
  usual = _usual(source)
  found = []
  unread = [key for key in (f'data.{key}' for key in _UNREAD[source]) if flat[key] != usual[key]]
  if unread:
    values = ', '.join(f'{key}={flat[key]!r}' for key in unread)
    found.append(f'{values}: not read, for data.source={source!r} takes {_READS[source]}')
  if cell.sae.selection == 'exact' and cell.sae.recall_target != usual['sae.recall_target']:
    found.append(f"sae.recall_target={cell.sae.recall_target}: not read, for sae.selection='exact' finds all")
  tokens, batch, steps = cell.train.tokens, cell.train.batch_tokens, cell.train.steps
  if left := tokens - steps * batch:
    found.append(
      f'train.tokens={tokens}: {steps * batch} count, for {steps} batches of train.batch_tokens={batch} are whole and '
      f'{left} tokens are left over'
    )
  return found


def of_all(cells: Iterable[Cell]) -> list[str]:
  """The findings of many cells, each once, with the number of cells where those are not all."""
  each: Sequence[list[str]] = [of(cell) for cell in cells]
  counts = Counter(line for lines in each for line in lines)
  return [line if count == len(each) else f'{line} (in {count} of {len(each)} cells)' for line, count in counts.items()]
