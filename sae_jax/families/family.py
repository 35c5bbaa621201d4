"""A family by its name, and what one consists of. Plain Python: jax is loaded when the mathematics is asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sae_jax import families
from sae_jax.errors import UserError

NAMES = ('topk', 'relu')  # for messages


@dataclasses.dataclass(frozen=True)
class Family:
  """What the rest of the library knows of a family.

  Attributes:
    mathematics: loads its file and gives its `codes.Selection` or `codes.Elementwise`.
    penalised: whether a penalty with coefficient `loss.sparsity` makes its codes sparse, and not a count `sae.k`.
  """

  mathematics: Callable[[], Any]
  penalised: bool = False


def family(name: str) -> Family:
  """The family that `sae.activation` names. Raises `UserError` when there is none."""
  match name:
    case 'topk':
      return Family(lambda: families.topk.TOPK)
    case 'relu':
      return Family(lambda: families.relu.RELU, penalised=True)
  raise UserError(f'sae.activation={name!r} is not known; use one of {", ".join(NAMES)}')
