"""The bytes of a table file to a DataFrame, or a refusal in one line that names file, line, value, rule and remedy.

CSV, JSONL and Parquet. Nothing is guessed: a line with another number of fields than the header, or a number in
another notation than the one stated, is named. The index of the result holds the lines of the file.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from analysis.notation import Notation
from sae_jax import files, schema
from sae_jax.errors import UserError

MOST_BYTES = 2**26  # of a file, unpacked; the points of a law take some kilobytes
MOST_ROWS = 100_000  # a fit holds a weight for every row of every resample
LINE = 'line'  # name of the index
NOTATION = 'notation'  # attrs: how a text file writes its numbers, for those of columns that are not all numbers
GROUPED = 'grouped'  # attrs: columns whose broken numbers have three digits after the point, with one of them
_MISSING = ('', 'na', 'n/a', '#n/a', '<na>', 'nan', '-nan', 'null', 'none')
_THREE = re.compile(r'[+-]?[1-9][0-9]{0,2}\.[0-9]{3}')
_GZIP, _ZIP, _PARQUET = b'\x1f\x8b', b'PK\x03\x04', b'PAR1'
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read(path: str, notation: Notation | None = None) -> pd.DataFrame:
  """A table with a header and one row a point; a local path or an fsspec URL. Raises `UserError`.

  JSONL is told by its first character, Parquet and gzip by their first bytes, whatever the name of the file.
  `notation` is of CSV files. `attrs['file']` is the path.
  """
  name, notation = str(path), notation or Notation()
  data = _bytes(name)
  if data.startswith(_PARQUET):
    table = _parquet(name, data)
  else:
    text = _text(name, data, notation.encoding)
    first = text.lstrip()[:1]
    if first == '[':
      raise UserError(f'{name!r} is one JSON array; write one JSON object a line (JSONL)')
    table = _jsonl(name, text) if first == '{' else _csv(name, text, notation)
  if table.empty:
    raise UserError(
      f'{name!r} has no rows; give a table with a header and one row a point (lines that begin with # are comments)'
    )
  table.attrs['file'] = name
  return table


def place(table: pd.DataFrame, row: int) -> str:
  """Where a row (from 0) is, in words: its line of the file, or its number where the table is from no file."""
  if table.index.name != LINE:
    return f'row {row + 1}'
  return f'line {table.index[row]} of {table.attrs.get("file", "the table")}'


def _bytes(name: str) -> bytes:
  try:
    data = files.read(name, MOST_BYTES)
    if data.startswith(_GZIP):
      data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
      raise schema.Broken('unpacked, it is too large')
  except schema.Broken:
    raise UserError(f'{name!r} has more than {MOST_BYTES} bytes; keep the columns and rows of the fit alone') from None
  except (OSError, EOFError, zlib.error) as error:
    raise UserError(f'cannot read {name!r} as a table ({type(error).__name__}); check the path and file') from None
  if data.startswith(_ZIP):
    raise UserError(f'{name!r} is a zip archive or a spreadsheet (.xlsx); export the sheet as CSV')
  return data


def _text(name: str, data: bytes, encoding: str) -> str:
  known = codecs.lookup(encoding).name
  plain = known == 'utf-8'
  if not known.startswith(('utf-16', 'utf-32')) and (data.startswith(_UTF16) or b'\0' in data[:4]):
    raise UserError(f'{name!r} is UTF-16, not {encoding.upper()}; give --encoding=utf-16')
  try:
    text = data.decode(encoding).removeprefix('\ufeff')
  except UnicodeDecodeError as error:
    line = data[: error.start].count(b'\n') + 1
    instead = 'give --encoding=latin-1 where the file is Latin-1' if plain else 'give the encoding of the file'
    raise UserError(
      f'byte 0x{data[error.start]:02x} in line {line} of {name!r} is not {error.encoding.upper()}; {instead}'
    ) from None
  except (LookupError, UnicodeError, TypeError) as error:
    raise UserError(f'cannot read {name!r} as {encoding} ({str(error)[:60]}); give the encoding of the file') from None
  if '\0' in text:
    line = text[: text.index('\0')].count('\n') + 1
    raise UserError(f'line {line} of {name!r} holds a NUL byte; the file is damaged, write it again')
  return text


def _records(name: str, text: str, sep: str) -> Iterator[tuple[int, list[str]]]:
  """Every record that says something, with the line it begins in; comments begin with # where a record could."""
  line, begins, between = 0, 0, True

  def lines() -> Iterator[str]:
    nonlocal line, begins, between
    for one in io.StringIO(text, newline=''):
      line += 1
      if between and one.lstrip().startswith('#'):
        continue
      begins, between = (line if between else begins), False
      yield one

  reader = csv.reader(lines(), delimiter=sep, strict=True, skipinitialspace=sep != ' ')
  while True:
    between = True
    try:
      fields = next(reader, None)
    except csv.Error as error:
      raise UserError(
        f'line {begins} of {name!r} cannot be read ({error}); a quoted field ends with a quote before the next separator'
      ) from None
    if fields is None:
      return
    fields = [field.strip() for field in fields]
    if any(fields):
      yield begins, fields


