"""The order of tokens: nothing lost or doubled, held-out text never trained on, the same everywhere and forever."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from sae_jax.data import order
from sae_jax.errors import UserError

START = 0
# Every token is unique, so that a window says which document and place it comes from.
LENGTHS = (23, 2, 31, 0, 17, 40, 8, 29)


def documents() -> list[np.ndarray]:
  ends = 1 + np.cumsum(LENGTHS)
  return [np.arange(end - n, end, dtype=np.int32) for n, end in zip(LENGTHS, ends, strict=True)]


def plan(**changes):
  asked = {
    'start_token': START,
    'window_tokens': 6,
    'store_tokens': 73,
    'held_out_tokens': 22,
    'seed': 3,
  } | changes
  return order.plan(documents(), **asked)


@hypothesis.given(strategies.integers(0, 300), strategies.text(max_size=5), strategies.integers(0, 2**40))
@hypothesis.settings(max_examples=50, deadline=None)
def test_permutation_holds_every_index_once(n, name, seed):
  assert sorted(order.permutation(n, name, seed).tolist()) == list(range(n))
  np.testing.assert_array_equal(order.permutation(n, name, seed), order.permutation(n, name, seed))


def test_permutation_is_the_one_stores_were_written_with():
  message = 'the order of every existing store and of every resumed run changes with this'
  assert order.permutation(7, 'blocks', 0, 1).tolist() == [6, 2, 5, 0, 3, 4, 1], message


def test_permutation_depends_on_every_part_of_the_label():
  labels = [('a', 1, 2), ('a', 2, 1), ('b', 1, 2), ('a', 12), ('a', '1', 2), ('a', 1)]
  assert len({tuple(order.permutation(50, *label)) for label in labels}) == len(labels)


def test_permutation_is_uniform():
  counts = np.zeros((3, 3), int)
  for seed in range(600):
    counts[np.arange(3), order.permutation(3, 'uniform', seed)] += 1
  assert (abs(counts - 200) < 60).all()  # five standard deviations


def test_plan_windows_are_pieces_of_one_document():
  text = documents()
  made = plan()
  for windows_WT in (made.train_WT, made.held_out_WT):
    assert (windows_WT[:, 0] == START).all()
    for ids in windows_WT[:, 1:]:
      home = [d for d in text if ids[0] in d]
      assert len(home) == 1
      place = int(np.flatnonzero(home[0] == ids[0])[0])
      assert place % 5 == 0
      assert ids.tolist() == home[0][place : place + 5].tolist()


def test_plan_keeps_held_out_documents_out_of_training():
  text, made = documents(), plan()
  held_out = np.concatenate([text[i] for i in made.held_out_documents])
  assert not np.isin(made.train_WT[:, 1:], held_out).any()
  assert np.isin(made.held_out_WT[:, 1:], held_out).all()


def test_plan_holds_just_enough_windows_and_none_twice():
  made = plan()
  assert (len(made.train_WT), len(made.held_out_WT)) == (15, 5)  # 73 and 22 tokens, five a window
  first = np.concatenate([made.train_WT, made.held_out_WT])[:, 1].tolist()
  assert len(set(first)) == len(first)


def test_plan_of_fewer_tokens_is_a_prefix():
  np.testing.assert_array_equal(plan(store_tokens=40).train_WT, plan().train_WT[:8])


def test_plan_seed_changes_training_order_but_never_the_held_out_tokens():
  mine, other = plan(), plan(seed=4)
  assert mine.train_WT.tolist() != other.train_WT.tolist()
  np.testing.assert_array_equal(mine.held_out_WT, other.held_out_WT)
  assert order.tokens_of_block(30, 'train', 3, 0).tolist() != order.tokens_of_block(30, 'train', 4, 0).tolist()
  np.testing.assert_array_equal(
    order.tokens_of_block(30, 'held_out', 3, 0), order.tokens_of_block(30, 'held_out', 4, 0)
  )


def test_plan_can_use_the_whole_training_text():
  made = plan(store_tokens=1)
  available = sum(n // 5 * 5 for i, n in enumerate(LENGTHS) if i not in made.held_out_documents)
  assert len(plan(store_tokens=available).train_WT) == available // 5
  with pytest.raises(UserError, match=f'data.store_tokens={available} or less'):
    plan(store_tokens=available + 1)


def test_plan_holds_out_many_documents_however_long():
  text = [np.arange(60, dtype=np.int32)] * 100
  made = order.plan(text, start_token=0, window_tokens=6, store_tokens=5, held_out_tokens=40, seed=0)
  assert len(made.held_out_documents) == 5
  more = order.plan(text, start_token=0, window_tokens=6, store_tokens=5, held_out_tokens=601, seed=0)
  assert len(more.held_out_documents) == 11
  assert set(made.held_out_documents) < set(more.held_out_documents)


def test_plan_refuses_more_held_out_tokens_than_there_are():
  with pytest.raises(UserError, match='held_out_tokens=1000'):
    plan(held_out_tokens=1000)
  with pytest.raises(UserError, match='held_out_tokens=22 but the text holds 0'):
    order.plan([], start_token=0, window_tokens=6, store_tokens=1, held_out_tokens=22, seed=0)


streams = strategies.builds(
  order.Stream,
  tokens=strategies.integers(1, 60),
  block_tokens=strategies.integers(1, 13),
  seed=strategies.integers(0, 5),
)


@hypothesis.given(streams, strategies.integers(0, 4))
@hypothesis.settings(max_examples=60, deadline=None)
def test_stream_epoch_holds_every_row_once(stream, epoch):
  parts = stream.locate(epoch * stream.tokens, (epoch + 1) * stream.tokens)
  rows = [block * stream.block_tokens + i for block, first, last in parts for i in range(first, last)]
  assert sorted(rows) == list(range(stream.tokens))
  assert all(last <= stream.size(block) for block, _, last in parts)
  if epoch == 0:
    assert rows == list(range(stream.tokens))


@hypothesis.given(streams, strategies.integers(0, 150), strategies.integers(0, 90))
@hypothesis.settings(max_examples=60, deadline=None)
def test_stream_range_is_the_same_however_it_is_asked(stream, start, length):
  whole = [(b, i) for b, first, last in stream.locate(start, start + length) for i in range(first, last)]
  assert len(whole) == length
  single = [stream.locate(p, p + 1) for p in range(start, start + length)]
  assert [[(b, i, i + 1)] for b, i in whole] == single


def test_stream_epochs_differ_in_their_order_of_blocks():
  stream = order.Stream(tokens=97, block_tokens=5, seed=0)
  orders = {tuple(b for b, _, _ in stream.locate(e * 97, (e + 1) * 97)) for e in range(4)}
  assert len(orders) == 4
  other = order.Stream(tokens=97, block_tokens=5, seed=1)
  assert other.locate(97, 194) != stream.locate(97, 194)
