"""A model's folder by its name at the Hugging Face hub. A folder that is here needs no hub and no network."""

import os
import pathlib
import re

from sae_jax.errors import UserError

_FILES = ['config.json', 'model*.safetensors', 'model.safetensors.index.json', 'tokenizer.json']


def folder(name: str) -> tuple[pathlib.Path, str]:
  """Where the files of a model are, and their revision, empty for a folder that the user named.

  Args:
    name: of a folder, or `owner/model` or `owner/model@revision`, whose files are fetched where the cache lacks them.

  Raises `UserError` when there is no such folder or model.
  """
  if os.path.isdir(name):  # also of a name that no folder can have
    return pathlib.Path(name), ''
  found = re.fullmatch(r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?', name)
  if found is None or name.startswith('.') or '..' in name:
    from sae_jax.subjects import catalogue

    raise UserError(
      f'data.subject={name!r} is not a subject; use {", ".join(catalogue.ENTRIES)}, a folder that holds a model, or a name '
      'at the hub, owner/model'
    )
  try:
    import huggingface_hub
  except ImportError:
    raise UserError(
      f'data.subject={name!r} is no folder, and the hub needs huggingface_hub; install sae_jax[hub]'
    ) from None
  try:
    path = huggingface_hub.snapshot_download(found[1], revision=found[2], allow_patterns=_FILES)
  except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
    why = ' '.join(str(error).split())[:200]
    raise UserError(
      f'data.subject={name!r} is no folder here, and the hub gives no such model ({why}); mend the name, or copy the '
      'model into a folder'
    ) from None
  return pathlib.Path(path), pathlib.Path(path).name
