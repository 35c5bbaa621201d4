"""Language models under study. To add one: docs/add_a_subject.md."""

import pathlib
from collections.abc import Sequence

import tokenizers

from sae_jax.errors import UserError
from sae_jax.subjects import catalogue, hub
from sae_jax.subjects.files.gguf import GGUF
from sae_jax.subjects.files.safetensors import Folder
from sae_jax.subjects.loading import Files, load_params
from sae_jax.subjects.site import parse
from sae_jax.subjects.subject import Family, Subject


def load(name_or_folder: str, site: str | Sequence[str] | None = None, weights: str = 'float32') -> Subject:
  """A language model with the blocks that a site needs, or several; with all of them when it is None.

  Args:
    name_or_folder: a name in `catalogue.ENTRIES`; a folder that holds config.json and safetensors, or one GGUF file; or
      a name at the Hugging Face hub, `owner/model` or `owner/model@revision`.
    site: such as 'resid_post.12', see sae_jax/subjects/site.py.
    weights: 'float32', or 'bfloat16' to keep weights in half the memory. Products are float32 in both.

  Raises `UserError` for an unknown name, site or family, and when the weights are not installed or not what they should
  be.
  """
  entry = catalogue.ENTRIES.get(name_or_folder)
  facts = {'subject': name_or_folder}
  if entry:
    files: Files = GGUF(catalogue.path_of(name_or_folder))
  else:
    folder, revision = hub.folder(name_or_folder)
    facts |= {'subject_revision': revision} if revision else {}
    files = _opened(folder)
  family = _family(files)
  arch = family.arch_of(files.settings)
  sites = [site] if isinstance(site, str) else site or []
  n_blocks = max((parse(one, family.widths(arch), arch.n_layers).blocks for one in sites), default=arch.n_layers)
  tokenizer = files.tokenizer()
  if tokenizer is not None and (beyond := _beyond(tokenizer, arch.vocabulary)):
    raise UserError(
      f'{files.settings.where}: the tokenizer has an id {max(beyond)} and the model a vocabulary of {arch.vocabulary}; '
      'take the tokenizer of the model'
    )
  params = load_params(files, family, arch, n_blocks, weights)
  facts |= files.provenance | ({'subject_weights': entry.weights, 'tokenizer': entry.tokenizer} if entry else {})
  facts |= {'licence': entry.licence} if entry and entry.licence else {}
  facts |= {'weights_in_memory': weights} if weights != 'float32' else {}
  start_token = entry.start_token if entry else _start_token(files, arch.vocabulary)
  return Subject(family, arch, params, n_blocks, tokenizer, start_token, facts | {'start_token': start_token})


def _opened(folder: pathlib.Path) -> Files:
  """The model in a folder, in either format."""
  for path in folder.iterdir():
    if path.exists() and not (path.is_file() or path.is_dir()):
      raise UserError(f'{path} is a pipe or a device, which may have no end; take a folder of files')
  found = sorted(folder.glob('*.gguf'))
  if (folder / 'config.json').exists() and not found:
    return Folder(folder)
  if len(found) != 1 or (folder / 'config.json').exists():
    raise UserError(
      f'{folder} is not a model; a model is a folder with config.json and safetensors, or with one GGUF file'
    )
  return GGUF(found[0])


def _family(files: Files) -> Family:
  """The file that knows models of this kind."""
  match files.settings.kind:
    case 'llama' | 'mistral' | 'qwen2' | 'qwen3':
      from sae_jax.subjects import llama as family
    case 'gpt2':
      from sae_jax.subjects import gpt2 as family
    case 'gpt_neox':
      from sae_jax.subjects import neox as family
    case 'gemma2' | 'gemma3_text' | 'gemma3':
      from sae_jax.subjects import gemma as family
    case other:
      raise UserError(
        f'{files.settings.where}: the kind of model {other[:40]!r} is not known; add it as docs/add_a_subject.md says'
      )
  return family


def _beyond(tokenizer: tokenizers.Tokenizer, vocabulary: int) -> set[int]:
  """Ids of words that the model lacks. Gemma's smaller tokenizers have a special token for pictures too many."""
  special = {id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special}
  return {id_ for id_ in tokenizer.get_vocab().values() if id_ >= vocabulary} - special


def _start_token(files: Files, vocabulary: int) -> int:
  """The token that opens windows: the one that the settings declare, or else the one that ends a text."""
  settings = files.settings
  for key in ('bos_token_id', 'eos_token_id'):
    if settings.has(key):
      token = settings.first_whole(key)
      if token >= vocabulary:
        settings.refuse(key, f'is not in the vocabulary of {vocabulary}; take a sound file')
      return token
  return 0
