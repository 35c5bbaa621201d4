"""Weights of a model from its files: every tensor is named, shaped and finite as its family says, or refused."""

import math
import re
from typing import Any, Protocol

import jax
import numpy as np
import tokenizers

from sae_jax.errors import UserError
from sae_jax.subjects.settings import Settings
from sae_jax.subjects.subject import Family, Params

_ALIGNED = 64  # bytes
_AT_ONCE = 2**22  # numbers that are looked at together


class Files(Protocol):
  """What a file format gives."""

  settings: Settings
  shapes: dict[str, tuple[int, ...]]
  provenance: dict[str, Any]

  def tensor(self, name: str) -> np.ndarray:
    """A tensor by its name in `shapes`."""

  def tokenizer(self) -> tokenizers.Tokenizer | None:
    """That of the model, or None."""


def load_params(files: Files, family: Family, arch: Any, n_blocks: int, dtype: str) -> Params:
  """The parameters of the first `n_blocks` blocks and all others, in a dtype. No array is twice in memory.

  Raises `UserError` for a tensor that is missing, unknown, of another shape or not finite, for heads that contradict the
  settings, and for settings that nobody understood.
  """
  found = _matched(files, family, arch)
  files.settings.refuse_others()

  def read(name: str) -> np.ndarray:
    value = files.tensor(found[name])
    if not _is_finite(value):
      raise UserError(f'{files.settings.where}: {found[name]} holds NaN or infinity; take the file of the model')
    return value

  block, rest = family.tensors(arch)
  beginning = family.NAMES.block
  params: Params = {}
  for key, value in family.rest_params(arch, {name: read(name) for name in rest}).items():
    params[key] = _placed(value, dtype)
  if 'head' in found:
    params['head'] = _placed(read('head'), dtype)
  stacked: dict[str, np.ndarray] = {}
  for layer in range(n_blocks):
    w = {name: read(beginning.format(layer) + name) for name in block}
    for key, value in family.block_params(arch, w).items():
      if key not in stacked:
        stacked[key] = _room((n_blocks, *value.shape), dtype)
      stacked[key][layer] = value
  params['blocks'] = {key: jax.device_put(stacked.pop(key)) for key in sorted(stacked)}
  return params


def _placed(value: np.ndarray, dtype: str) -> jax.Array:
  room = _room(value.shape, dtype)
  room[...] = value
  return jax.device_put(room)


def _room(shape: tuple[int, ...], dtype: str) -> np.ndarray:
  """Memory for an array that `jax.device_put` takes over on a CPU. It would copy one that begins elsewhere."""
  size = math.prod(shape) * np.dtype(dtype).itemsize
  memory = np.empty(size + _ALIGNED, np.uint8)
  first = -memory.ctypes.data % _ALIGNED
  return memory[first : first + size].view(dtype).reshape(shape)


def _is_finite(value: np.ndarray) -> bool:
  """A few rows at a time, because a sum of numbers of a small type is made in another."""
  rows = max(1, _AT_ONCE * len(value) // value.size)
  parts = (value[i : i + rows].astype(np.float32).sum(dtype=np.float64) for i in range(0, len(value), rows))
  return all(np.isfinite(part) for part in parts)


def _matched(files: Files, family: Family, arch: Any) -> dict[str, str]:
  """The names of a family's tensors to those in the file; 'head' where the file has one of its own."""
  names, (block, rest) = family.NAMES, family.tensors(arch)
  where = files.settings.where
  prefix = next((one for one in names.prefixes if one + names.embedding in files.shapes), None)
  if prefix is None:
    raise UserError(f'{where}: no tensor {names.prefixes[0]}{names.embedding}; take a complete model of this family')
  wanted = {name: (prefix + name, shape) for name, shape in rest.items()}
  for layer in range(arch.n_layers):
    wanted |= {(one := names.block.format(layer) + name): (prefix + one, shape) for name, shape in block.items()}
  heads = [name for name in names.heads if name in files.shapes]
  if heads:
    wanted['head'] = heads[0], (arch.vocabulary, arch.d_model)
  for name, shape in wanted.values():
    if name not in files.shapes:
      raise UserError(f'{where}: no tensor {name}; take a complete file')
    if files.shapes[name] != shape:
      raise UserError(
        f'{where}: {name} has shape {files.shapes[name]}, and the settings say {shape}; take a sound file'
      )
  for name in sorted(files.shapes.keys() - {name for name, _ in wanted.values()}):
    if not re.fullmatch(names.ignored, name):
      raise UserError(f'{where}: the tensor {name[:80]!r} is not known to this family; the model needs code')
  tied = files.settings.flag('tie_word_embeddings', names.tied if not heads else False)
  if not heads and not tied and files.settings.has('tie_word_embeddings'):
    raise UserError(
      f'{where}: tie_word_embeddings=False, and there is no tensor {names.heads[0]}; take a complete file'
    )
  if heads and tied and not _equal(files.tensor(heads[0]), files.tensor(wanted[names.embedding][0])):
    raise UserError(f'{where}: tie_word_embeddings=True, and {heads[0]} is not the embedding; take a sound file')
  return {name: found for name, (found, _) in wanted.items()}


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
  return a.shape == b.shape and bool((a == b).all())
