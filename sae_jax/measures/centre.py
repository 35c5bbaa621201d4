"""The mean activation of the held-out windows, raw and as an autoencoder reads it: what errors are put in relation to.

It is the same for all autoencoders of one normalisation, and made once for a ledger.
"""

import numpy as np

from sae_jax.form import Form
from sae_jax.measures.inputs import Inputs


def means(form: Form, inputs: Inputs) -> dict[str, np.ndarray]:
  """The means over the held-out positions that count, float32: 'raw_D' and, normalised, 'unit_D'."""

  def make() -> dict[str, np.ndarray]:
    totals: dict[str, np.ndarray] = {}
    tokens = 0
    for i in range(inputs.blocks('held_out')):
      raw_BD = inputs.block('held_out', i).counted_BD
      tokens += len(raw_BD)
      for name, x_BD in (('raw_D', raw_BD), ('unit_D', np.asarray(form.unit(raw_BD)[0]))):
        totals[name] = totals.get(name, 0) + x_BD.sum(axis=0, dtype=np.float64)
    return {name: (total_D / tokens).astype(np.float32) for name, total_D in totals.items()}

  scale = '' if form.scale is None else f'.{form.scale}'
  return inputs.kept(f'held_out_mean.{form.normalize}{scale}', make)
