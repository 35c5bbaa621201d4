"""Explanations by tokens: the bank against the model itself, tries against the algorithm spelled out, planted latents."""

import numpy as np
import pytest

from sae_jax.measures import explain, explained, n2g, original, tries
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


def text(*windows: list[int]) -> tries.Text:
  """Windows of equal length; 0 is the start token."""
  ids_WT = np.array([[0, *window] for window in windows], np.int32)
  return tries.Text(ids_WT, np.tile(np.arange(1, ids_WT.shape[1]), (len(windows), 1)))


class Model:
  """A latent that is written down: from the tokens of a prompt its activation at the last one."""

  def __init__(self, act, pad: int = 99, cap: int = 7):
    self.act, self.pad, self.suffix = act, pad, cap

  def explain(self, *examples: list[int]) -> tries.Trie:
    bank = Bank.__new__(Bank)
    bank.suffix, bank._pad = self.suffix, self.pad
    found, tokens, lengths, acts = [], [], [], []
    for example in examples:
      row = []
      padded = [self.pad] * self.suffix + example
      for length in range(1, self.suffix + 1):
        piece = padded[-length:]
        row += [self.act(piece)] + [self.act([*piece[:i], self.pad, *piece[i + 1 :]]) for i in range(length)]
      found.append([*row, self.act([self.pad, *padded[-self.suffix :]])])
      tokens.append([*example[::-1], *[-1] * self.suffix][: self.suffix])
      lengths.append(min(len(example), self.suffix))
      acts.append(self.act(example))
    n = len(examples)
    bank.tokens_before = lambda _: np.array(tokens, int).reshape(n, self.suffix)
    bank.lengths = lambda _: np.array(lengths, int)
    found_NR = np.array(found).reshape(n, bank.rows)
    return explain.simplified(explain.pieces(bank, np.arange(n), np.array(acts), found_NR))


def says(trie: tries.Trie, where: tries.Text) -> list[float]:
  at_A, value_A = tries.predict(trie, where)
  found_B = np.zeros(len(where))
  found_B[at_A] = value_A
  return found_B.tolist()


def test_a_latent_of_the_first_position_learns_any_token_at_the_beginning():
  trie = Model(lambda prompt: 2.0 if len(prompt) == 1 else 0.0).explain([5], [6])
  assert shape(trie) == {tries.ANY: (False, {tries.START: (True, {})})}
  assert says(trie, text([7, 5, 5])) == [2.0, 0.0, 0.0]


def test_a_latent_of_one_token_learns_that_token():
  trie = Model(lambda prompt: 3.0 * (prompt[-1] == 5)).explain([1, 2, 5], [5], [5, 5])
  assert shape(trie) == {5: (True, {})}
  assert says(trie, text([5, 1, 5])) == [3.0, 0.0, 3.0]


def test_a_latent_with_a_gap_learns_any_and_spans_one_token_only():
  trie = Model(lambda prompt: float(len(prompt) > 2 and prompt[-3] == 1 and prompt[-1] == 3)).explain([9, 1, 2, 3])
  assert shape(trie) == {3: (False, {tries.ANY: (False, {1: (True, {})})})}
  assert says(trie, text([1, 8, 3, 0], [1, 8, 8, 3], [3, 3, 3, 3])) == [0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]


def test_a_latent_that_is_never_active_is_predicted_nowhere():
  assert says(Model(lambda prompt: 0.0).explain(), text([1, 2, 3])) == [0.0, 0.0, 0.0]


def test_of_two_patterns_that_are_the_same_the_later_one_counts():
  trie = tries.Trie()
  trie.insert([5], 1.0)
  trie.insert([5], 2.0)
  assert says(trie, text([5])) == [2.0]


def test_the_shortest_pattern_wins_and_a_walk_never_comes_back():
  trie = tries.Trie()
  trie.insert([3, 1, 7], 1.0)
  trie.insert([3, tries.ANY, 8], 2.0)
  # After 1 only 7 is looked for, though any token and then 8 would fit.
  assert says(trie, text([8, 1, 3], [8, 2, 3], [7, 1, 3])) == [0, 0, 0, 0, 0, 2.0, 0, 0, 1.0]
  trie.insert([3], 4.0)
  assert says(trie, text([7, 1, 3])) == [0, 0, 4.0]


def test_the_cap_cuts_what_a_pattern_can_hold():
  act = lambda prompt: float(len(prompt) > 3 and prompt[-4] == 1)  # noqa: E731
  assert shape(Model(act, cap=7).explain([1, 2, 3, 4])) == {
    tries.ANY: (False, {tries.ANY: (False, {tries.ANY: (False, {1: (True, {})})})})
  }
  # No piece of two tokens keeps the activation. All tokens of the longest then count as needed.
  assert shape(Model(act, cap=2).explain([1, 2, 3, 4])) == {4: (False, {3: (False, {tries.START: (True, {})})})}


def test_a_table_holds_tries_and_is_refused_where_it_contradicts_itself():
  made = [Model(lambda prompt: 3.0 * (prompt[-1] == 5)).explain([1, 2, 5]), tries.Trie(), tries.Trie()]
  made[2].insert([3, tries.ANY, tries.START], 2.0)
  table = tries.table(made)
  assert [(shape(trie), leaves(trie)) for trie in tries.read(table)] == [(shape(trie), leaves(trie)) for trie in made]
  for broken in (
    table._replace(parent_N=table.parent_N + 5),
    table._replace(token_N=table.token_N[:-1]),
    table._replace(first_E1=table.first_E1[::-1]),
  ):
    with pytest.raises(ValueError, match=r'fit each other|hangs from'):
      list(tries.read(broken))


def test_scores_of_latents_by_hand():
  found = n2g.scored(np.array([4, 4, 0]), np.array([2, 0, 3]), np.array([1, 0, 0]), 104)
  np.testing.assert_allclose(found['precision'], [0.5, np.nan, 0])
  np.testing.assert_allclose(found['recall'], [0.25, 0, np.nan])
  np.testing.assert_allclose(found['f1'], [1 / 3, 0, 0])
  np.testing.assert_allclose(found['precision_balanced'], [0.25 / (0.25 + 0.01), np.nan, np.nan])


def test_the_original_graph_merges_what_follows_under_any_token():
  of = explain.Pieces(
    length_N=np.array([3, 3, 2]),
    value_N=np.ones(3),
    movable_N=np.ones(3, bool),
    token_NL=np.array([[3, 2, 1], [3, 4, 5], [3, 6, 0]]),
    matters_NL=np.array([[True, False, True], [True, True, True], [False, False, False]]),
  )
  trie = original.trie(of, np.array([1.0, 0.5, 0.4]))
  # The third example is too weak. Of the second, what follows 4 may follow any token, and 4 itself is dropped.
  assert shape(trie) == {3: (False, {tries.ANY: (False, {1: (True, {}), 5: (True, {})})})}
  assert original.active(trie, text([1, 9, 3], [5, 4, 3], [2, 4, 3])).tolist() == [2, 5]
  deep = tries.Trie()
  deep.insert([3], 0.4)
  deep.insert([3, 2], 0.9)
  assert original.active(deep, text([2, 3], [1, 3])).tolist() == [1]
