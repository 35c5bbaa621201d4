"""Explanations by tokens: the bank against the model itself, tries against the algorithm spelled out, planted latents."""

import dataclasses
import itertools

import numpy as np
import pytest

from sae_jax.codes import Sparse
from sae_jax.errors import UserError
from sae_jax.measures import by_latent, explain, explained, n2g, original, simulate, tries
from sae_jax.measures.bank import EXAMPLES, Asked, Bank, rank
from sae_jax.measures.bigram import bigram
from sae_jax.measures.inputs import Inputs
from sae_jax.measures.measure import Judged, Unit
from sae_jax.subjects import text as documents
from tests import measured
from tests.test_harvest import toy, toy_text  # noqa: F401

ASKED = Asked(windows=24, suffix=4, firings=16)


@pytest.fixture
def shared(toy, tmp_path):  # noqa: F811
  return measured.inputs(tmp_path / 'inputs')


@pytest.fixture
def judged() -> Judged:
  return measured.judged(measured.cell())


def direct(shared, judged: Judged, prompt: list[int]) -> np.ndarray:
  """All latents at the last token of a prompt, one call of the model."""
  return shared.once(f'latents of {prompt}', judged, lambda: called(shared, judged, prompt))


def called(shared, judged: Judged, prompt: list[int]) -> np.ndarray:
  subject, form = shared.subject, judged.form
  x_D = np.asarray(subject.residual(np.array([[subject.start_token, *prompt]], np.int32), shared.site))[0, -1]
  codes = form.codes(judged.params, form.unit(x_D[None])[0])
  if not isinstance(codes, Sparse):
    return np.asarray(codes.z_BF)[0]
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


@pytest.mark.parametrize('family, least', [('topk', 8), ('relu', 12)])
def test_tries_from_the_bank_are_those_of_direct_calls_token_for_token(shared, family, least):
  judged = measured.judged(measured.of_family(family))
  bank = Bank(shared, ASKED)
  examples = bank.examples(judged)
  assert len(examples.latent_E) >= least
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
    table._replace(first_E1=table.first_E1[:0]),
    table._replace(token_N=table.token_N - 2),
  ):
    with pytest.raises(ValueError, match=r'fit each other|hangs from|no token'):
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


def test_a_bank_is_filled_by_parts_and_grows_without_changing(shared, judged, tmp_path):
  """Tokens that are added later leave the others as they are, bit for bit, whatever they are kept beside."""
  apart = Bank(measured.inputs(tmp_path / 'apart'), ASKED)
  place_N = np.unique(apart.examples(judged).place_EX)
  latent_N = np.full(len(place_N), apart.examples(judged).latent_E[0])
  for some in (place_N[::3], place_N[1::2], place_N):
    apart.extend(some)
  for part in (1, 0):
    apart.fill(place_N, part, 2)
  together = Bank(shared, ASKED)
  together.extend(place_N)
  found = [bank.activations(judged, place_N, latent_N) for bank in (apart, together)]
  np.testing.assert_array_equal(*found)
  assert found[0].any()


def test_a_bank_of_another_text_subject_or_cap_is_another(shared, tmp_path, monkeypatch):
  names = {Bank(shared, ASKED).identity}
  names.add(Bank(shared, dataclasses.replace(ASKED, suffix=3)).identity)
  names.add(Bank(shared, dataclasses.replace(ASKED, windows=20)).identity)
  names.add(Bank(shared, dataclasses.replace(ASKED, pad='q')).identity)
  monkeypatch.setattr(documents, 'load', lambda name: [(name, body[::-1]) for name, body in toy_text(name)])
  data = dataclasses.replace(measured.cell().data, text='backwards')  # texts that were read are held by name
  names.add(Bank(Inputs(data, measured.SCOPE, str(tmp_path / 'other'), {}), ASKED).identity)
  monkeypatch.setitem(shared.subject.provenance, 'subject_sha256', 'other')
  names.add(Bank(shared, ASKED).identity)
  assert len(names) == 6


def test_a_bank_that_was_changed_is_refused(shared, tmp_path):
  bank = Bank(shared, ASKED)
  bank.extend(np.array([9, 10, 11]))
  (plan,) = tmp_path.rglob('plans/000.json')
  plan.write_bytes(plan.read_bytes().replace(b'11', b'12'))
  with pytest.raises(UserError, match='delete the folder of this bank'):
    bank.extend(np.array([9]))


