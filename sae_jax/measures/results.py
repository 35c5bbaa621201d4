"""The files of a cell's measures: lines of finished units, and measures.json with the values. Plain Python.

    measures/<name>.jsonl           what is measured, then a line for each unit of work that is done
    measures/<name>.<unit>.safetensors   arrays of a unit, where it has some
    measures/measures.json          values, standard errors, units, and the key of what was measured
    measures/<name>.<key>.jsonl, measures/<name>.<key>.<unit>.safetensors   the same, of a key that is not finished yet

A key says all that decides a value. Lines and values of another key are stale: never mixed, never averaged in.

Where lines of another key have the plain names, those of a new key get names with its digest. Once all of them are
there, measures.json is replaced, and from then on they are what was measured. Only then do they take the plain names,
the lines last. Whoever reads looks under both names. So a process can be killed anywhere, and there is always one
finished measure whose lines and arrays are all there.
"""

import dataclasses
import hashlib
import json
import re
from typing import Any, NamedTuple

from sae_jax import files, schema
from sae_jax.measures.names import VERSIONS

LARGEST = 2**30  # bytes of a file of lines or of arrays
_ARRAYS = 'arrays_sha256'  # in the record of a unit that has arrays
_KEYS = ('name', 'version', 'settings', 'tensors', 'weights', 'inputs')


@dataclasses.dataclass(frozen=True)
class Key:
  """What a value is of.

  Attributes:
    name, version, settings: of the measure.
    tensors: the SHA-256 of the tensor file that was measured.
    weights: 'raw' or 'ema'.
    inputs: identity of the windows, the subject and the site.
  """

  name: str
  version: int
  settings: dict[str, Any]
  tensors: str
  weights: str
  inputs: str

  @property
  def digest(self) -> str:
    return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

  @property
  def stem(self) -> str:
    """How the names of its files begin while others have the plain ones."""
    return f'{self.name}.{self.digest[:16]}'


@dataclasses.dataclass(frozen=True)
class Result:
  """A finished measure of a cell: its key, and by name {value, se, units}."""

  key: Key
  values: dict[str, dict[str, Any]]

  def stale(self, tensors: str) -> str:
    """Why the values are not of the autoencoder that is there now, or ''.

    `tensors`: the SHA-256 that sae.json records for the weights that were measured.
    """
    if self.key.tensors != tensors:
      return 'of an autoencoder that was replaced since'
    if self.key.version != VERSIONS.get(self.key.name):
      return f'of version {self.key.version} of the measure, which now has {VERSIONS.get(self.key.name)}'
    return ''


def tensors(cell: str, weights: str) -> str:
  """The SHA-256 that sae.json records for some weights, or ''."""
  info = schema.parse(files.read(files.join(cell, schema.ARTIFACT, schema.ARTIFACT_INFO)))
  digests = info.get('sha256')
  return str(digests.get(weights, '')) if isinstance(digests, dict) else ''


def path(cell: str, name: str) -> str:
  return files.join(cell, schema.MEASURES, name)


def read(cell: str, cell_id: str) -> dict[str, Result]:
  """The finished measures of a cell by name. Raises `schema.Broken` for a file that cannot be believed."""
  try:
    record = schema.parse(files.read(path(cell, schema.MEASURES_INFO)))
  except FileNotFoundError:
    return {}
  schema.check(record, (), cell_id)
  if not schema.verified(record) or not isinstance(record.get('measures'), dict):
    raise schema.Broken('it has no measures under a digest')
  found = {}
  for name, entry in record['measures'].items():
    try:
      key = Key(**{field: entry['key'][field] for field in _KEYS})
      if name != key.name or not all(_is_value(value) for value in entry['values'].values()):
        raise ValueError
      found[name] = Result(key, entry['values'])
    except (KeyError, TypeError, ValueError, AttributeError):
      raise schema.Broken(f'its entry {name[:40]!r} is no measure') from None
  return found


