"""The tries of an autoencoder, made once for all that asks for them."""

import dataclasses
from typing import NamedTuple

import numpy as np

from sae_jax.measures import explain, original, tries
from sae_jax.measures.bank import EXAMPLES, Asked, Bank
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.kept import Arrays
from sae_jax.measures.measure import Judged
from sae_jax.measures.names import VERSIONS

SHARES = 8  # in which the latents of an autoencoder are explained


class Share(NamedTuple):
  """A part of the latents that can be explained.

  Attributes:
    range: which of the bank's examples these are.
    tries: of each latent.
    starts_E: how many examples of each hold at the beginning of a text only.
  """

  range: range
  tries: list[tries.Trie]
  starts_E: np.ndarray


def bank_of(inputs: Inputs, asked: Asked) -> Bank:
  """The bank of some inputs. What it read stays in memory from one unit to the next."""
  return inputs.once('bank', asked, lambda: Bank(inputs, asked))


def share(i: int, judged: Judged, inputs: Inputs, asked: Asked, rule: str) -> Share:
  """One of `SHARES` parts of the latents of an autoencoder, explained by a rule of `n2g.N2G`."""
  bank = bank_of(inputs, asked)
  n = len(bank.examples(judged).latent_E)
  settings = [VERSIONS['n2g'], bank.identity, *dataclasses.astuple(asked), rule]
  which = range(n * i // SHARES, n * (i + 1) // SHARES)
  arrays = dict(inputs.kept_of(judged, f'tries.{i}', settings, lambda: _explain(which, judged, inputs, bank, rule)))
  starts_E = arrays.pop('starts_E')
  return Share(which, list(tries.read(tries.Table(**arrays))), starts_E)


def _explain(which: range, judged: Judged, inputs: Inputs, bank: Bank, rule: str) -> Arrays:
  examples, some = bank.examples(judged), slice(which.start * EXAMPLES, which.stop * EXAMPLES)
  place_N = examples.place_EX.reshape(-1)

  def activations() -> np.ndarray:
    bank.extend(place_N)
    return bank.activations(judged, place_N, np.repeat(examples.latent_E, EXAMPLES))

  # Shares have tokens in common, so all are encoded at once.
  found_NR = inputs.once('activations on prompts', (judged, bank), activations)
  all_N = explain.pieces(bank, place_N[some], examples.value_EX.reshape(-1)[some], found_NR[some])
  made = []
  for e, i in enumerate(which):
    of = explain.Pieces(*(a[e * EXAMPLES : (e + 1) * EXAMPLES] for a in all_N))
    if rule == 'original':
      made.append(original.trie(of, examples.value_EX[i] / examples.max_E[i]))
    else:
      made.append(explain.simplified(of))
  return tries.table(made)._asdict() | {'starts_E': (~all_N.movable_N).reshape(-1, EXAMPLES).sum(axis=1)}
