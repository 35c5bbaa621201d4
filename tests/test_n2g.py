"""Explanations by tokens: the bank against the model itself, tries against the algorithm spelled out, planted latents."""

import numpy as np
import pytest

from sae_jax.measures import explained, tries
from sae_jax.measures.bank import Asked, Bank
from sae_jax.measures.measure import Judged
from tests import measured
from tests.test_harvest import toy  # noqa: F401

ASKED = Asked(windows=24, suffix=4, firings=16)


@pytest.fixture
def shared(toy, tmp_path):  # noqa: F811
  return measured.inputs(tmp_path / 'inputs')


@pytest.fixture
def judged() -> Judged:
  return measured.judged(measured.cell())


def direct(shared, judged: Judged, prompt: list[int]) -> np.ndarray:
  """All latents at the last token of a prompt, one call of the model."""
  subject, form = shared.subject, judged.form
  x_D = np.asarray(subject.residual(np.array([[subject.start_token, *prompt]], np.int32), shared.site))[0, -1]
  codes = form.codes(judged.params, form.unit(x_D[None])[0])
  z_F = np.zeros(form.size.n_latents, np.float32)
  z_F[np.asarray(codes.idx_BK)[0]] = np.asarray(codes.z_BK)[0]
  return z_F


def spelled_out(
  bank: Bank, shared, judged: Judged, place: int, latent: int, act: float, pad: int
) -> tuple[list[int], float]:
  """The path and the value of one example, by the algorithm with direct calls of the model."""
  window, position = divmod(place, shared.window_tokens)
  text = bank.windows.ids_WT[window, 1 : position + 1].tolist()
  most = min(len(text), bank.suffix)
  for length in range(1, most + 1):
    piece = text[-length:]
    a = direct(shared, judged, piece)[latent]
    if a / act >= 0.5:
      break
  else:
    piece, a = text[-most:], act
  path = []
  for i in reversed(range(len(piece))):
    changed = [*piece[:i], pad, *piece[i + 1 :]]
    path.append(piece[i] if 1 - direct(shared, judged, changed)[latent] / a >= 0.5 else tries.ANY)
  if direct(shared, judged, [pad, *piece])[latent] / act < 0.5:
    path.append(tries.START)
  return path, float(a)


def test_tries_from_the_bank_are_those_of_direct_calls_token_for_token(shared, judged):
  bank = Bank(shared, ASKED)
  examples = bank.examples(judged)
  assert len(examples.latent_E) >= 8
  shares = [explained.share(i, judged, shared, ASKED, 'simplified') for i in range(explained.SHARES)]
  made, starts_E = [trie for one in shares for trie in one.tries], np.concatenate([one.starts_E for one in shares])
  (pad,) = shared.subject.encode([' _'])[0].tolist()
  starts = long = wild = 0
  for e, latent in enumerate(examples.latent_E):
    wanted = tries.Trie()
    for place, act in zip(examples.place_EX[e], examples.value_EX[e], strict=True):
      path, value = spelled_out(bank, shared, judged, int(place), int(latent), float(act), pad)
      wanted.insert(path, value)
      starts, long, wild = starts + (path[-1] == tries.START), long + (len(path) > 2), wild + (tries.ANY in path)
    assert shape(made[e]) == shape(wanted)
    assert np.allclose(leaves(made[e]), leaves(wanted), rtol=1e-4)
  assert starts == starts_E.sum() and min(starts, long, wild) > 5  # every kind of pattern was compared


def shape(trie: tries.Trie) -> dict:
  return {token: (child.value is not None, shape(child)) for token, child in trie.children.items()}


def leaves(trie: tries.Trie) -> list[float]:
  own = [] if trie.value is None else [trie.value]
  return own + [value for child in trie.children.values() for value in leaves(child)]
