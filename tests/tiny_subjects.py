"""The tiny models in tests/subjects, as bench/make_subjects.py wrote them, and folders that differ from them."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

LARGE = 8  # the second scale of all matrices
KEPT = [0, 1, 9, 23]  # positions of which sites and logits are stored
START = 10  # edits begin here
KEPT_EDITED = [10, 23]  # positions of which logits after an edit are stored
# These have a config of their own and the weights of another.
BORROWED = {'mistral': 'llama', 'gpt_neox_serial': 'gpt_neox', 'gemma3_linear': 'gemma3'}
FOLDER = pathlib.Path(__file__).parent / 'subjects'
NAMES = sorted(path.parent.name for path in FOLDER.glob('*/config.json'))

Config = dict[str, Any]
Tensors = dict[str, np.ndarray]


def edited(x_BSD: np.ndarray) -> np.ndarray:
  """Activations times random-looking numbers: their direction changes, which a norm cannot undo."""
  count = np.arange(x_BSD.size, dtype=np.float64)
  return x_BSD * (1 + 0.5 * np.cos(0.37 * count**2).reshape(x_BSD.shape)).astype(np.float32)


def reference(name: str) -> Tensors:
  """What transformers computed: 'ids', and for each scale names such as '8/resid_mid.1' and '1/edit.z.0.kl'."""
  with np.load(FOLDER / name / 'reference.npz') as file:
    return dict(file)


def read(name: str) -> tuple[Config, Tensors]:
  """The config and the tensors of a tiny model."""
  config = json.loads((FOLDER / name / 'config.json').read_text())
  return config, load_file(FOLDER / BORROWED.get(name, name) / 'model.safetensors')


def write(folder: pathlib.Path, config: Config, tensors: Tensors) -> pathlib.Path:
  """An ordinary folder with one file of weights."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / 'config.json').write_text(json.dumps(config))
  save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / 'model.safetensors')
  return folder


def copy(folder: pathlib.Path, name: str, change: Callable[[Config, Tensors], Any] | None = None) -> pathlib.Path:
  """A tiny model in a folder of its own, after `change` has had its config and tensors."""
  config, tensors = read(name)
  if change:
    change(config, tensors)
  return write(folder, config, tensors)


def scaled(folder: pathlib.Path, name: str, scale: int) -> pathlib.Path:
  """A tiny model with all its matrices times `scale`."""
  config, tensors = read(name)
  return write(folder, config, {key: x * np.float32(scale) if x.ndim > 1 else x for key, x in tensors.items()})
