"""GGUF, the file format of llama.cpp: fields and tensors by name. It knows no model."""

import hashlib
import pathlib
from typing import Any

import gguf
import numpy as np

from sae_jax.errors import UserError


class GGUF:
  """An open file. Its tensors stay on disk until they are asked for. Raises `UserError` when it cannot be read."""

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      self._reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
      raise UserError(f'{path} is not a readable GGUF file ({error}); install it again') from None
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

  def field(self, key: str) -> Any:
    """The value of a field. Raises `UserError` when there is none."""
    if key not in self._reader.fields:
      raise UserError(f'{self.path} has no field {key}; take a complete file')
    return self._reader.fields[key].contents()

  def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor `<name>.weight`, dequantised to float32. Raises `UserError` when it is missing or of another shape."""
    tensor = self._tensors.get(f'{name}.weight')
    if tensor is None:
      raise UserError(f'{self.path} has no tensor {name}.weight; take a complete file')
    # GGUF states shapes in reverse.
    if tuple(int(n) for n in tensor.shape[::-1]) != shape:
      raise UserError(f'{self.path}: {name}.weight has shape {tensor.shape[::-1]}, not {shape}; wrong architecture')
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)

  def sha256(self) -> str:
    with open(self.path, 'rb') as f:
      return hashlib.file_digest(f, 'sha256').hexdigest()
