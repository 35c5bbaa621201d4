"""A folder as Hugging Face writes it: config.json, weights in one safetensors file or several, and a tokenizer."""

import functools
import hashlib
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import tokenizers

from sae_jax import schema
from sae_jax.cell_state import printable
from sae_jax.errors import UserError
from sae_jax.subjects.settings import Settings

_CONFIG, _ONE, _INDEX, _TOKENIZER = 'config.json', 'model.safetensors', 'model.safetensors.index.json', 'tokenizer.json'
_TYPES = {'F32': np.dtype('<f4'), 'F16': np.dtype('<f2'), 'BF16': np.dtype(ml_dtypes.bfloat16)}
_MOST_JSON = 2**26  # bytes; an index of tens of thousands of tensors has a few million
_MOST_HEADER = 2**26
_MOST_TOKENIZER = 2**28


class Folder:
  """An open folder. Tensors stay on disk until they are asked for, and are never in memory twice.

  Attributes:
    settings: of config.json.
    shapes: of every tensor, by its name in the files.

  Raises `UserError` when a file is missing, or is not what it should be.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    # A model that sees keeps the settings of its half for text one level deeper.
    self.settings = Settings(_json(path / _CONFIG), str(path / _CONFIG)).lifted('text_config')
    self._files: dict[str, pathlib.Path] = {}
    self._headers: dict[str, dict[str, Any]] = {}
    for file, named in self._weights():
      header = _header(file)
      if named is not None and (lost := sorted(named - header.keys())):
        raise UserError(
          f'{path / _INDEX} says that {file.name} has {lost[0][:80]!r}, and it has not; take a complete folder'
        )
      for name, entry in header.items():
        if name in self._headers:
          raise UserError(
            f'{name[:80]!r} is in {self._files[name].name} and in {file.name} of {path}; take a sound folder'
          )
        self._files[name], self._headers[name] = file, entry
    self.shapes = {name: tuple(entry['shape']) for name, entry in self._headers.items()}

  def tensor(self, name: str) -> np.ndarray:
    """A tensor by its name in the files, in the type it has there. It is a view of the disk.

    Raises `UserError` when that is no type of weights. Masks that old files carry are not asked for.
    """
    entry = self._headers[name]
    if entry['dtype'] not in _TYPES:
      raise UserError(f'{self._files[name]}: {name[:80]} is {entry["dtype"]}; weights are {", ".join(_TYPES)}')
    first = entry['data_offsets'][0] + entry['data_begins']
    return np.memmap(self._files[name], _TYPES[entry['dtype']], 'r', first, tuple(entry['shape']))

  def tokenizer(self) -> tokenizers.Tokenizer | None:
    """That of the folder, without what cuts texts short or fills them up; None when there is none."""
    path = self.path / _TOKENIZER
    if not path.exists():
      return None
    if path.stat().st_size > _MOST_TOKENIZER:
      raise UserError(f'{path} has {path.stat().st_size} bytes, more than {_MOST_TOKENIZER}; take another tokenizer')
    try:
      found = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
      raise UserError(f'{path} is not a tokenizer ({printable(str(error))[:120]}); take the one of the model') from None
    if getattr(found.model, 'dropout', None):
      raise UserError(f'{path}: dropout={found.model.dropout} gives a text other tokens each time; set it to null')
    # A model that was trained on short texts may bring both.
    found.no_truncation()
    found.no_padding()
    # `</s>` in a text is text, as in the tokenizers of GGUF files.
    found.encode_special_tokens = True
    return found

  @functools.cached_property
  def provenance(self) -> dict[str, Any]:
    """What the files are, with a hash of each."""
    files = [self.path / _CONFIG, *sorted(set(self._files.values()))]
    if (self.path / _TOKENIZER).exists():
      files.append(self.path / _TOKENIZER)
    hashes = {file.name: sha256(file) for file in files}
    kinds = sorted({entry['dtype'] for entry in self._headers.values()})
    return {
      'subject_file': self.path.name,
      'subject_sha256': hashlib.sha256(repr(sorted(hashes.items())).encode()).hexdigest(),
      'subject_files': hashes,
      'subject_weights': f'{self.settings.kind}, {", ".join(kinds)} on disk',
      'tokenizer': _TOKENIZER if _TOKENIZER in hashes else 'none',
    }

  def _weights(self) -> list[tuple[pathlib.Path, set[str] | None]]:
    """The files of weights, and which tensors the index says each of them has."""
    one, index = self.path / _ONE, self.path / _INDEX
    if one.exists() and index.exists():
      raise UserError(f'{self.path} holds {_ONE} and {_INDEX}, which may differ; remove one of them')
    if one.exists():
      return [(one, None)]
    if not index.exists():
      if pickles := sorted([*self.path.glob('*.bin'), *self.path.glob('*.pt*')]):
        raise UserError(
          f'{pickles[0]} is a pickle, which can run code when it is read; save the model with '
          'save_pretrained(..., safe_serialization=True) where you trust it'
        )
      raise UserError(f'{self.path} holds neither {_ONE} nor {_INDEX}; take a complete folder')
    found: dict[str, set[str]] = {}
    for name, file in Settings(_json(index), str(index)).table('weight_map').items():
      found.setdefault(file, set()).add(name)
    for file in found:
      if pathlib.PurePath(file).name != file or not file.endswith('.safetensors'):
        raise UserError(
          f'{index} names {file[:80]!r}, which is no safetensors file of this folder; take a sound folder'
        )
      if not (self.path / file).is_file():
        raise UserError(f'{index} names {file}, which is not there; take a complete folder')
    return [(self.path / file, names) for file, names in sorted(found.items())]


def sha256(path: pathlib.Path) -> str:
  with open(path, 'rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    if path.stat().st_size > _MOST_JSON:
      raise schema.Broken(f'it has {path.stat().st_size} bytes, more than {_MOST_JSON}')
    return schema.parse_large(path.read_bytes())
  except FileNotFoundError:
    raise UserError(f'{path} does not exist; name a folder that holds a model') from None
  except (schema.Broken, OSError, ValueError) as error:
    raise UserError(
      f'{path} is not settings in JSON ({printable(str(error))[:120]}); take the file of the model'
    ) from None


def _header(path: pathlib.Path) -> dict[str, dict[str, Any]]:
  """What a safetensors file says of its tensors. The library has checked sizes and offsets against the file."""
  try:
    with open(path, 'rb') as f:
      size = int.from_bytes(f.read(8), 'little')
      if size > _MOST_HEADER:
        raise ValueError(f'its header has {size} bytes, more than {_MOST_HEADER}')
      header = schema.parse_large(f.read(size))
    with safetensors.safe_open(path, framework='numpy') as f:
      names = set(f.keys())
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise UserError(f'{path} is not a whole safetensors file ({printable(str(error))[:120]}); copy it again') from None
  found = {name: header[name] | {'data_begins': 8 + size} for name in names}
  for name, entry in found.items():
    if math.prod(entry['shape']) == 0:
      raise UserError(f'{path}: {name[:80]!r} is empty; take the file of the model')
  return found