def test_a_pad_that_is_not_one_token_is_refused(shared):
  for pad in ('ab', ''):
    with pytest.raises(UserError, match=r'--pad'):
      Bank(shared, dataclasses.replace(ASKED, pad=pad))


def test_pieces_that_are_too_long_and_windows_that_are_too_short_are_refused(shared, judged):
  with pytest.raises(UserError, match='lower --suffix'):
    Bank(shared, Asked(suffix=21))
  shared.window_tokens = 2
  for one in (n2g.N2G(), simulate.Simulate()):
    with pytest.raises(UserError, match=r'data\.window_tokens=2 leaves no room'):
      one.run(0, judged, shared)


def test_examples_are_where_a_latent_is_active_and_those_that_come_first(shared, judged):
  bank = Bank(shared, ASKED)
  examples = bank.examples(judged)
  assert (np.diff(examples.firings_E) <= 0).all() and (examples.firings_E >= EXAMPLES).all()
  for e, latent in enumerate(examples.latent_E[:3]):
    fires = {
      window * shared.window_tokens + position: value
      for window in range(len(bank.windows))
      for position in range(1, shared.window_tokens)
      if (value := direct(shared, judged, bank.windows.ids_WT[window, 1 : position + 1].tolist())[latent]) > 0
    }
    assert len(fires) == examples.firings_E[e]
    first = sorted(fires, key=lambda place: rank(np.array([place]))[0])[:EXAMPLES]
    assert examples.place_EX[e].tolist() == first
    np.testing.assert_allclose(examples.value_EX[e], [fires[place] for place in first], rtol=1e-3)
    np.testing.assert_allclose(examples.max_E[e], max(fires.values()), rtol=1e-3)
    seen = {int(bank.windows.ids_WT[divmod(place, shared.window_tokens)]) for place in fires}
    assert set(examples.seen(e).tolist()) == seen


def measure(one, judged: Judged, shared) -> tuple[list[Unit], dict]:
  units = [one.run(unit, judged, shared) for unit in range(one.units(shared))]
  return units, {name: value.value for name, value in one.values(units).items()}


def test_scores_are_those_of_counting_token_by_token(shared, judged, monkeypatch):
  settings = {'windows': ASKED.windows, 'suffix': ASKED.suffix, 'firings': ASKED.firings}
  units, found = measure(n2g.N2G(**settings), judged, shared)
  shares = [unit for unit in units if unit.arrays]
  tables = [tries.Table(*(unit.arrays[name] for name in tries.Table._fields)) for unit in shares]
  made = [trie for table in tables for trie in tries.read(table)]
  latents = np.concatenate([unit.arrays['latent_E'] for unit in shares])
  ids = np.concatenate([shared.block('held_out', i).windows.ids_WT for i in range(shared.blocks('held_out'))])
  recalls, precisions = [], []
  for latent, trie in zip(latents, made, strict=True):
    true = [
      direct(shared, judged, row[1 : position + 1].tolist())[latent] > 0
      for row in ids
      for position in range(1, len(row))
    ]
    said = np.array(says(trie, text(*ids[:, 1:].tolist()))) > 0
    hits = (said & np.array(true)).sum()
    recalls += [hits / sum(true)] if any(true) else []
    precisions += [hits / said.sum()] if said.any() else []
  assert found['recall'] == pytest.approx(np.mean(recalls))
  assert found['precision'] == pytest.approx(np.mean(precisions))
  assert found['eligible'] == len(latents) / measured.F and 0 < found['recall'] < 1
  assert found['token_max_recall'] >= found['last_token_recall'] > 0
  # The other rule gives other tries, and values of their own. At a higher share some latents have too weak examples.
  share = 0.9
  monkeypatch.setattr(original, 'LEAST', share)
  original_units, other = measure(n2g.N2G(**settings, rule='original'), judged, shared)
  assert other['recall'] != found['recall'] and original_units[-1].record['tokens'] == shares[-1].record['tokens']
  # By that rule a latent is active from a share of its largest value in the training text, and no pattern is of a beginning.
  examples, truth = Bank(shared, ASKED).examples(judged), by_latent.codes('held_out', judged, shared)
  assert 'start_share' in found and 'start_share' not in other
  # Without an example that reaches that there is no pattern: such a latent is not explained.
  strong_EX = examples.value_EX >= share * examples.max_E[:, None]
  some = np.flatnonzero(strong_EX.any(axis=1))
  assert 0 < other['eligible'] == len(some) / measured.F < found['eligible']
  got = {name: np.concatenate([u.arrays[name] for u in original_units if u.arrays]) for name in shares[0].arrays}
  np.testing.assert_array_equal(got['latent_E'], latents[some])
  windows_WT = Bank(shared, ASKED).windows.ids_WT
  x_BD = np.concatenate([shared.activations(windows_WT[i : i + 8])[:, 1:].reshape(-1, measured.D) for i in (0, 8, 16)])
  z_BK, idx_BK, _ = judged.form.codes(judged.params, judged.form.unit(x_BD)[0]).listed()
  for e, i in enumerate(some):
    least = share * examples.max_E[i]
    where_A, value_A = truth.of(latents[i])
    strong_A = where_A[value_A >= least]
    assert got['true_E'][e] == len(strong_A)
    # The simpler explanations too know of strong activations alone.
    last = examples.place_EX[i][strong_EX[i]]
    seen_B = ((np.asarray(idx_BK) == latents[i]) & (np.asarray(z_BK) >= least)).any(axis=1)
    tokens = {'last_token': windows_WT.reshape(-1)[last], 'token_max': windows_WT[:, 1:].reshape(-1)[seen_B]}
    for test, token_N in tokens.items():
      said = np.flatnonzero(np.isin(truth.text.token_B, token_N))
      assert got[f'{test}_predicted_E'][e] == len(said)
      assert got[f'{test}_hits_E'][e] == len(np.intersect1d(said, strong_A))
  # Other settings are never answered by what is kept of these.
  assert measure(n2g.N2G(**settings | {'firings': 1000}), judged, shared)[1] == {'eligible': 0.0}


