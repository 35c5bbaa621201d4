"""Probe tasks of the user's own: texts with labels in a file. docs/probe_tasks.md describes the format.

The file is not trusted: sizes are limited, and what is odd about it is said in one line.
"""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sae_jax import files, schema
from sae_jax.cell_state import printable
from sae_jax.data.order import permutation
from sae_jax.errors import UserError
from sae_jax.measures.tasks import HALVES, LEAST, balanced

_BYTES = 2**28
_ROWS = 1_000_000
_CHARACTERS = 100_000  # of a field
_TASKS = 10_000
_LABELS = {'0': 0, '1': 1, 'false': 0, 'true': 1}
_COLUMNS = ('text', 'label', 'task', 'document')


class Row(NamedTuple):
  """A text, its label, and what it was drawn with: texts of one document stay on one side of the split."""

  number: int
  text: str
  label: int
  document: str


def read(path: str) -> bytes:
  """The bytes of a table. Raises `UserError` for one that is missing or too large."""
  try:
    return files.read(path, _BYTES)
  except FileNotFoundError:
    raise UserError(f'{printable(path)}: there is no such file; give a table of texts and labels') from None
  except (schema.Broken, OSError, ValueError) as error:
    raise UserError(f'{printable(path)} cannot be read ({printable(str(error))}); give a smaller file') from None


def tasks(data: bytes, path: str) -> dict[str, list[Row]]:
  """The tasks of a table by name, in the order of their first rows.

  Args:
    data: what the file holds.
    path: its name, to tell CSV from JSON lines and for messages.

  Raises `UserError` for what is no such table.
  """
  shown = printable(path)
  try:
    text = data.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(f'{shown} is not text in UTF-8 (byte {error.start}); convert it') from None
  found: dict[str, list[Row]] = {}
  rows = _json_rows(text, shown) if path.endswith(('.jsonl', '.json')) else _csv_rows(text, shown)
  for i, (number, row) in enumerate(rows):
    where = f'{shown}, line {number}'
    if i >= _ROWS:
      raise UserError(f'{shown} has more than {_ROWS} rows; split it')
    read_row = {name: _field(row, name, where) for name in _COLUMNS}
    if not read_row['text']:
      raise UserError(f'{where}: the text is empty; take the row out')
    label = _LABELS.get(read_row['label'].strip().lower())
    if label is None:
      raise UserError(f'{where}: label={printable(read_row["label"])[:40]!r} is neither 0 nor 1; write one of them')
    task = read_row['task'] or 'table'
    # Equal texts are one document: else the same text could be on both sides of the split.
    found.setdefault(task, []).append(Row(number, read_row['text'], label, read_row['document'] or read_row['text']))
    if len(found) > _TASKS:
      raise UserError(f'{shown} has more than {_TASKS} tasks; split it')
  if not found:
    raise UserError(f'{shown} has no rows; give texts and labels')
  return found


def chosen(name: str, rows: list[Row], most: int, seed: int) -> tuple[list[Row], list[Row]]:
  """The rows of each half of a task that are used: at most so many of each class, and equally many.

  Raises `UserError` for a task with too few.
  """
  found = []
  for half, some in zip(HALVES, halves(rows, ('probe documents', seed, name)), strict=True):
    picked = balanced(np.array([row.label for row in some]), most, ('probe rows', seed, name, half))
    if picked is None:
      ones = sum(row.label for row in rows)
      raise UserError(
        f'task {printable(name)[:40]!r} has {len(rows) - ones} texts of label 0 and {ones} of label 1; give at least '
        f'{2 * LEAST} of each, from many documents, so that both halves have {LEAST} of each'
      )
    found.append([some[i] for i in picked.tolist()])
  return found[0], found[1]


def halves(rows: list[Row], label: tuple[str | int, ...]) -> tuple[list[Row], list[Row]]:
  """The rows of a task in two halves that share no document, and no text even where documents do."""
  # Rows that are linked by a document or by a text go together.
  group_of: dict[tuple[str, str], int] = {}
  members: list[list[Row]] = []
  for row in rows:
    keys = (('document', row.document), ('text', row.text))
    joined = sorted({group_of[key] for key in keys if key in group_of})
    if not joined:
      joined = [len(members)]
      members.append([])
    kept, *others = joined
    for other in others:
      members[kept] += members[other]
      group_of |= {
        key: kept for moved in members[other] for key in (('document', moved.document), ('text', moved.text))
      }
      members[other] = []
    members[kept].append(row)
    group_of |= dict.fromkeys(keys, kept)
  groups = [group for group in members if group]
  first, second = list[Row](), list[Row]()
  for i in permutation(len(groups), *label).tolist():
    (first if len(first) <= len(second) else second).extend(groups[i])
  return first, second


def _csv_rows(text: str, shown: str) -> Iterator[tuple[int, dict[str, Any]]]:
  csv.field_size_limit(_CHARACTERS)
  reader = csv.DictReader(io.StringIO(text, newline=''), strict=True)
  try:
    if missing := [name for name in ('text', 'label') if name not in (reader.fieldnames or ())]:
      raise UserError(f'{shown} has no column {missing[0]!r} in its first line; name the columns text and label')
    for row in reader:
      if None in row or None in row.values():
        raise UserError(f'{shown}, line {reader.line_num}: it has not as many fields as the first line; quote the text')
      yield reader.line_num, row
  except csv.Error as error:
    raise UserError(f'{shown}, line {reader.line_num}: {error}; write it as CSV') from None


def _json_rows(text: str, shown: str) -> Iterator[tuple[int, dict[str, Any]]]:
  for number, line in enumerate(text.split('\n'), 1):
    if line.strip():
      try:
        row = json.loads(line)
      except (ValueError, RecursionError):
        row = None
      if not isinstance(row, dict):
        raise UserError(f'{shown}, line {number}: it is no JSON object; write one a line')
      yield number, row


def _field(row: dict[str, Any], name: str, where: str) -> str:
  """A field as text. Numbers and yes or no may be a label."""
  value = row.get(name, '' if name in ('task', 'document') else None)
  if isinstance(value, bool | int) and name != 'text':
    value = str(value) if abs(value) < 10**9 else None
  if not isinstance(value, str):
    raise UserError(f'{where}: {name} is missing or of another type; write text')
  if len(value) > _CHARACTERS:
    raise UserError(f'{where}: {name} has more than {_CHARACTERS} characters; shorten it')
  try:
    value.encode()
  except UnicodeEncodeError:
    raise UserError(f'{where}: {name} has half of a character; write whole ones') from None
  return value
