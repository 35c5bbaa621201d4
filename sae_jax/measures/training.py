"""Measures at the evaluation steps of a run: curves of what an autoencoder does to the model while it is trained."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from sae_jax import artifact, form
from sae_jax.cell import Cell, DataConfig
from sae_jax.measures import Scope, some
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged
from sae_jax.measures.run import inputs_folder


class During:
  """The measures that `eval.measures` names, of one cell in training.

  Args:
    config: of the cell.
    workdir: its folder. Inputs are kept beside its ledger.
    facts: what sae.json will say of subject, text and normalisation.

  Raises `UserError` as `Inputs` does.
  """

  def __init__(self, config: Cell, workdir: str, facts: dict[str, Any]):
    self._config, self._facts = config, facts
    self._measures = some(config.eval.measures.split(','))
    scope = Scope(config.eval.measure_windows, config.eval.measure_windows)
    self._inputs = _inputs(config.data, scope, inputs_folder(workdir), tuple(sorted(_same(facts).items())))

  def __call__(self, weights: dict[str, dict[str, np.ndarray]], better: str) -> dict[str, float]:
    """Values and standard errors by their names in a line of metrics.jsonl, of the better weights."""
    sets = {name: {key: jnp.asarray(a) for key, a in params.items()} for name, params in weights.items()}
    size = artifact.size_of({'activation': self._config.sae.activation} | vars(self._config.sae))
    other = sets['raw' if better == 'ema' else 'ema']
    judged = Judged(self._config.id, form.of(size, self._facts), sets[better], '', better, other)
    line: dict[str, float] = {}
    for measure in self._measures:
      units = [measure.run(unit, judged, self._inputs) for unit in range(measure.units(self._inputs))]
      for name, value in measure.values(units).items():
        line[f'eval/{measure.NAME}/{name}'] = value.value
        if value.se is not None:
          line[f'eval/{measure.NAME}/{name}_se'] = value.se
    return line


def _same(facts: dict[str, Any]) -> dict[str, str]:
  return {key: facts[key] for key in ('subject', 'subject_sha256', 'text', 'text_sha256') if facts.get(key)}


@functools.lru_cache(maxsize=1)  # for all cells of a group, and for those that a worker trains one after the other
def _inputs(data: DataConfig, scope: Scope, folder: str, facts: tuple[tuple[str, str], ...]) -> Inputs:
  return Inputs(data, scope, folder, dict(facts))
