"""A family by its name, and what is known of it before jax is loaded. Plain Python."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sae_jax import families
from sae_jax.errors import UserError

NAMES = (  # for messages
  'topk',
  'multitopk',
  'batchtopk',
  'matryoshka',
  'ksparse',
  'relu',
  'prolu_relu',
  'prolu_ste',
  'gated',
  'jumprelu_step',
  'jumprelu_tanh',
  'cs294a',
)


MORE = 4  # times k latents that a token offers where it may come to use more than k


@dataclasses.dataclass(frozen=True)
class Family:
  """What the rest of the library knows of a family.

  Attributes:
    mathematics: loads its file and gives its `codes.Selection`, `codes.Elementwise` or `codes.Own`.
    penalised: whether a penalty makes its codes sparse, and not a count. Its coefficient is `loss.sparsity`, or is
      steered until `sae.k` latents a token are active.
    steered: whether it can be.
    auxk: whether AuxK brings its dead latents back.
    offered: times k slots that the sparse products of a token have.
    heads: decodings of a token, where all codes are dense. Of two the second trains no decoder.
  """

  mathematics: Callable[[], Any]
  penalised: bool = False
  steered: bool = True
  auxk: bool = True
  offered: int = 1
  heads: int = 1


def family(name: str) -> Family:
  """The family that `sae.activation` names. Raises `UserError` when there is none."""
  match name:
    case 'topk':
      return Family(lambda: families.topk.TOPK)
    case 'multitopk':
      return Family(lambda: families.multitopk.MULTITOPK, offered=MORE)
    case 'batchtopk':
      return Family(lambda: families.batchtopk.BATCHTOPK, offered=MORE)
    case 'matryoshka':
      return Family(lambda: families.matryoshka.MATRYOSHKA)
    case 'ksparse':
      return Family(lambda: families.ksparse.KSPARSE, auxk=False)
    case 'relu':
      return Family(lambda: families.relu.RELU, penalised=True)
    case 'prolu_relu':
      return Family(lambda: families.prolu.RELU, penalised=True)
    case 'prolu_ste':
      return Family(lambda: families.prolu.STE, penalised=True)
    case 'gated':
      return Family(lambda: families.gated.GATED, penalised=True, heads=2)
    case 'jumprelu_step':
      return Family(lambda: families.jumprelu.STEP, penalised=True)
    case 'jumprelu_tanh':
      return Family(lambda: families.jumprelu.TANH, penalised=True)
    case 'cs294a':
      return Family(lambda: families.cs294a.CS294A, penalised=True, steered=False, auxk=False)
  raise UserError(f'sae.activation={name!r} is not known; use one of {", ".join(NAMES)}')
