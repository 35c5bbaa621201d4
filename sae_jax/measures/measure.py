"""What a measure is: something evaluated on a trained autoencoder, in units of work, with standard errors."""

import dataclasses
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:  # values and their differences follow from records alone, and an analysis of these needs no jax
  from sae_jax.form import Form
  from sae_jax.measures.inputs import Inputs
  from sae_jax.sae import Params


@dataclasses.dataclass(frozen=True)
class Value:
  """One number of a measure.

  Attributes:
    value: the estimate.
    se: its standard error; None where the number is exact for what was looked at.
    units: what it counts, e.g. 'nats a token'.
  """

  value: float
  se: float | None
  units: str


@dataclasses.dataclass(frozen=True, eq=False)  # arrays have no equality
class Judged:
  """The autoencoder that is measured.

  Attributes:
    cell: its id.
    form, params: how it reads and writes activations, and its numbers.
    tensors: the SHA-256 of its tensor file, '' where none was recorded.
    weights: 'raw' or 'ema'.
    other: its other weights, for what compares the two; None where they are not at hand.
  """

  cell: str
  form: 'Form'
  params: 'Params'
  tensors: str
  weights: str
  other: 'Params | None' = None


class Unit(NamedTuple):
  """What a unit of work gives.

  Attributes:
    record: numbers and lists of numbers by name, as JSON has them.
    arrays: what is too large for a line of text.
  """

  record: dict[str, Any]
  arrays: Mapping[str, np.ndarray] = types.MappingProxyType({})


class Measure(Protocol):
  """A frozen dataclass whose fields are its settings. Each field that affects a value is recorded.

  What `run` gives depends on the settings, the autoencoder and the inputs alone, not on the order of units. So a
  measure that was killed goes on with the next unit and ends with the same bytes.
  """

  NAME: ClassVar[str]

  def units(self, inputs: 'Inputs') -> int:
    """How many units of work there are."""

  def run(self, unit: int, judged: Judged, inputs: 'Inputs') -> Unit:
    """Does one unit of work."""

  def values(self, units: list[Unit]) -> dict[str, Value]:
    """The values by name, from all units in order."""

  def flops(self, judged: Judged, inputs: 'Inputs') -> float:
    """About how many FLOPs all units take, beside inputs that all autoencoders share."""
