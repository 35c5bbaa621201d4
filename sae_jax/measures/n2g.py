"""How well patterns of tokens explain latents: precision and recall on text that the patterns were not made from.

Neuron to Graph (Foote et al. 2023), simplified as in Gao et al. 2024, section 4.3. A latent is explained from 16 tokens
of the training text where it is active; see `explain` and `bank`. Then its trie says at which held-out tokens it is
active. Tokens have their natural density: nearly all are negative. A latent that is active too seldom is not explained,
nor is one whose trie is empty: by the original rule, one that reaches half of its largest activation at no example.
Arrays of a unit are per explained latent: see `_FIELDS`, and the tries as `tries.Table`.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from sae_jax.measures import by_latent, estimate, explain, explained, original, tries
from sae_jax.measures.bank import EXAMPLES, Asked, Bank, Examples
from sae_jax.measures.explained import SHARES, bank_of
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged, Unit, Value

PARTS = 16  # in which the prompts of an autoencoder are read
_TESTS = ('', 'last_token_', 'token_max_')
# At held-out tokens: where it is active, where each test says so, and where both.
_FIELDS = ('true_E', *(f'{test}{name}_E' for test in _TESTS for name in ('predicted', 'hits')))


@dataclasses.dataclass(frozen=True)
class N2G:
  """Settings: those of `bank.Asked`, and

  Attributes:
    rule: 'simplified', or 'original' for the graph of Foote et al.; see `original`.
  """

  NAME: ClassVar[str] = 'n2g'

  windows: int = Asked.windows
  suffix: int = Asked.suffix
  firings: int = Asked.firings
  pad: str = Asked.pad
  rule: str = 'simplified'

  @property
  def asked(self) -> Asked:
    return Asked(self.windows, self.suffix, self.firings, self.pad)

  def units(self, inputs: Inputs) -> int:
    del inputs
    return PARTS + SHARES

  def run(self, unit: int, judged: Judged, inputs: Inputs) -> Unit:
    """First the bank learns the prompts of all examples, in parts. Then the latents are explained and judged, in shares."""
    bank = bank_of(inputs, self.asked)
    examples = bank.examples(judged)
    place_N = np.unique(examples.place_EX)
    if unit < PARTS:
      bank.extend(place_N)
      bank.fill(place_N, unit, PARTS)
      return Unit({'tokens_of_examples': len(place_N[unit::PARTS])})
    share = explained.share(unit - PARTS, judged, inputs, self.asked, self.rule)
    some = slice(share.range.start, share.range.stop)
    truth = by_latent.codes('held_out', judged, inputs)
    strong = []
    if self.rule == 'original':
      strong = inputs.once('strong', (judged, bank), lambda: bank.strong(judged, examples, original.LEAST))
    arrays = self._judge(share, truth, bank, examples, strong)
    arrays |= {'starts_E': share.starts_E, 'latent_E': examples.latent_E[some], 'firings_E': examples.firings_E[some]}
    explained_E = np.array([bool(trie.children) for trie in share.tries], bool)
    arrays = {name: array[explained_E] for name, array in arrays.items()}
    arrays |= tries.table([trie for trie in share.tries if trie.children])._asdict()
    counts = {'explained': int(explained_E.sum()), 'latents': judged.form.size.n_latents, 'tokens': len(truth.text)}
    return Unit(counts, arrays)

  def _judge(
    self, share: explained.Share, truth: by_latent.Codes, bank: Bank, examples: Examples, strong: list[np.ndarray]
  ) -> dict[str, np.ndarray]:
    found = {name: np.zeros(len(share.range), np.int64) for name in _FIELDS}
    is_original = self.rule == 'original'
    for e, (i, trie) in enumerate(zip(share.range, share.tries, strict=True)):
      where_A, value_A = truth.of(examples.latent_E[i])
      true_B = np.zeros(len(truth.text), bool)
      # What counts as active counts so for the simpler explanations too.
      least = original.LEAST * examples.max_E[i] if is_original else 0
      true_B[where_A[value_A >= least]] = True
      last_N = bank.tokens_before(examples.place_EX[i][examples.value_EX[i] >= least])[:, 0]
      found['true_E'][e] = true_B.sum()
      tests = {
        '': original.active(trie, truth.text) if is_original else tries.predict(trie, truth.text)[0],
        'last_token_': truth.text.where_any(last_N),
        'token_max_': truth.text.where_any(strong[i] if is_original else examples.seen(i)),
      }
      for test, predicted_A in tests.items():
        found[f'{test}predicted_E'][e] = len(predicted_A)
        found[f'{test}hits_E'][e] = true_B[predicted_A].sum()
    return found

  def values(self, units: list[Unit]) -> dict[str, Value]:
    """Means over explained latents. What is undefined for a latent, as the precision of one never predicted, is left out."""
    shares = [unit for unit in units if unit.arrays]
    if not shares:
      return {}
    latents, tokens = shares[0].record['latents'], shares[0].record['tokens']
    of = {
      name: np.concatenate([unit.arrays[name] for unit in shares]).astype(np.float64) for name in (*_FIELDS, 'starts_E')
    }
    n = len(of['true_E'])
    found = {'eligible': Value(n / latents, None, 'share of latents')}
    if not n:
      return found
    if self.rule == 'simplified':  # the other one has no patterns of a beginning
      found['start_share'] = Value(float(of['starts_E'].mean() / EXAMPLES), None, 'share of examples')
    found['silent'] = Value(float((of['predicted_E'] == 0).mean()), None, 'share of explained latents')
    for test in _TESTS:
      scores = scored(of['true_E'], of[f'{test}predicted_E'], of[f'{test}hits_E'], tokens)
      for name, score_E in scores.items():
        if (defined_E := score_E[np.isfinite(score_E)]).size:
          found[test + name] = estimate.mean(defined_E, 'share of tokens')
    both = scored(of['true_E'], of['predicted_E'], of['hits_E'], tokens)
    illusory_E = (both['recall'] > explain.HALF) & (both['precision'] < explain.HALF)
    found['illusory'] = Value(float(illusory_E.mean()), None, 'share of explained latents')
    return found

  def flops(self, judged: Judged, inputs: Inputs) -> float:
    """With the encodings of two prompts a latent, and without the model, whose part the bank keeps."""
    size, rows = judged.form.size, (self.suffix + 1) * (self.suffix + 2) / 2
    reads = 1 + (self.rule == 'original')  # which tokens reach half of the largest value is read after that is known
    encoded = reads * self.windows * inputs.window_tokens + 2 * size.n_latents * rows
    return encoded * 2.0 * size.n_latents * size.d_model


def scored(true_E: np.ndarray, predicted_E: np.ndarray, hits_E: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
  """Precision, recall and F1 of latents; NaN where one is undefined.

  'precision_balanced' is the precision if half of all tokens were positive.
  """
  with np.errstate(invalid='ignore', divide='ignore'):
    precision_E, recall_E = hits_E / predicted_E, hits_E / true_E
    wrong_E = (predicted_E - hits_E) / (tokens - true_E)
    return {
      'precision': precision_E,
      'recall': recall_E,
      'f1': 2 * hits_E / (true_E + predicted_E),
      'precision_balanced': recall_E / (recall_E + wrong_E),
    }
