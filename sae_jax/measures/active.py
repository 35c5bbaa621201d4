"""Which latents are active where: the codes of a block as a list."""

from typing import Any, NamedTuple

import jax
import numpy as np

from sae_jax.codes import Sparse
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged


class Active(NamedTuple):
  """The codes of some tokens that are not 0, by token.

  Attributes:
    token_A: which of the tokens; not descending.
    latent_A: which latent.
    value_A: its value.
  """

  token_A: np.ndarray
  latent_A: np.ndarray
  value_A: np.ndarray


def active(counted_WTD: np.ndarray, judged: Judged, inputs: Inputs) -> Active:
  """The codes of raw activations. At most one block's dense codes are in memory at once."""
  form = judged.form

  def run(both: Any, x_WTD: jax.Array) -> tuple[jax.Array, ...]:
    n, tokens, d_model = x_WTD.shape
    codes = form.codes(both[1], form.unit(x_WTD.reshape(-1, d_model))[0])
    found = (codes.z_BK, codes.idx_BK) if isinstance(codes, Sparse) else (codes.z_BF,)
    return tuple(a.reshape(n, tokens, -1) for a in found)

  z_WTA, *idx = inputs.over_windows(('active', form), run, judged.params, counted_WTD)
  z_BA = z_WTA.reshape(-1, z_WTA.shape[-1])
  token_A, slot_A = np.nonzero(z_BA)
  latent_A = idx[0].reshape(z_BA.shape)[token_A, slot_A] if idx else slot_A
  return Active(token_A, latent_A, z_BA[token_A, slot_A])
