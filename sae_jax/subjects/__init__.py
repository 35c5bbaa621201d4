"""Language models under study. To add one, write its loader beside smollm2.py and name it in `load`."""

from sae_jax.errors import UserError
from sae_jax.subjects import smollm2
from sae_jax.subjects.subject import Subject


def load(name: str, site: str | None = None) -> Subject:
  """The subject called `name` with the layers up to `site` ('resid_post.12'), or all layers when it is None.

  Raises `UserError` for an unknown name or site and when the weights are not installed.
  """
  if name == smollm2.NAME:
    return smollm2.load(site)
  raise UserError(f'data.subject={name!r} is not a subject; use {smollm2.NAME}, or add it in sae_jax/subjects')
