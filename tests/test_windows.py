"""Windows: nothing lost or doubled, each knows where it comes from, held-out text is never trained on."""

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.data import windows
from sae_jax.errors import UserError

START = 0
# Every token is unique, so that a window says which document and place it comes from.
LENGTHS = (23, 2, 31, 0, 17, 40, 8, 29)


def documents() -> list[np.ndarray]:
  ends = 1 + np.cumsum(LENGTHS)
  return [np.arange(end - n, end, dtype=np.int32) for n, end in zip(LENGTHS, ends, strict=True)]


def split(**changes):
  asked = {
    'corpus': 'digest',
    'start_token': START,
    'window_tokens': 6,
    'store_tokens': 73,
    'held_out_tokens': 22,
    'seed': 3,
    'positions': 'drop_first',
  } | changes
  return windows.split(documents(), **asked)


def test_windows_know_where_they_come_from():
  text = documents()
  for some in (split().train, split().held_out, split().train[3:9]):
    assert some.corpus == 'digest' and (some.ids_WT[:, 0] == START).all()
    for document, offset, ids in zip(some.document_W, some.offset_W, some.ids_WT[:, 1:], strict=True):
      assert offset % 5 == 0
      assert ids.tolist() == text[document][offset : offset + 5].tolist()
  assert len(split().train[3:9]) == 6


# Of each window: norms of the tokens, and the positions that count by norm.
NORMS = [
  ([900, 1, 2, 3, 2, 1, 2, 3], [3, 4, 5, 6, 7]),
  ([900, 1, 2, 3, 800, 1, 2, 3], [2, 3, 5, 6, 7]),
  ([1, 500, 700, 3, 2, 1, 600, 3], [1, 3, 4, 5, 7]),
  ([1, 2, 2, 2, 2, 2, 2, 19], [3, 4, 5, 6, 7]),
]


@pytest.mark.parametrize('rule, kept', [('drop_first', 7), ('from_3', 5), ('by_norm', 5)])
def test_positions_that_count_are_those_of_the_rule(rule, kept):
  norm_WT = np.array([norms for norms, _ in NORMS], np.float32)
  x_WTD = norm_WT[..., None] * np.array([0.6, 0, -0.8], np.float32)
  asked = {'drop_first': [list(range(1, 8))] * 4, 'from_3': [list(range(3, 8))] * 4}
  want = asked.get(rule, [positions for _, positions in NORMS])
  want_WTD = np.stack([x_TD[positions] for x_TD, positions in zip(x_WTD, want, strict=True)])
  assert windows.counted(8, rule) == kept
  for x in (x_WTD, jnp.asarray(x_WTD)):
    np.testing.assert_array_equal(windows.counting(x, rule), want_WTD)


def test_windows_without_a_position_that_counts_are_refused():
  with pytest.raises(UserError, match=r"window_tokens=3 has no position that counts under data.positions='from_3'"):
    split(window_tokens=3, positions='from_3')


def test_split_keeps_held_out_documents_out_of_training():
  text, made = documents(), split()
  held_out = np.concatenate([text[i] for i in made.held_out_documents])
  assert not np.isin(made.train.ids_WT[:, 1:], held_out).any()
  assert np.isin(made.held_out.ids_WT[:, 1:], held_out).all()


def test_split_holds_just_enough_windows_and_none_twice():
  made = split()
  assert (len(made.train.ids_WT), len(made.held_out.ids_WT)) == (15, 5)  # 73 and 22 tokens, five a window
  first = np.concatenate([made.train.ids_WT, made.held_out.ids_WT])[:, 1].tolist()
  assert len(set(first)) == len(first)


def test_split_of_fewer_tokens_is_a_prefix():
  np.testing.assert_array_equal(split(store_tokens=40).train.ids_WT, split().train.ids_WT[:8])


def test_split_seed_changes_training_order_but_never_the_held_out_tokens():
  mine, other = split(), split(seed=4)
  assert mine.train.ids_WT.tolist() != other.train.ids_WT.tolist()
  np.testing.assert_array_equal(mine.held_out.ids_WT, other.held_out.ids_WT)


def test_split_can_use_the_whole_training_text():
  made = split(store_tokens=1)
  available = sum(n // 5 * 5 for i, n in enumerate(LENGTHS) if i not in made.held_out_documents)
  assert len(split(store_tokens=available).train.ids_WT) == available // 5
  with pytest.raises(UserError, match=f'data.store_tokens={available} or less'):
    split(store_tokens=available + 1)


SIZES = {'corpus': '', 'start_token': 0, 'window_tokens': 6, 'seed': 0, 'positions': 'drop_first'}


def test_split_holds_out_many_documents_however_long():
  text = [np.arange(60, dtype=np.int32)] * 100
  made = windows.split(text, **SIZES, store_tokens=5, held_out_tokens=40)
  assert len(made.held_out_documents) == 5
  more = windows.split(text, **SIZES, store_tokens=5, held_out_tokens=601)
  assert len(more.held_out_documents) == 11
  assert set(made.held_out_documents) < set(more.held_out_documents)


def test_split_refuses_more_held_out_tokens_than_there_are():
  with pytest.raises(UserError, match='held_out_tokens=1000'):
    split(held_out_tokens=1000)
  with pytest.raises(UserError, match='held_out_tokens=22 but the text holds 0'):
    windows.split([], **SIZES, store_tokens=1, held_out_tokens=22)