def test_shares_of_explained_latents_by_hand():
  """Of four: one like a word, one illusory, one silent, one that is seldom right and seldom there."""
  counts = {'true_E': [9, 9, 9, 9], 'predicted_E': [8, 90, 0, 90], 'hits_E': [7, 8, 0, 2], 'starts_E': [0, 4, 16, 0]}
  baseline = {f'{test}_{name}_E': [1] * 4 for test in ('last_token', 'token_max') for name in ('predicted', 'hits')}
  unit = Unit({'latents': 16, 'tokens': 1000}, {name: np.array(a) for name, a in (counts | baseline).items()})
  found = {name: value.value for name, value in n2g.N2G().values([Unit({'tokens_of_examples': 3}), unit]).items()}
  wanted = {'eligible': 0.25, 'start_share': 20 / 64, 'silent': 0.25, 'illusory': 0.25}
  assert {name: found[name] for name in wanted} == wanted
  assert found['precision'] == pytest.approx(np.mean([7 / 8, 8 / 90, 2 / 90]))  # nothing is said of the silent one
  assert found['last_token_recall'] == pytest.approx(1 / 9)


def test_simulated_latents_are_what_tries_say_times_the_scale_of_the_training_text(shared, judged):
  one, streams = simulate.Simulate(windows=24, suffix=4, firings=16), ('train', 'held_out')
  made = one._simulate(judged, shared)
  train, held_out = (by_latent.codes(stream, judged, shared) for stream in streams)
  latents, scales = Bank(shared, ASKED).examples(judged).latent_E.tolist(), []
  shares = [explained.share(i, judged, shared, ASKED, 'simplified') for i in range(explained.SHARES)]
  for latent, trie in zip(latents, (trie for share in shares for trie in share.tries), strict=True):
    said, true = np.array(says(trie, train.text)), np.zeros(len(train.text))
    where_A, value_A = train.of(latent)
    true[where_A] = value_A
    scales.append((said * true).sum() / (said**2).sum())
    found = np.zeros(len(held_out.text))
    mine_A = made['latent_A'] == latent
    found[made['token_A'][mine_A]] = made['value_A'][mine_A]
    np.testing.assert_allclose(found, scales[-1] * np.array(says(trie, held_out.text)), rtol=1e-5)
  assert set(made['latent_A'].tolist()) <= set(latents) and min(scales) < 0.9
  # In the windows they stand where their tokens are. Other settings are never answered by what is kept of these.
  places = [shared.block('held_out', i).places_WT for i in range(shared.blocks('held_out'))]
  rows = [np.take_along_axis(one._simulated(i, judged, shared), p[..., None], axis=1) for i, p in enumerate(places)]
  whole_BF = np.concatenate([row_WTF.reshape(-1, measured.F) for row_WTF in rows])
  np.testing.assert_array_equal(whole_BF[made['token_A'], made['latent_A']], made['value_A'])
  assert (whole_BF != 0).sum() == (made['value_A'] != 0).sum() > 0
  assert not dataclasses.replace(one, firings=1000)._simulated(0, judged, shared).any()


