"""Dataclasses from nested dicts of plain values, and back: what a configuration file holds. It knows no cell."""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from sae_jax.errors import UserError

T = TypeVar('T')


def flatten(tree: Any, section: type = dict) -> dict[str, Any]:
  """The values of nested sections by their keys, joined by dots. A section is of this type, which has `items`."""
  flat: dict[str, Any] = {}

  def take(items: Iterable[tuple[str, Any]], prefix: str) -> None:
    for key, value in items:
      if isinstance(value, section):
        take(value.items(), f'{prefix}{key}.')
      else:
        flat[prefix + key] = value

  take(tree.items(), '')
  return flat


def unflatten(flat: dict[str, Any]) -> dict[str, Any]:
  """Inverse of `flatten`."""
  tree: dict[str, Any] = {}
  for key, value in flat.items():
    *parents, leaf = key.split('.')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def build(cls: type[T], record: dict[str, Any]) -> T:
  """A dataclass from nested values. A field that came later (`added`) may be missing and is then neutral.

  Raises `UserError` for any other field that is missing, unknown or of another type.
  """
  kinds, neutral = _form(cls)
  record = neutral | record
  if record.keys() != kinds.keys():
    wrong = ', '.join(sorted(record.keys() ^ kinds.keys()))
    raise UserError(f'{cls.__name__} and the configuration differ in: {wrong}; start from config.template()')
  return cls(**{name: _read(cls, name, kinds[name], value) for name, value in record.items()})


@functools.cache
def _form(cls: type) -> tuple[dict[str, Any], dict[str, Any]]:
  """Types of the fields of a dataclass, and the neutral values of those that came later."""
  fields = dataclasses.fields(cls)
  neutral = {f.name: f.metadata['neutral'] for f in fields if 'neutral' in f.metadata}
  return {f.name: f.type for f in fields}, neutral


def _read(cls: type, name: str, kind: Any, value: Any) -> Any:
  """A value as a field of type `kind` holds it: a section, a number, a text, or None where the field allows it."""
  if type(value) is kind:
    return value
  if isinstance(kind, types.UnionType):  # only ever with None
    if value is None:
      return None
    (kind,) = (one for one in typing.get_args(kind) if one is not types.NoneType)
  if dataclasses.is_dataclass(kind):
    return build(kind, value)
  if kind is float and type(value) is int:
    return float(value)
  if type(value) is not kind:
    raise UserError(f'{cls.__name__}.{name}={value!r} is not of type {kind.__name__}; correct it')
  return value


def flat_into(flat: dict[str, Any], section: Any, prefix: str) -> None:
  """Adds the values of a dataclass and its sections, by their keys joined by dots."""
  for name in section.__dataclass_fields__:
    value = getattr(section, name)
    if hasattr(value, '__dataclass_fields__'):
      flat_into(flat, value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value


def record_of(section: Any) -> dict[str, Any]:
  """What the record of a section holds: its values by name, those of its own sections nested.

  Left out is what would change ids for nothing. Such fields are marked by `schema.added`:
  a field of some families, in a cell of another family. `of` names the owner and the families.
  Any other added field, while it has the neutral value.
  """
  record = {}
  for name, field in section.__dataclass_fields__.items():
    value = getattr(section, name)
    if field.metadata:
      owner, *owned_by = field.metadata.get('of') or ('',)
      if owner and getattr(section, owner) not in owned_by:
        continue
      if 'neutral' in field.metadata and not owner and value == field.metadata['neutral']:
        continue
    record[name] = record_of(value) if hasattr(value, '__dataclass_fields__') else value
  return record
