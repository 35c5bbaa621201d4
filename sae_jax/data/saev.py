"""The shard folders of saev: metadata.json, shards.json and float32 files [examples, layers, tokens, D].

Read after its file protocol, versions 1.0 to 2.1, which differ in the names of their keys alone.
"""

import functools
import json
import os
from typing import Any

import numpy as np

from sae_jax import schema
from sae_jax.data.matrix import Piece, why
from sae_jax.errors import UserError

_PROTOCOLS = ('1.0', '1.1', '2.0', '2.1')
# The same number under the names of the versions.
_WIDTH = ('d_model', 'd_vit')
_TOKENS = ('content_tokens_per_example', 'patches_per_ex', 'n_patches_per_img')
_EXAMPLES = ('n_examples', 'n_ex', 'n_imgs')
_BUDGET = ('max_tokens_per_shard', 'patches_per_shard', 'max_patches_per_shard')
_NUMBER_BYTES = 4


def is_saev(path: str) -> bool:
  """Whether a folder is one of saev's."""
  return all(os.path.exists(os.path.join(path, name)) for name in ('metadata.json', 'shards.json'))


def open_layer(path: str, layer: str) -> list[Piece]:
  """One layer of every shard as [examples, tokens, D]; an empty name takes the only one. Raises `UserError`."""
  try:
    with open(os.path.join(path, 'metadata.json'), 'rb') as f:
      facts = schema.parse(f.read())
    with open(os.path.join(path, 'shards.json'), 'rb') as f:
      shards = json.loads(f.read())
    protocol = str(facts['protocol'])
    if not protocol.startswith(_PROTOCOLS) or facts['dtype'] != 'float32':
      raise UserError(
        f'{path}: protocol {protocol} with {facts["dtype"]} is not known; this version reads {", ".join(_PROTOCOLS)} '
        'with float32'
      )
    layers = facts['layers']
    width, tokens = _number(facts, _WIDTH), _number(facts, _TOKENS) + bool(facts['cls_token'])
    full = _number(facts, _BUDGET) // (tokens * len(layers))
    counts = [(os.path.join(path, _plain(shard['name'])), _number(shard, _EXAMPLES)) for shard in shards]
    total = _number(facts, _EXAMPLES)
  except FileNotFoundError as error:
    raise UserError(f'{error.filename} does not exist; copy the folder again') from None
  except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError) as error:
    raise UserError(f'{path} is not a folder of saev ({why(error)}); copy it again') from None
  if sum(count for _, count in counts) != total:
    raise UserError(
      f'{path}/shards.json has {sum(n for _, n in counts)} examples and metadata.json {total}; let saev finish it'
    )
  known = [str(one) for one in layers]
  if layer not in known and (layer or len(known) != 1):
    raise UserError(f'{path}: no layer {layer!r}; write {path}:LAYER with one of {", ".join(known[:40])}')
  at = known.index(layer) if layer else 0
  pieces = []
  for file, count in counts:
    example = len(layers) * tokens * width * _NUMBER_BYTES
    if not os.path.exists(file):
      raise UserError(f'{file} does not exist; copy the folder again')
    found = os.path.getsize(file)
    # saev makes every file in its full size and fills the last one in part.
    if found not in (count * example, full * example):
      raise UserError(f'{file} has {found} bytes, not {count * example}; copy the folder again')
    if count:
      whole = (count, len(layers), tokens, width)
      name = f'{file}:{known[at]}'
      pieces.append(Piece(name, (count, tokens, width), np.dtype('<f4'), functools.partial(_view, file, whole, at)))
  return pieces


def _view(file: str, shape: tuple[int, ...], layer: int) -> np.ndarray:
  return np.memmap(file, '<f4', mode='r', shape=shape)[:, layer]


def _number(record: dict[str, Any], names: tuple[str, ...]) -> int:
  (value,) = (record[name] for name in names if name in record)
  if type(value) is not int or value < 0:
    raise ValueError(f'{value!r} is not a count')
  return value


def _plain(name: str) -> str:
  if os.path.basename(name) != name:
    raise ValueError(f'{name!r} is not the name of a file')
  return name