def test_an_autoencoder_with_nothing_to_explain_has_no_scores(shared, judged):
  _, found = measure(n2g.N2G(windows=24, suffix=4, firings=1000), judged, shared)
  assert found == {'eligible': 0.0}
  _, found = measure(simulate.Simulate(windows=24, suffix=4, firings=1000), judged, shared)
  assert found['kl'] > found['true_kl'] > 0


def test_latents_simulated_by_their_own_values_are_exact(shared, judged, monkeypatch):
  def own(self, judged, inputs):
    codes = by_latent.codes('held_out', judged, inputs)
    latent_A = np.repeat(np.arange(judged.form.size.n_latents), np.diff(codes.first_F1))
    order_A = np.argsort(codes.where_A, kind='stable')
    columns = {'token_A': codes.where_A, 'latent_A': latent_A, 'value_A': codes.value_A}
    return {name: a_A[order_A] for name, a_A in columns.items()}

  monkeypatch.setattr(simulate.Simulate, '_simulate', own)
  _, found = measure(simulate.Simulate(windows=24, suffix=4, firings=16, bigram_windows=9), judged, shared)
  assert found['kl'] == pytest.approx(found['true_kl'], rel=1e-4) and found['true_kl'] > 0.01
  assert found['ce_over_true'] == pytest.approx(0, abs=1e-5)


def test_the_scale_of_simulated_values_is_the_best_in_least_squares():
  where_A, said_A = np.array([1, 4, 6]), np.array([1.0, 2.0, 1.0], np.float32)
  true_A, value_A = np.array([0, 4, 6]), np.array([9.0, 3.0, 1.0], np.float32)
  said, true = np.zeros(8), np.zeros(8)
  said[where_A], true[true_A] = said_A, value_A
  best = np.linalg.lstsq(said[:, None], true, rcond=None)[0][0]
  assert simulate.scale(where_A, said_A, true_A, value_A) == pytest.approx(best)
  assert simulate.scale(where_A, said_A, where_A, said_A) == 1.0
  assert simulate.scale(np.zeros(0, int), np.zeros(0, np.float32), true_A, value_A) == 1.0


def test_a_bigram_model_equals_one_spelled_out(shared):
  windows = 9
  pairs = [(int(a), int(b)) for row in shared.text_windows.ids_WT[:windows] for a, b in itertools.pairwise(row[1:])]
  single = np.bincount(shared.text_windows.ids_WT[:windows, 1:].reshape(-1), minlength=27) + 1.0
  single /= single.sum()
  block = shared.block('held_out', 0)
  found = bigram(0, shared, windows)
  logits_WTV = np.asarray(shared.subject.logits(block.windows.ids_WT), np.float64)
  clean_WTV = np.exp(logits_WTV - logits_WTV.max(-1, keepdims=True))
  clean_WTV /= clean_WTV.sum(-1, keepdims=True)
  for w, row in enumerate(block.windows.ids_WT):
    for t in range(len(row) - 1):
      after = [b for a, b in pairs if a == row[t]]
      counts = np.bincount(after, minlength=27)
      kinds = (counts > 0).sum()
      p_V = (counts + kinds * single) / (len(after) + kinds) if after else single
      assert p_V.sum() == pytest.approx(1)
      assert found['ce_WT'][w, t] == pytest.approx(-np.log(p_V[row[t + 1]]), rel=1e-4)
      kl = (clean_WTV[w, t] * np.log(clean_WTV[w, t] / p_V)).sum()
      assert found['kl_WT'][w, t] == pytest.approx(kl, rel=1e-3, abs=1e-5)


def test_in_training_explanations_are_of_the_weights_at_each_step(shared, tmp_path):
  """Weights of one cell at two steps have no digest, and nothing of theirs is kept."""
  settings = {'windows': ASKED.windows, 'suffix': ASKED.suffix, 'firings': ASKED.firings}
  early, late = (dataclasses.replace(measured.judged(measured.cell(), seed), tensors='') for seed in (0, 5))
  for one in (n2g.N2G(**settings), simulate.Simulate(**settings, bigram_windows=9)):
    found = [measure(one, judged, shared)[1] for judged in (early, late)]
    apart = measured.inputs(tmp_path / f'apart from {one.NAME}')
    assert found[0] != found[1] == measure(one, late, apart)[1]
  kept = {path.parent.name.partition('.')[0] for path in tmp_path.rglob('arrays.json')}
  assert not kept & {'examples', 'tries', 'simulated'} and 'windows' in kept
