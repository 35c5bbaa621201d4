"""One pass over imported rows before anything is written: what cannot be trained on, what would flatter the NMSE."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from sae_jax.data import soundness
from sae_jax.data.inputs import Source
from sae_jax.data.matrix import Piece
from sae_jax.data.split import Split
from sae_jax.errors import UserError

_SLICE = 2**20  # numbers that are looked at once


class Found(NamedTuple):
  """What the rows that count are like.

  Attributes:
    mean_norm: mean Euclidean norm of the training rows as they came.
    repeated: held-out rows that occur among the training rows too.
    heaviest_share: of the squares of all training rows, what the largest hundredth of them holds.
  """

  mean_norm: float
  repeated: int
  heaviest_share: float


def scan(sources: list[Source], split: Split, normalize: str) -> Found:
  """Raises `UserError` for a row that is not finite, or has no direction although rows are to be normalised, for
  numbers that float32 does not hold, for rows that are all alike, and for two sources of the same rows.
  """
  pieces = [piece for source in sources for piece in source.pieces]
  owners = [i for i, source in enumerate(sources) for _ in source.pieces]
  width = pieces[0].shape[-1]
  keys_D = np.random.Philox(key=width).random_raw(width) | np.uint64(1)
  moments = {'held-out': _Moments(), 'training': _Moments()}
  sums = np.zeros((len(sources), 2), np.uint64)  # of hashes, and of rows: the same for the same rows in any order
  total = sum(piece.tokens for piece in pieces)
  bar = tqdm(total=total, desc='check', unit='row', unit_scale=True, disable=None)

  def hashes(name: str, first: int, stop: int) -> Iterator[np.ndarray]:
    for i, piece, rows_B in _slices(pieces, split, first, stop, max(1, _SLICE // width)):
      x_BD = _checked(piece, rows_B, normalize)
      hash_B = x_BD.view(np.uint32).astype(np.uint64) @ keys_D
      sums[owners[i]] += np.array([hash_B.sum(dtype=np.uint64), len(hash_B)], np.uint64)
      moments[name].add(x_BD)
      bar.update(len(rows_B))
      yield hash_B

  with bar:
    held, copies = np.unique(np.concatenate(list(hashes('held-out', split.end, total))), return_counts=True)
    hit = np.zeros(len(held), bool)
    for hash_B in hashes('training', 0, split.end):
      at = np.minimum(np.searchsorted(held, hash_B), len(hit) - 1)
      hit[at[held[at] == hash_B]] = True
  _check_twins(sources, sums)
  for name, found in moments.items():
    where, remedy = f'the {found.rows} {name} rows', 'look at what wrote them, or take other rows'
    soundness.check_varies(where, found.variance, found.squares / found.rows, remedy)
  trained = moments['training']
  return Found(trained.norms / split.train, int(copies[hit].sum()), trained.heaviest_share())


class _Moments:
  """Sums over rows, in float64."""

  def __init__(self):
    self.rows, self.norms, self.squares = 0, 0.0, 0.0
    self.square_of_rows: list[np.ndarray] = []
    self.sum_D: np.ndarray | float = 0.0

  def add(self, x_BD: np.ndarray) -> None:
    x_BD = x_BD.astype(np.float64)
    square_B = np.square(x_BD).sum(axis=1)
    self.square_of_rows.append(square_B)
    self.rows += len(x_BD)
    self.norms += float(np.sqrt(square_B).sum())
    self.squares += float(square_B.sum())
    self.sum_D = self.sum_D + x_BD.sum(axis=0)

  def heaviest_share(self) -> float:
    square_B, count = np.concatenate(self.square_of_rows), self.rows // 100
    return 0.0 if not count else float(np.partition(square_B, -count)[-count:].sum() / self.squares)

  @property
  def variance(self) -> float:
    mean_D = self.sum_D / self.rows
    return self.squares / self.rows - float(np.sum(mean_D * mean_D))


def _slices(
  pieces: list[Piece], split: Split, first: int, stop: int, step: int
) -> Iterator[tuple[int, Piece, np.ndarray]]:
  """Rows first..stop that count, some at a time: the number of their piece, the piece, and their numbers in it."""
  offset = 0
  for i, piece in enumerate(pieces):
    start, end = max(first, offset), min(stop, offset + piece.tokens)
    for at in range(start, end, step):
      rows_B = np.arange(at, min(end, at + step))
      if split.rows is not None:
        inside = np.searchsorted(split.rows, (at, min(end, at + step)))
        rows_B = split.rows[inside[0] : inside[1]]
      if len(rows_B):
        yield i, piece, rows_B - offset
    offset += piece.tokens


def _checked(piece: Piece, rows_B: np.ndarray, normalize: str) -> np.ndarray:
  """Rows [B, D] as float32, every one of them fit to be stored."""
  raw_BD = piece.take(rows_B)
  with np.errstate(over='ignore'):  # a float64 beyond float32 becomes infinite and is reported with its row
    x_BD = np.ascontiguousarray(raw_BD, np.float32)
  constant_B = (x_BD == x_BD[:, :1]).all(axis=1) & (normalize == 'center_unit')
  if raw_BD.dtype.itemsize > 4 and np.isfinite(x_BD).all():
    remedy = 'multiply the activations by a constant before they are saved'
    soundness.check_rounding(piece.name, *soundness.lost_squares(raw_BD, x_BD), 'float32', remedy)
  for bad_B, problem, remedy in (
    (~np.isfinite(x_BD).all(axis=1), 'holds NaN or infinity', 'remove it'),
    (
      constant_B,
      'is constant and has no direction',
      'remove padding rows, give --mask or use --normalize=none',
    ),
  ):
    if bad_B.any():
      raise UserError(f'{piece.where(int(rows_B[np.argmax(bad_B)]))} {problem}; {remedy}')
  return x_BD


def _check_twins(sources: list[Source], sums: np.ndarray) -> None:
  seen: dict[tuple[int, int], str] = {}
  for source, (hashed, count) in zip(sources, sums.tolist(), strict=True):
    if count and (twin := seen.setdefault((hashed, count), source.name)) != source.name:
      raise UserError(f'{twin} and {source.name} hold the same rows; name one of them, or rows count double')
