"""Which rows of imported activations count, and which of them are held out.

Neighbours in a text are alike, and so are all tokens of a sequence. The last rows are held out, in whole sequences
or documents where there are any.
"""

import dataclasses

import numpy as np

from sae_jax.data.inputs import Source
from sae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
  """Rows that count, in order: the first `train` are trained on, the other `held_out` are not.

  Attributes:
    rows: their numbers among all rows, int64; None when all of them count.
    end: the first row, among all, that is not before the held-out ones.
  """

  train: int
  held_out: int
  rows: np.ndarray | None
  end: int

  def raw(self, counted_B: np.ndarray) -> np.ndarray:
    """Numbers among all rows of rows that count."""
    return counted_B if self.rows is None else self.rows[counted_B]


def split(
  sources: list[Source], mask: np.ndarray | None, documents: np.ndarray | None, drop_first: int, held_out: int
) -> Split:
  """Holds out at least `held_out` rows from the end.

  Args:
    sources: what is imported.
    mask: which rows count, bool over all of them; None for all.
    documents: how many rows each has, in order, where they are known. They are held out whole instead of sequences.
    drop_first: how many of the first tokens of every sequence, masked ones passed over, do not count.
    held_out: exactly so many rows where no source has sequences. Otherwise the fewest last sequences that hold them.

  Raises `UserError` where nothing is left to train on, and for `drop_first` where there are no sequences.
  """
  total = sum(piece.tokens for source in sources for piece in source.pieces)
  lengths = _lengths(sources)
  lengths = documents if lengths is None else lengths
  if drop_first and lengths is None:
    raise UserError(
      f'--drop_first={drop_first} needs sequences, [sequences, tokens, width], or --documents; these are rows alone'
    )
  if lengths is None and mask is None:
    return Split(*_ends(total, total - held_out, held_out, 'rows'), rows=None, end=total - held_out)
  kept = np.ones(total, bool) if mask is None else mask
  starts = _starts(lengths, total)
  before = np.concatenate([[0], np.cumsum(kept)])  # rows that count before each
  if drop_first and lengths is not None:
    kept = kept & (before[:-1] - np.repeat(before[starts], lengths) >= drop_first)
    before = np.concatenate([[0], np.cumsum(kept)])
  count = int(before[-1])
  starts = starts if documents is None else _starts(documents, total)
  # The last sequence or document whose first row leaves at least `held_out` rows that count.
  fits = np.flatnonzero(count - before[starts] >= held_out)
  cut = int(starts[fits[-1]]) if len(fits) else 0
  train, held = _ends(count, int(before[cut]), held_out, 'rows that count' if lengths is None else 'tokens')
  return Split(train, held, rows=None if kept.all() else np.flatnonzero(kept), end=cut)


def _starts(lengths: np.ndarray | None, total: int) -> np.ndarray:
  return np.arange(total) if lengths is None else np.concatenate([[0], np.cumsum(lengths)[:-1]])


def _ends(count: int, train: int, held_out: int, what: str) -> tuple[int, int]:
  if not 2 <= held_out < count:
    raise UserError(f'--held_out={held_out} of {count} {what} is not in [2, {count - 1}]; choose another number')
  if train < 1:
    raise UserError(
      f'--held_out={held_out} of {count} {what} takes every sequence or document, and whole ones are held out; lower it'
    )
  return train, count - train


def _lengths(sources: list[Source]) -> np.ndarray | None:
  """Tokens of every sequence; None where no source has sequences. Rows of a source without them stand alone."""
  pieces = [piece for source in sources for piece in source.pieces]
  if all(len(piece.shape) == 2 and piece.lengths is None for piece in pieces):
    return None
  parts = []
  for piece in pieces:
    if len(piece.shape) == 3:
      parts.append(np.full(piece.shape[0], piece.shape[1]))
    else:
      parts.append(piece.lengths if piece.lengths is not None else np.ones(piece.tokens, np.int64))
  return np.concatenate(parts).astype(np.int64)
