"""What is left of the model when latents are replaced by what their explanations say: explanation reconstruction.

Gao et al. 2024, section 4.3. Each latent takes the value that its trie predicts, times a factor fitted to training text;
a latent that is not explained is 0. The decoder makes activations of these, with the mean and norm of the true ones, and
the model goes on with them. Beside that stand the true latents, and a bigram model, on the same windows.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np

from sae_jax.codes import Dense
from sae_jax.measures import by_latent, estimate, explained, tries
from sae_jax.measures.bank import Asked
from sae_jax.measures.bigram import bigram
from sae_jax.measures.downstream import Downstream, predicting
from sae_jax.measures.inputs import BLOCK_WINDOWS, Inputs
from sae_jax.measures.kept import Arrays
from sae_jax.measures.measure import Judged, Unit, Value
from sae_jax.measures.names import VERSIONS

_NATS = 'nats a token'


@dataclasses.dataclass(frozen=True)
class Simulate:
  """Settings: those of `bank.Asked`, and

  Attributes:
    bigram_windows: of the training text that the bigram model counts.
  """

  NAME: ClassVar[str] = 'simulate'

  windows: int = Asked.windows
  suffix: int = Asked.suffix
  firings: int = Asked.firings
  pad: str = Asked.pad
  bigram_windows: int = 2048

  @property
  def asked(self) -> Asked:
    return Asked(self.windows, self.suffix, self.firings, self.pad)

  def units(self, inputs: Inputs) -> int:
    return inputs.blocks('held_out')

  def run(self, unit: int, judged: Judged, inputs: Inputs) -> Unit:
    """One block of held-out windows: for each window the sums over the tokens that are predicted at counted positions."""
    block, form = inputs.block('held_out', unit), judged.form
    simulated_WTF = self._simulated(unit, judged, inputs)

    def edit(params: Any, x_WTD: jax.Array, simulated_WTF: jax.Array) -> jax.Array:
      _, mean_B1, norm_B1 = form.unit(x_WTD.reshape(-1, x_WTD.shape[-1]))
      codes = Dense(simulated_WTF.reshape(-1, simulated_WTF.shape[-1]))
      return (form.rebuilt(params, codes) * norm_B1 + mean_B1).reshape(x_WTD.shape)

    found = {
      '': inputs.spliced(unit, ('simulated', form), edit, judged.params, simulated_WTF),
      'true_': inputs.spliced(unit, form, form.reconstruct, judged.params),
      'bigram_': tuple(bigram(unit, inputs, self.bigram_windows)[name] for name in ('ce_WT', 'kl_WT')),
    }
    predicting_WT, record = predicting(block), {}
    for name, (ce_WT, kl_WT) in found.items():
      for what, by_WT in (('ce', ce_WT), ('kl', kl_WT)):
        record[name + what] = (by_WT * predicting_WT).sum(axis=1, dtype=np.float64).tolist()
    clean_WT = (block.ce_WT * predicting_WT).sum(axis=1, dtype=np.float64)
    return Unit(record | {'clean_ce': clean_WT.tolist(), 'tokens': predicting_WT.sum(axis=1).tolist()})

  def values(self, units: list[Unit]) -> dict[str, Value]:
    records = [unit.record for unit in units]
    sums = {name: estimate.column(records, name) for name in records[0]}
    found = {}
    for name in ('', 'true_', 'bigram_'):
      found[f'{name}kl'] = estimate.ratio(sums[f'{name}kl'], sums['tokens'], _NATS)
      found[f'{name}delta_ce'] = estimate.ratio(sums[f'{name}ce'] - sums['clean_ce'], sums['tokens'], _NATS)
    # On the same windows, so their errors are of the differences themselves.
    for name in ('true', 'bigram'):
      found[f'kl_over_{name}'] = estimate.ratio(sums['kl'] - sums[f'{name}_kl'], sums['tokens'], _NATS)
      found[f'ce_over_{name}'] = estimate.ratio(sums['ce'] - sums[f'{name}_ce'], sums['tokens'], _NATS)
    return found

  def flops(self, judged: Judged, inputs: Inputs) -> float:
    """Twice that of the downstream loss, beside the explanations."""
    return 2 * Downstream().flops(judged, inputs)

  def _simulated(self, unit: int, judged: Judged, inputs: Inputs) -> np.ndarray:
    """Simulated latents [W, T, F] of a held-out block; 0 at positions that do not count."""
    bank = explained.bank_of(inputs, self.asked)
    settings = [VERSIONS['n2g'], VERSIONS['simulate'], bank.identity, *dataclasses.astuple(self.asked)]
    made = inputs.kept_of(judged, 'simulated', settings, lambda: self._simulate(judged, inputs))
    block = inputs.block('held_out', unit)
    first = unit * BLOCK_WINDOWS * block.places_WT.shape[1]
    some = slice(*np.searchsorted(made['token_A'], [first, first + block.places_WT.size]))
    token_A, latent_A = made['token_A'][some] - first, made['latent_A'][some]
    window_A = token_A // block.places_WT.shape[1]
    found_WTF = np.zeros((*block.windows.ids_WT.shape, judged.form.size.n_latents), np.float32)
    found_WTF[window_A, block.places_WT.reshape(-1)[token_A], latent_A] = made['value_A'][some]
    return found_WTF

  def _simulate(self, judged: Judged, inputs: Inputs) -> Arrays:
    """The simulated latents of all held-out tokens that are not 0, by token."""
    train, held_out = (by_latent.codes(stream, judged, inputs) for stream in ('train', 'held_out'))
    examples = explained.bank_of(inputs, self.asked).examples(judged)
    parts = []
    for i in range(explained.SHARES):
      share = explained.share(i, judged, inputs, self.asked, 'simplified')
      for e, trie in zip(share.range, share.tries, strict=True):
        latent = int(examples.latent_E[e])
        where_A, value_A = tries.predict(trie, held_out.text)
        scaled_A = value_A * scale(*tries.predict(trie, train.text), *train.of(latent))
        parts.append((where_A, np.full(len(where_A), latent), scaled_A))
    empty = (np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    token_A, latent_A, value_A = (np.concatenate(column) for column in zip(*[*parts, empty], strict=True))
    order_A = np.argsort(token_A, kind='stable')
    return {
      'token_A': token_A[order_A].astype(np.int32),
      'latent_A': latent_A[order_A].astype(np.int32),
      'value_A': value_A[order_A].astype(np.float32),
    }


def scale(where_A: np.ndarray, said_A: np.ndarray, true_A: np.ndarray, value_A: np.ndarray) -> float:
  """The factor of predicted values that is best in least squares: E[s a] / E[s^2]. 1 where nothing is predicted.

  Args:
    where_A, said_A: where a latent is predicted to be active, and its predicted values s.
    true_A, value_A: where it is active, and its values a.
  """
  if not len(where_A):
    return 1.0
  _, said, true = np.intersect1d(where_A, true_A, assume_unique=True, return_indices=True)
  over = (said_A[said].astype(np.float64) * value_A[true]).sum()
  return float(over / (said_A.astype(np.float64) ** 2).sum())
