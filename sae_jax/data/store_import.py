"""A store from activations that are already on disk, of any size, in memory of a few blocks."""

import argparse
import pathlib
from typing import Any

import numpy as np
from tqdm import tqdm

from sae_jax import __version__
from sae_jax.data import inputs, order, soundness, store_writer
from sae_jax.data.matrix import Piece
from sae_jax.data.normalize import KINDS
from sae_jax.data.scan import scan
from sae_jax.data.split import split
from sae_jax.errors import UserError

_BLOCK_BYTES = 2**26  # of a block on disk; importing holds about six times that
_BLOCK_TOKENS = 32_768  # at most; more make a block no quicker to read
_SLICE = 2**20  # numbers that are gathered at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """The flags of `import_arrays`, by the names of its arguments."""
  parser.add_argument(
    '--from',
    dest='sources',
    metavar='NAME',
    nargs='+',
    required=True,
    help=f'{inputs.FORMS}; :NAME takes one tensor, column or layer of several; patterns in quotes; @FILE for a list. '
    'They are joined in the order given',
  )
  parser.add_argument('--out', metavar='DIR', required=True, help='an empty folder; run again to resume')
  parser.add_argument(
    '--mask',
    dest='masks',
    metavar='NAME',
    nargs='+',
    default=[],
    help='1 for tokens and 0 for padding, in the shape of the activations without their width; one a source',
  )
  parser.add_argument(
    '--documents',
    metavar='NAME',
    nargs='+',
    default=[],
    help='the number of the document of every row, or of every sequence; documents are held out whole; one a source',
  )
  parser.add_argument(
    '--drop_first', type=int, default=0, help='leave out so many first tokens of every sequence (%(default)s)'
  )
  parser.add_argument(
    '--held_out',
    type=int,
    default=16_384,
    help='the last so many rows are held out; of sequences the last ones that hold them (%(default)s)',
  )
  parser.add_argument(
    '--normalize',
    default='center_unit',
    choices=KINDS,
    help='center_unit: mean 0 and norm 1 for every row; scale: one number, so that the mean norm is 1 (%(default)s)',
  )
  parser.add_argument('--seed', type=int, default=0, help='of the shuffle; data.seed of the cells (%(default)s)')
  parser.add_argument('--dtype', default='float16', choices=('float16', 'float32'), help='on disk (%(default)s)')
  parser.add_argument(
    '--block_tokens',
    type=int,
    default=None,
    help=f'rows written and checked at once ({_BLOCK_TOKENS}, fewer where that is more than 64 MiB)',
  )
  parser.add_argument('--subject', default='', help='recorded only: which model the rows come from')
  parser.add_argument('--site', default='', help='recorded only: where in it')


def import_arrays(
  *,
  sources: list[str],
  out: str,
  held_out: int,
  normalize: str,
  seed: int,
  dtype: str,
  block_tokens: int | None = None,
  subject: str = '',
  site: str = '',
  masks: list[str] | None = None,
  documents: list[str] | None = None,
  drop_first: int = 0,
) -> None:
  """Writes the rows of `sources` to the store `out`; resumes, and does nothing when it is finished.

  The last rows are held out, in the order given; all the others are shuffled by `seed`. Raises `UserError` for anything
  but finite numbers of one width, for a row that has no direction (padding) when rows are normalised, for a file that
  counts twice, and for a dtype that does not hold the rows.
  """
  opened = [inputs.open_source(name) for name in inputs.expand(sources)]
  pieces = [piece for source in opened for piece in source.pieces]
  widths = {piece.shape[-1] for piece in pieces}
  if len(widths) > 1:
    raise UserError(f'the arrays have widths {sorted(widths)}; import one width at a time')
  (width,) = widths
  if block_tokens is None:
    most = _BLOCK_BYTES // (width * np.dtype(dtype).itemsize)
    # A store that an earlier version began, or finished, with its own default goes on as it is.
    block_tokens = store_writer.block_tokens_at(out) or min(_BLOCK_TOKENS, max(1, most))
  if block_tokens < 1 or seed < 0 or drop_first < 0:
    raise UserError(
      f'--block_tokens={block_tokens} must be at least 1, --seed={seed} and --drop_first={drop_first} at least 0; '
      'correct them'
    )
  mask, mask_digests = inputs.read_masks(inputs.expand(masks), opened) if masks else (None, None)
  texts, text_digests = inputs.read_documents(inputs.expand(documents), opened) if documents else (None, None)
  rows = split(opened, mask, texts, drop_first, held_out)
  settings = {
    'subject': subject,
    'site': site,
    'text': '',
    'normalize': normalize,
    'window_tokens': 2,
    'block_windows': block_tokens,  # rows have no windows: one token each
    'store_tokens': rows.train,
    'held_out_tokens': rows.held_out,
    'dtype': dtype,
    'seed': seed,
  }
  came_from = {
    'imported_sha256': inputs.digests(opened),
    'mask_sha256': mask_digests,
    'documents_sha256': text_digests,
    'drop_first': drop_first or None,
  }
  if store_writer.finished(out, settings, came_from):
    return
  found = scan(opened, rows, normalize)
  provenance: dict[str, Any] = {
    'imported_from': [
      pathlib.Path(file).name + (f':{source.part}' if source.part else '') for source in opened for file in source.files
    ],
  } | {key: value for key, value in came_from.items() if value is not None}
  if found.repeated:
    provenance['held_out_in_training'] = found.repeated
  if normalize != 'center_unit' and found.heaviest_share > soundness.HEAVY:
    provenance['heaviest_share'] = found.heaviest_share
  writer = store_writer.StoreWriter(
    out,
    d_model=width,
    settings=settings,
    provenance=provenance | {'versions': {'sae_jax': __version__, 'numpy': np.__version__}},
    flops_per_token=0.0,
    scale=1 / found.mean_norm if normalize == 'scale' else None,
  )
  counted = {
    'train': order.permutation(rows.train, 'rows', seed),
    'held_out': np.arange(rows.train, rows.train + rows.held_out),
  }
  blocks = [(name, block) for name, stream in writer.streams.items() for block in range(stream.blocks)]
  for name, block in tqdm(blocks, desc='import', unit='block', disable=None):  # None: only on a terminal
    if not writer.done(name, block):
      first = block * block_tokens
      chosen = counted[name][first : first + writer.streams[name].size(block)]
      writer.write(name, block, _gather(pieces, rows.raw(chosen)))
  writer.finish()


def warnings(meta: dict[str, Any]) -> list[str]:
  """What is wrong with a finished store and yet no reason to refuse it, a line each."""
  found = []
  if meta['config']['normalize'] == 'none':
    found.append(soundness.norm_warning(meta['statistics']['train']['mean_norm']))
  return [text for text in found if text] + soundness.row_warnings(meta['provenance'])


def _gather(pieces: list[Piece], rows_B: np.ndarray) -> np.ndarray:
  """Rows of the joined pieces, float32, read from disk in ascending order."""
  out_BD = np.empty((len(rows_B), pieces[0].shape[-1]), np.float32)
  step = max(1, _SLICE // out_BD.shape[1])
  ascending = np.argsort(rows_B, kind='stable')
  offsets = np.cumsum([0, *(piece.tokens for piece in pieces)])
  bounds = np.searchsorted(rows_B[ascending], offsets)
  for piece, offset, first, last in zip(pieces, offsets[:-1], bounds[:-1], bounds[1:], strict=True):
    for i in range(first, last, step):
      at = ascending[i : min(i + step, last)]
      out_BD[at] = piece.take(rows_B[at] - offset)
  return out_BD