def write(cell: str, cell_id: str, results: dict[str, Result]) -> None:
  """Replaces measures.json."""
  measures = {
    name: {'key': dataclasses.asdict(results[name].key), 'values': results[name].values} for name in sorted(results)
  }
  files.replace(path(cell, schema.MEASURES_INFO), schema.dump({'measures': measures}, cell_id))


class Lines:
  """The units of one measure of one cell that are done. A line that was cut short or changed ends them: it is done again.

  Nothing is written before the first `add`, so a measure that is refused changes nothing. Lines of another key are left
  alone; see the module. Where files cannot be appended to, the file is rewritten.

  Attributes:
    records: of the units, in order.
    stem: how the names of the files of its arrays begin.
  """

  def __init__(self, cell: str, key: Key):
    plain, own = _read_lines(cell, key.name, key), _read_lines(cell, key.stem, key)
    is_own = not plain.head and (bool(own.head) or plain.is_there)
    found, self.stem = (own, key.stem) if is_own else (plain, key.name)
    self._path, self._digest = path(cell, f'{self.stem}.jsonl'), key.digest
    self.records, self._lines = found.records, found.lines
    self._head = found.head or schema.dump_line({'key': dataclasses.asdict(key)}, self._digest)
    for unit, record in enumerate(self.records):
      try:
        arrays(cell, key, unit, record)
      except (schema.Broken, FileNotFoundError):
        del self.records[unit:], self._lines[unit:]
        break
    self._is_whole = self._data == found.data

  def add(self, record: dict[str, Any]) -> None:
    line = schema.dump_line({'unit': len(self.records), 'record': record}, self._digest)
    self._lines.append(line)
    if self._is_whole and files.is_local(self._path):
      files.append(self._path, line)
    else:
      files.replace(self._path, self._data)
      self._is_whole = True
    # As it will be read.
    self.records.append(json.loads(line)['record'])

  def complete(self) -> None:
    """Writes all lines again where the file holds anything else, such as half a line at its end."""
    try:
      if files.read(self._path, LARGEST) == self._data:
        return
    except (FileNotFoundError, schema.Broken):
      pass
    files.replace(self._path, self._data)

  @property
  def _data(self) -> bytes:
    return b''.join((self._head, *self._lines))


def is_whole(cell: str, key: Key, units: int) -> bool:
  """Whether all lines of a measure are under the plain name, and nothing else, and the files of its arrays are there.

  The bytes of arrays are not looked at: they may be many.
  """
  found = _read_lines(cell, key.name, key)
  names = [_arrays_name(key.name, unit) for unit, record in enumerate(found.records) if _ARRAYS in record]
  return (
    len(found.records) == units
    and b''.join((found.head, *found.lines)) == found.data != b''
    and len(files.sizes(files.join(cell, schema.MEASURES), names)) == len(names)
  )


def settle(cell: str, key: Key) -> None:
  """Gives the files of a finished measure their plain names, and removes those of other keys.

  The lines come last: where they do not have the plain name, a process was killed in here, and the next goes on.
  """
  plain, own = _read_lines(cell, key.name, key), _read_lines(cell, key.stem, key)
  moves = bool(own.head) and not plain.head
  units = {str(unit) for unit, record in enumerate((own if moves else plain).records) if _ARRAYS in record}
  pattern = re.compile(rf'({re.escape(key.name)}(?:\.[0-9a-f]{{16}})?)\.(?:([0-9]{{1,9}})\.safetensors|jsonl)')
  for match in filter(None, map(pattern.fullmatch, files.listdir(files.join(cell, schema.MEASURES)))):
    name, (stem, unit) = path(cell, match[0]), match.groups()
    if unit and unit not in units:
      files.remove(name)
    elif unit and stem == key.stem and moves:
      files.move(name, path(cell, _arrays_name(key.name, int(unit))))
    elif stem != key.name and not (moves and stem == key.stem):
      files.remove(name)
  if moves:
    files.move(path(cell, f'{key.stem}.jsonl'), path(cell, f'{key.name}.jsonl'))


