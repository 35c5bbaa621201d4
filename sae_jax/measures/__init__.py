"""Measures: what is evaluated on trained autoencoders beyond the NMSE. To add one: docs/add_a_measure.md."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sae_jax.errors import UserError
from sae_jax.measures.names import USUAL, VERSIONS

if TYPE_CHECKING:
  from sae_jax.measures.measure import Measure  # loads jax, which readers of results do without


@dataclasses.dataclass(frozen=True)
class Scope:
  """How much text is looked at.

  Attributes:
    held_out: windows that nothing was trained on; fewer where the cell holds out fewer.
    train: windows of the training text, for what is fitted.
  """

  held_out: int = 128
  train: int = 256


@dataclasses.dataclass(frozen=True)
class Given:
  """Settings of measures that commands have flags for.

  Attributes:
    probe_tasks: a table whose tasks take the place of the built-in ones of probes.
    suffix, pad, rule: of `n2g.N2G`.
  """

  probe_tasks: str = ''
  suffix: int = 7
  pad: str = ' _'
  rule: str = 'simplified'


def by_name(name: str, given: Given = Given()) -> 'Measure':
  """The measure of a name. Raises `UserError` for an unknown one."""
  match name:
    case 'downstream':
      from sae_jax.measures.downstream import Downstream as made
    case 'reconstruction':
      from sae_jax.measures.reconstruction import Reconstruction as made
    case 'latents':
      from sae_jax.measures.latents import Latents as made
    case 'progressive':
      from sae_jax.measures.progressive import Progressive as made
    case 'refine':
      from sae_jax.measures.refine import Refine as made
    case 'ablation':
      from sae_jax.measures.ablation import Ablation as made
    case 'probes':
      from sae_jax.measures.probes import Probes

      return Probes(table=given.probe_tasks)
    case 'n2g':
      from sae_jax.measures.n2g import N2G

      return N2G(suffix=given.suffix, pad=given.pad, rule=given.rule)
    case 'simulate':
      from sae_jax.measures.simulate import Simulate

      return Simulate(suffix=given.suffix, pad=given.pad)
    case other:
      raise UserError(f'no measure {other[:40]!r}; use some of {", ".join(VERSIONS)}')
  return made()


def some(names: Sequence[str], given: Given = Given()) -> list['Measure']:
  """The measures of some names, each once; the usual ones for none. Raises `UserError` for an unknown one."""
  return [by_name(name, given) for name in dict.fromkeys(names or USUAL)]
