"""How well patterns of tokens explain latents: precision and recall on text that the patterns were not made from.

Neuron to Graph (Foote et al. 2023), simplified as in Gao et al. 2024, section 4.3. A latent is explained from 16 tokens
of the training text where it is active; see `explain` and `bank`. Then its trie says at which held-out tokens it is
active. Tokens have their natural density: nearly all are negative. A latent that is active too seldom is not explained.
Arrays of a unit are per explained latent: see `_FIELDS`, and the tries as `tries.Table`.
"""

import dataclasses
from typing import ClassVar, NamedTuple

import numpy as np

from sae_jax.measures import estimate, explain, original, tries
from sae_jax.measures.active import active
from sae_jax.measures.bank import EXAMPLES, Asked, Bank, Examples
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged, Unit, Value

PARTS = 16  # in which the prompts of an autoencoder are read
SHARES = 8  # in which its latents are explained
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
    share = unit - PARTS
    first, last = (len(examples.latent_E) * i // SHARES for i in (share, share + 1))
    explained, starts_E = tries_of(bank, judged, examples, first, last, self.rule)
    text, truth = _held_out(judged, inputs)
    arrays = _judge(text, truth, bank, examples, range(first, last), explained, self.rule)
    arrays |= {'starts_E': starts_E} | tries.table(explained)._asdict()
    arrays |= {'latent_E': examples.latent_E[first:last], 'firings_E': examples.firings_E[first:last]}
    counts = {'explained': last - first, 'latents': judged.form.size.n_latents, 'tokens': len(text)}
    return Unit(counts, arrays)

  def values(self, units: list[Unit]) -> dict[str, Value]:
    """Means over explained latents. What is undefined for a latent, as the precision of one never predicted, is left out."""
    shares = [unit for unit in units if unit.arrays]
    if not shares:
      return {}
    latents, tokens = shares[0].record['latents'], shares[0].record['tokens']
    of = {
      name: np.concatenate([unit.arrays[name] for unit in shares]).astype(np.float64) for name in (*_FIELDS, 'starts_E')
    }
    explained = len(of['true_E'])
    found = {'eligible': Value(explained / latents, None, 'share of latents')}
    if not explained:
      return found
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
    encoded = self.windows * inputs.window_tokens + 2 * size.n_latents * rows
    return encoded * 2.0 * size.n_latents * size.d_model


def bank_of(inputs: Inputs, asked: Asked) -> Bank:
  """The bank of some inputs. What it read stays in memory from one unit to the next."""
  return inputs.once('bank', asked, lambda: Bank(inputs, asked))


def tries_of(
  bank: Bank, judged: Judged, examples: Examples, first: int, last: int, rule: str
) -> tuple[list[tries.Trie], np.ndarray]:
  """The tries of some of the latents that can be explained, and how many examples of each hold at the beginning only."""
  place_EX, value_EX = examples.place_EX[first:last], examples.value_EX[first:last]
  place_N, value_N = place_EX.reshape(-1), value_EX.reshape(-1)
  bank.extend(place_N)
  found_NR = bank.activations(judged, place_N, np.repeat(examples.latent_E[first:last], EXAMPLES))
  all_N = explain.pieces(bank, place_N, value_N, found_NR)
  made = []
  for e in range(last - first):
    of = explain.Pieces(*(a[e * EXAMPLES : (e + 1) * EXAMPLES] for a in all_N))
    if rule == 'original':
      made.append(original.trie(of, value_EX[e] / examples.max_E[first + e]))
    else:
      made.append(explain.simplified(of))
  return made, (~all_N.movable_N).reshape(-1, EXAMPLES).sum(axis=1)


class _Truth(NamedTuple):
  """The codes of the held-out tokens by latent: where_A[first_F1[f] : first_F1[f + 1]] are its tokens, in order."""

  first_F1: np.ndarray
  where_A: np.ndarray
  value_A: np.ndarray


def _held_out(judged: Judged, inputs: Inputs) -> tuple[tries.Text, _Truth]:
  return inputs.once('held_out_codes', judged, lambda: _read_held_out(judged, inputs))


def _read_held_out(judged: Judged, inputs: Inputs) -> tuple[tries.Text, _Truth]:
  blocks = [inputs.block('held_out', i) for i in range(inputs.blocks('held_out'))]
  text = tries.Text(
    np.concatenate([block.windows.ids_WT for block in blocks]), np.concatenate([block.places_WT for block in blocks])
  )
  parts, before = [], 0
  for block in blocks:
    token_A, latent_A, value_A = active(block.counted_BD.reshape(*block.places_WT.shape, -1), judged, inputs)
    parts.append((latent_A, token_A + before, value_A))
    before += block.places_WT.size
  latent_A, where_A, value_A = (np.concatenate(column) for column in zip(*parts, strict=True))
  order_A = np.argsort(latent_A, kind='stable')
  first_F1 = np.searchsorted(latent_A[order_A], np.arange(judged.form.size.n_latents + 1))
  return text, _Truth(first_F1, where_A[order_A], value_A[order_A])


def _judge(
  text: tries.Text,
  truth: _Truth,
  bank: Bank,
  examples: Examples,
  which: range,
  explained: list[tries.Trie],
  rule: str,
) -> dict[str, np.ndarray]:
  found = {name: np.zeros(len(which), np.int64) for name in _FIELDS}
  for e, (i, trie) in enumerate(zip(which, explained, strict=True)):
    latent = examples.latent_E[i]
    of_A = slice(truth.first_F1[latent], truth.first_F1[latent + 1])
    least = original.LEAST * examples.max_E[i] if rule == 'original' else 0.0
    true_A = truth.where_A[of_A][truth.value_A[of_A] > least]
    found['true_E'][e] = len(true_A)
    place_X = examples.place_EX[i]
    seen = examples.seen_token_S[examples.seen_first_E1[i] : examples.seen_first_E1[i + 1]]
    tests = {
      '': original.active(trie, text) if rule == 'original' else tries.predict(trie, text)[0],
      'last_token_': text.where_any(bank.tokens_before(place_X)[:, 0]),
      'token_max_': text.where_any(seen),
    }
    for test, predicted_A in tests.items():
      found[f'{test}predicted_E'][e] = len(predicted_A)
      found[f'{test}hits_E'][e] = len(np.intersect1d(predicted_A, true_A, assume_unique=True))
  return found


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