def is_settled(cell: str, key: Key) -> bool:
  """Whether nothing is left for `settle` to rename."""
  return bool(_read_lines(cell, key.name, key).head) or not _read_lines(cell, key.stem, key).head


def records(cell: str, result: Result) -> list[dict[str, Any]]:
  """The records of a finished measure's units, in order. Raises `schema.Broken` unless they are of this result."""
  key = result.key
  for stem in _looked_at(key):
    if (found := _read_lines(cell, stem, key)).head:
      break
  if found.why is not None:
    raise found.why
  return found.records


def arrays(cell: str, key: Key, unit: int, record: dict[str, Any]) -> bytes:
  """The file of the arrays of a unit, b'' for one without. Raises `schema.Broken` for others than its record says."""
  if _ARRAYS not in record:
    return b''
  found = None
  for stem in _looked_at(key):
    try:
      found = files.read(path(cell, _arrays_name(stem, unit)), LARGEST)
    except FileNotFoundError:
      continue
    if hashlib.sha256(found).hexdigest() == record[_ARRAYS]:
      return found
  said = 'is not there' if found is None else 'does not fit its digest'
  raise schema.Broken(f'{_arrays_name(key.name, unit)} {said}')


def save_arrays(cell: str, stem: str, unit: int, data: bytes) -> dict[str, str]:
  """Writes the file of the arrays of a unit; what its record has to say of it."""
  files.replace(path(cell, _arrays_name(stem, unit)), data)
  return {_ARRAYS: hashlib.sha256(data).hexdigest()}


class _Found(NamedTuple):
  """What a file of lines holds of a key.

  Attributes:
    is_there: whether there is such a file.
    data: all of it.
    head: its first line; b'' for one of another key.
    lines, records: of the units, up to the first line that cannot be believed.
    why: not more of them, or None.
  """

  is_there: bool
  data: bytes
  head: bytes
  lines: list[bytes]
  records: list[dict[str, Any]]
  why: schema.Broken | None


def _read_lines(cell: str, stem: str, key: Key) -> _Found:
  name, digest = f'{stem}.jsonl', key.digest
  try:
    data = files.read(path(cell, name), LARGEST)
  except FileNotFoundError:
    return _Found(False, b'', b'', [], [], schema.Broken(f'{name} is not there'))
  except schema.Broken as error:
    return _Found(True, b'', b'', [], [], error)
  whole, _, rest = data.rpartition(b'\n')
  head, lines, records = b'', list[bytes](), list[dict[str, Any]]()
  why = schema.Broken(f'the end of {name} was cut short') if rest or not data else None
  for line in [one + b'\n' for one in whole.split(b'\n')] if whole else []:
    try:
      record = schema.parse_large(line)
      schema.check(record, (), digest)
      if not head and not (schema.verified(record) and 'key' in record):
        raise schema.Broken(f'{name} does not say what is measured')
      if head and not (record.get('unit') == len(records) and isinstance(record.get('record'), dict)):
        raise schema.Broken(f'{name} has something else where unit {len(records)} should be')
    except schema.Broken as error:
      why = error
      break
    if head:
      lines.append(line)
      records.append(record['record'])
    else:
      head = line
  return _Found(True, data, head, lines, records, why)


def _looked_at(key: Key) -> tuple[str, str, str]:
  """Where a finished measure is looked for. It may have taken its plain names between the first two looks."""
  return key.name, key.stem, key.name


def _arrays_name(stem: str, unit: int) -> str:
  return f'{stem}.{unit}.safetensors'


def _is_value(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and schema.is_kind(value.get('value'), float)
    and (value.get('se') is None or schema.is_kind(value['se'], float))
    and isinstance(value.get('units'), str)
  )