def _csv(name: str, text: str, notation: Notation) -> pd.DataFrame:
  records = _records(name, text, notation.sep)
  header = next(records, None)
  if header is None:
    raise UserError(f'{name!r} is empty; give a table with a header and one row a point')
  line, names = header
  while not names[-1]:  # a spreadsheet's empty columns at the right, header and all
    names = names[:-1]
  _check_names(name, line, names, notation)
  lines, rows = [], []
  for begins, fields in records:
    if [field.lstrip('\ufeff') for field in fields[: len(names)]] == names:
      raise UserError(
        f'line {begins} of {name!r} repeats the header of line {line}: files were joined; remove that line, '
        'and let a column tell the files apart (--by=COL)'
      )
    lines.append(begins)
    rows.append(fields)
    if len(rows) > MOST_ROWS:
      raise UserError(f'{name!r} has more than {MOST_ROWS} rows; keep those of the fit alone')
  _check_widths(name, line, names, lines, rows)
  if not rows:
    return pd.DataFrame()
  cells = list(zip(*(fields[: len(names)] for fields in rows), strict=True))
  kept = [j for j, column in enumerate(cells) if names[j] or any(column)]
  if unnamed := [j for j in kept if not names[j] and j]:
    raise UserError(
      f'line {line} of {name!r} has no name for field {unnamed[0] + 1}, which has values; name every column there'
    )
  grouped, columns = {}, {}
  for j in kept:
    column = names[j] or 'Unnamed: 0'  # the index that pandas writes
    broken = [text for text in cells[j] if not text.lstrip('+-').isdecimal() and text.lower() not in _MISSING]
    if notation.decimal == '.' and broken and all(_THREE.fullmatch(text) for text in broken):
      grouped[column] = broken[0]
    columns[column] = list(cells[j]) if column == 'id' else _values(cells[j], notation)
  table = pd.DataFrame(columns, index=pd.Index(lines, name=LINE))
  table.attrs = {GROUPED: grouped, NOTATION: notation}
  return table


def _check_names(name: str, line: int, names: list[str], notation: Notation) -> None:
  if names[0].lower().startswith('sep='):
    raise UserError(f'line {line} of {name!r}, {names[0]!r}, is a note to a spreadsheet; remove it and give --sep')
  if len(names) == 1 and (found := [s for s in ';\t|,' if s in names[0]]):
    given = 'tab' if found[0] == '\t' else f'"{found[0]}"'
    raise UserError(f'line {line} of {name!r} has one name, {names[0][:60]!r}; separate its fields by --sep={given}')
  for j, column in enumerate(names):
    if column and column in names[:j]:
      raise UserError(
        f'line {line} of {name!r} names {column!r} twice (fields {names.index(column) + 1} and {j + 1}); '
        'rename one of them'
      )
  if all(notation.number(column) is not None for column in names if column):
    raise UserError(
      f'line {line} of {name!r} has numbers where the names of the columns belong; '
      'begin the file with a line of names (not with #, which makes it a comment)'
    )


