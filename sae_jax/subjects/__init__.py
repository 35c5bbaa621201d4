"""Language models under study. To add one: docs/add_a_subject.md."""

import jax.numpy as jnp

from sae_jax.errors import UserError
from sae_jax.subjects import catalogue, tokenizer
from sae_jax.subjects.files.gguf import GGUF
from sae_jax.subjects.site import parse
from sae_jax.subjects.subject import Family, Subject


def load(name_or_folder: str, site: str | None = None) -> Subject:
  """A language model with the blocks that `site` needs, or with all of them when it is None.

  Args:
    name_or_folder: a name in `catalogue.ENTRIES`, or a folder that holds one GGUF file.
    site: such as 'resid_post.12', see sae_jax/subjects/site.py.

  Raises `UserError` for an unknown name, site or family, and when the weights are not installed or not complete.
  """
  file = GGUF(catalogue.path_of(name_or_folder))
  architecture = file.field('general.architecture')
  family = _family(architecture)
  arch = family.arch_of(file)
  n_blocks = arch.n_layers if site is None else parse(site, family.widths(arch), arch.n_layers).blocks
  entry = catalogue.ENTRIES.get(name_or_folder)
  start_token = entry.start_token if entry else file.field('tokenizer.ggml.bos_token_id')
  return Subject(
    family=family,
    arch=arch,
    params={key: jnp.asarray(value) for key, value in family.params_of(file, arch, n_blocks).items()},
    n_blocks=n_blocks,
    tokenizer=tokenizer.of_gguf(file),
    start_token=start_token,
    provenance={
      'subject': name_or_folder,
      'subject_file': file.path.name,
      'subject_sha256': file.sha256(),
      'subject_weights': entry.weights if entry else f'{architecture}, dequantised to float32',
      'tokenizer': entry.tokenizer if entry else 'of the same file',
      'start_token': start_token,
    },
  )


def _family(architecture: str) -> Family:
  """The file that knows models of this kind."""
  match architecture:
    case 'llama':
      from sae_jax.subjects import llama as family
    case _:
      raise UserError(f'the architecture {architecture!r} is not known; add it as docs/add_a_subject.md says')
  return family
