"""What an autoencoder costs the model: predictions with the reconstruction in place of the activation.

Gao et al. 2024, section 4.1; loss recovered as in Rajamanoharan et al. 2024. Every counted position of a window is
replaced at once. The others, the start token among them, stay as they are. dCE grows with the position in a window, so
values belong to a length of windows.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae_jax.measures import estimate
from sae_jax.measures.measure import Judged, Unit, Value

if TYPE_CHECKING:
  from sae_jax.measures.inputs import Block, Inputs

_NATS = 'nats a token'


@dataclasses.dataclass(frozen=True)
class Downstream:
  NAME: ClassVar[str] = 'downstream'

  def units(self, inputs: 'Inputs') -> int:
    return inputs.blocks('held_out')

  def run(self, unit: int, judged: Judged, inputs: 'Inputs') -> Unit:
    """One block of held-out windows: for each window the sums over the tokens that are predicted at counted positions."""
    block = inputs.block('held_out', unit)
    ce_WT, kl_WT = inputs.spliced(unit, judged.form, judged.form.reconstruct, judged.params)
    bare = inputs.kept(f'ablated.{unit:04d}', lambda: _ablated(unit, inputs))
    sums = {'ce': ce_WT, 'kl': kl_WT, 'clean_ce': block.ce_WT} | bare
    predicting_WT = predicting(block)
    record = {name: (by_WT * predicting_WT).sum(axis=1, dtype=np.float64).tolist() for name, by_WT in sums.items()}
    return Unit(record | {'tokens': predicting_WT.sum(axis=1).tolist()})

  def values(self, units: list[Unit]) -> dict[str, Value]:
    records = [unit.record for unit in units]
    sums = {name: estimate.column(records, name) for name in records[0]}
    tokens, clean = sums['tokens'], sums['clean_ce']
    found = {
      'ce': estimate.ratio(sums['ce'], tokens, _NATS),
      'clean_ce': estimate.ratio(clean, tokens, _NATS),
      'delta_ce': estimate.ratio(sums['ce'] - clean, tokens, _NATS),
      'kl': estimate.ratio(sums['kl'], tokens, _NATS),
    }
    for name in ('zero', 'mean'):
      ablated = sums[f'{name}_ce']
      # 1 - a / b has the error of a / b.
      lost = estimate.ratio(sums['ce'] - clean, ablated - clean, 'share')
      found |= {
        f'recovered_{name}': dataclasses.replace(lost, value=1 - lost.value),
        f'{name}_delta_ce': estimate.ratio(ablated - clean, tokens, _NATS),
        f'{name}_kl': estimate.ratio(sums[f'{name}_kl'], tokens, _NATS),
      }
    return found

  def flops(self, judged: Judged, inputs: 'Inputs') -> float:
    size, tokens = judged.form.size, inputs.count('held_out') * inputs.window_tokens
    subject, arch = inputs.subject, inputs.subject.arch
    last = f'resid_post.{arch.n_layers - 1}'
    blocks = subject.flops(last, inputs.window_tokens) - subject.flops(inputs.site, inputs.window_tokens)
    return tokens * (blocks + 4 * arch.d_model * arch.vocabulary + 4 * size.n_latents * size.d_model)


def predicting(block: 'Block') -> np.ndarray:
  """Which positions [W, T - 1] count and have a next token in the window."""
  counts_WT = np.zeros(block.x_WTD.shape[:2])
  np.put_along_axis(counts_WT, block.places_WT, 1.0, axis=1)
  return counts_WT[:, :-1]


def _ablated(unit: int, inputs: 'Inputs') -> dict[str, np.ndarray]:
  """The same with nothing, and with the mean activation, in place of every activation: what a share is measured against."""
  found: dict[str, np.ndarray] = {}
  for name, value_D in (('zero', np.zeros_like(inputs.mean_D)), ('mean', inputs.mean_D)):
    found[f'{name}_ce'], found[f'{name}_kl'] = inputs.spliced(unit, 'constant', _constant, value_D)
  return found


def _constant(value_D: Any, x_WTD: Any) -> Any:
  import jax.numpy as jnp

  return jnp.broadcast_to(value_D, x_WTD.shape)
