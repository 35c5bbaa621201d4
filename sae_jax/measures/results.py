"""The files of a cell's measures: lines of finished units, and measures.json with the values. Plain Python.

    measures/<name>.jsonl           what is measured, then a line for each unit of work that is done
    measures/<name>.<unit>.safetensors   arrays of a unit, where it has some
    measures/measures.json          values, standard errors, units, and the key of what was measured

A key says all that decides a value. Lines and values of another key are stale: never mixed, never averaged in.
"""

import dataclasses
import hashlib
import json
from typing import Any

from sae_jax import files, schema
from sae_jax.measures.names import VERSIONS

LARGEST = 2**30  # bytes of a file of lines or of arrays
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
  """The finished units of one measure of one cell. A line that was cut short or changed ends them: it is done again.

  Lines of another key are thrown away. Where files cannot be appended to, the file is rewritten.
  """

  def __init__(self, cell: str, key: Key):
    self._path, self._digest = path(cell, f'{key.name}.jsonl'), key.digest
    self.records: list[dict[str, Any]] = []
    head = schema.dump_line({'key': dataclasses.asdict(key)}, self._digest)
    try:
      data = files.read(self._path, LARGEST)
    except FileNotFoundError:
      data = b''
    whole = [line + b'\n' for line in data.split(b'\n')[:-1]]
    self._data = [head]
    for line in whole[1:] if whole[:1] == [head] else []:
      try:
        record = schema.parse_large(line)
        schema.check(record, (), self._digest)
      except schema.Broken:
        break
      if record.get('unit') != len(self.records):
        break
      self.records.append(schema.content(record)['record'])
      self._data.append(line)
    if b''.join(self._data) != data:
      files.replace(self._path, b''.join(self._data))

  def add(self, record: dict[str, Any]) -> None:
    line = schema.dump_line({'unit': len(self.records), 'record': record}, self._digest)
    self._data.append(line)
    if files.is_local(self._path):
      files.append(self._path, line)
    else:
      files.replace(self._path, b''.join(self._data))
    # As it will be read.
    self.records.append(json.loads(line)['record'])


def records(cell: str, result: Result) -> list[dict[str, Any]]:
  """The records of a finished measure's units, in order. Raises `schema.Broken` unless they are of this result."""
  key = result.key
  lines = files.read(path(cell, f'{key.name}.jsonl'), LARGEST).split(b'\n')[:-1]
  found = []
  for i, line in enumerate(lines):
    record = schema.parse_large(line)
    schema.check(record, (), key.digest)
    if i:
      found.append(record['record'])
  return found


def _is_value(value: Any) -> bool:
  return (
    isinstance(value, dict)
    and schema.is_kind(value.get('value'), float)
    and (value.get('se') is None or schema.is_kind(value['se'], float))
    and isinstance(value.get('units'), str)
  )