def _check_widths(name: str, line: int, names: list[str], lines: list[int], rows: list[list[str]]) -> None:
  """Raises `UserError` unless all rows have the header's fields, or all have the same more, which are empty."""
  width = len(names)
  widths = {len(fields) for fields in rows}
  if len(widths) == 1 and min(widths) > width and not any(any(fields[width:]) for fields in rows):
    return
  for begins, fields in zip(lines, rows, strict=True):
    if len(fields) == width:
      continue
    said = f'line {begins} of {name!r} has {len(fields)} fields, line {line} names {width} ({", ".join(names)[:60]})'
    if len(fields) < width:
      raise UserError(f'{said}; give every field, an empty one where there is no value')
    extra = ','.join(fields)[:60]
    raise UserError(
      f'{said}: {extra!r}; quote a number with separators ("2,048" with --thousands=,), name every column, '
      'and end all lines alike'
    )


def _values(texts: tuple[str, ...], notation: Notation) -> list[Any]:
  """The cells of a column as numbers or truth values where all are, else as texts; None or NaN where one is missing."""
  numbers = [notation.number(text) for text in texts]
  missing = [text.lower() in _MISSING for text in texts]
  known = len(texts) - sum(missing)
  if known and known == sum(number is not None for number in numbers):
    return [np.nan if number is None else number for number in numbers]
  if known and all(text.lower() in ('true', 'false', '') for text in texts):
    return [text.lower() == 'true' if text else None for text in texts]
  return [text if text else None for text in texts] if known else [np.nan] * len(texts)


def _jsonl(name: str, text: str) -> pd.DataFrame:
  lines, records = [], []
  for i, line in enumerate(text.split('\n'), 1):
    if not line.strip():
      continue
    try:
      record = schema.parse(line.encode('utf-8', 'surrogatepass'))
      json.loads(line, object_pairs_hook=_once)
    except schema.Broken as error:
      raise UserError(f'line {i} of {name!r}: {error}; give one JSON object a line') from None
    lines.append(i)
    records.append(
      {key.strip(): json.dumps(value) if isinstance(value, dict | list) else value for key, value in record.items()}
    )
    if len(records) > MOST_ROWS:
      raise UserError(f'{name!r} has more than {MOST_ROWS} rows; keep those of the fit alone')
  names = list(dict.fromkeys(key for record in records for key in record))
  columns = {key: [record.get(key) for record in records] for key in names}
  return pd.DataFrame(columns, index=pd.Index(lines, name=LINE))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  names = [key.strip() for key, _ in pairs]
  for j, key in enumerate(names):
    if key in names[:j]:
      raise schema.Broken(f'it names {key!r} twice')
  return dict(pairs)


def _parquet(name: str, data: bytes) -> pd.DataFrame:
  try:
    from pyarrow import parquet

    count = parquet.read_metadata(io.BytesIO(data)).num_rows
    if count > MOST_ROWS:  # some kilobytes can unpack to gigabytes
      raise UserError(f'{name!r} has {count} rows, more than {MOST_ROWS}; keep those of the fit alone')
    table = pd.read_parquet(io.BytesIO(data))
    table = table.reset_index(drop=table.index.names == [None])
  except ImportError:
    raise UserError(
      f'{name!r} is a Parquet file, which needs pyarrow; pip install pyarrow, or export it as CSV'
    ) from None
  except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors are among them
    raise UserError(f'cannot read {name!r} as Parquet ({type(error).__name__}); write the file again') from None
  names = [str(column).strip() for column in table.columns]
  for j, column in enumerate(names):
    if column in names[:j]:
      raise UserError(f'{name!r} names {column!r} twice; rename one of the columns')
  table.columns = pd.Index(names)
  return table
