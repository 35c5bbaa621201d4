"""The examples of probe tasks: activations and labels, the same for all autoencoders of a ledger."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from sae_jax.data import windows
from sae_jax.errors import UserError
from sae_jax.measures import tables
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.names import VERSIONS
from sae_jax.measures.tasks import HALVES, TASKS, balanced, tokens
from sae_jax.subjects import text

_DOCUMENTS = 16  # that are encoded at once
_SHORTEST = 16  # tokens of the smallest batch of texts
_TOKENS = 4096  # of a batch of texts


@dataclasses.dataclass(frozen=True)
class Examples:
  """Of one task: raw activations and labels, 0 or 1 and equally many, of both halves. Empty for a task left out."""

  x_train_BD: np.ndarray
  y_train_B: np.ndarray
  x_held_out_BD: np.ndarray
  y_held_out_B: np.ndarray


def of_windows(name: str, inputs: Inputs, most: int, seed: int) -> Examples:
  """A built-in task on the windows of `inputs`: at most so many examples of each class in each half.

  The halves are the training and the held-out windows, which share no document. A task that has too few examples in this
  text is left out.
  """
  kept = inputs.kept(f'probes.{_name(most, seed, name)}', lambda: _gathered(inputs, _chosen(name, inputs, most, seed)))
  return Examples(**kept)


def of_table(name: str, rows: list[tables.Row], sha256: str, inputs: Inputs, most: int, seed: int) -> Examples:
  """A task of a table: the activation at the last token of each text.

  Raises `UserError` for texts that are too short.
  """
  kept = inputs.kept(
    f'probes.{_name(most, seed, name, sha256)}', lambda: _read_texts(inputs, *tables.chosen(name, rows, most, seed))
  )
  return Examples(**kept)


def _labels(inputs: Inputs) -> dict[str, np.ndarray]:
  """The labels [tasks, W, T] of all built-in tasks on all windows of both streams: 0, 1, or -1 where nothing is asked."""

  def make() -> dict[str, np.ndarray]:
    documents = text.load(inputs.text)
    parts = {stream: _places(inputs, stream) for stream in HALVES}
    if text.sha256(documents) != parts['train'][0].corpus:
      raise UserError(f'the text {inputs.text} changed while it was read; start again')
    needed = sorted({int(i) for some, _ in parts.values() for i in some.document_W})
    labels = {
      stream: np.full((len(TASKS), len(places_WT), inputs.window_tokens), -1, np.int8)
      for stream, (_, places_WT) in parts.items()
    }
    for first in range(0, len(needed), _DOCUMENTS):
      group = needed[first : first + _DOCUMENTS]
      encoded = inputs.subject.encode_with_offsets([documents[i][1] for i in group])
      for i, (_, spans_N2) in zip(group, encoded, strict=True):
        for stream, (some, places_WT) in parts.items():
          name, body = documents[i]
          for w in np.flatnonzero(some.document_W == i):
            read = tokens(body, name, spans_N2, int(some.offset_W[w]), places_WT[w], inputs.window_tokens)
            for position, token in read:
              for t, task in enumerate(TASKS.values()):
                answer = task(token)
                if answer is not None:
                  labels[stream][t, w, position] = answer
    return labels

  return inputs.kept(f'probes.labels.{_name(*TASKS)}', make)


def _places(inputs: Inputs, stream: str) -> tuple[windows.Windows, np.ndarray]:
  """The windows of a stream and the positions that count."""
  blocks = [inputs.block(stream, i) for i in range(inputs.blocks(stream))]
  some = [block.windows for block in blocks]
  joined = windows.Windows(
    some[0].corpus,
    *(np.concatenate([getattr(one, name) for one in some]) for name in ('document_W', 'offset_W', 'ids_WT')),
  )
  return joined, np.concatenate([block.places_WT for block in blocks])


def _chosen(name: str, inputs: Inputs, most: int, seed: int) -> dict[str, np.ndarray]:
  """Per stream the labels [W, T] of the examples that are taken, -1 elsewhere; {} for a task that is left out."""
  labels, found = _labels(inputs), {}
  for stream in HALVES:
    all_WT = labels[stream][list(TASKS).index(name)]
    picked = balanced(all_WT.reshape(-1), most, ('probe tokens', seed, name, stream))
    if picked is None:
      return {}
    taken = np.full(all_WT.size, -1, np.int8)
    taken[picked] = all_WT.reshape(-1)[picked]
    found[stream] = taken.reshape(all_WT.shape)
  return found


def _gathered(inputs: Inputs, taken: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  found = {}
  for stream in HALVES:
    x, y = [np.zeros((0, inputs.subject.width(inputs.site)), np.float32)], [np.zeros(0, np.int8)]
    first = 0
    for i in range(inputs.blocks(stream) if taken else 0):
      block = inputs.block(stream, i)
      of_block_WT = taken[stream][first : first + len(block.windows)]
      first += len(block.windows)
      x.append(block.x_WTD[of_block_WT >= 0])
      y.append(of_block_WT[of_block_WT >= 0])
    found |= {f'x_{stream}_BD': np.concatenate(x), f'y_{stream}_B': np.concatenate(y)}
  return found


def _read_texts(inputs: Inputs, *halves: list[tables.Row]) -> dict[str, np.ndarray]:
  found = {}
  dropped = inputs.window_tokens - windows.counted(inputs.window_tokens, inputs.positions)
  for stream, rows in zip(HALVES, halves, strict=True):
    ids = [one[: inputs.window_tokens - 1] for one in inputs.subject.encode([row.text for row in rows])]
    for one, row in zip(ids, rows, strict=True):
      if len(one) < dropped:
        raise UserError(
          f'line {row.number} of the table has {len(one)} tokens, and under data.positions={inputs.positions} a text needs '
          f'{dropped}; take the row out'
        )
    found |= {f'x_{stream}_BD': _last(inputs, ids), f'y_{stream}_B': np.array([row.label for row in rows], np.int8)}
  return found


def _last(inputs: Inputs, texts: list[np.ndarray]) -> np.ndarray:
  """The raw activation at the last token of each text, [B, D]. Texts of about the same length go through together."""
  x_BD = np.empty((len(texts), inputs.subject.width(inputs.site)), np.float32)
  length_B = np.array([len(ids) for ids in texts])
  width, shortest = _SHORTEST, 0
  while shortest < inputs.window_tokens - 1:
    window = min(width, inputs.window_tokens)
    rows = np.flatnonzero((length_B > shortest) & (length_B < window))
    batch = max(1, _TOKENS // window)
    for first in range(0, len(rows), batch):
      some = rows[first : first + batch]
      # Filled up, so that all batches of a width are one program. What follows the last token is not seen by it.
      ids_WT = np.full((batch, window), inputs.subject.start_token, np.int32)
      last_W = np.zeros(batch, np.int32)
      for w, i in enumerate(some.tolist()):
        ids_WT[w, 1 : 1 + length_B[i]], last_W[w] = texts[i], length_B[i]
      x_WD = inputs.over_windows(('at', window), _residual_at(inputs), (), ids_WT, last_W)
      x_BD[some] = x_WD[: len(some)]
    width, shortest = 2 * width, window - 1
  return x_BD


def _residual_at(inputs: Inputs) -> Any:
  def run(both: Any, ids_WT: Any, last_W: Any) -> Any:
    subject = dataclasses.replace(inputs.subject, params=both[0])
    return subject.residual_at(ids_WT, last_W, inputs.site)

  return run


def _name(*facts: str | int) -> str:
  return hashlib.sha256(json.dumps([VERSIONS['probes'], *facts]).encode()).hexdigest()[:12]
