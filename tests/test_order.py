"""The order of tokens: nothing lost or doubled, the same everywhere and forever."""

import hypothesis
import numpy as np
from hypothesis import strategies

from sae_jax.data import order


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


def test_order_in_a_block_follows_the_seed_in_training_alone():
  assert order.tokens_of_block(30, 'train', 3, 0).tolist() != order.tokens_of_block(30, 'train', 4, 0).tolist()
  np.testing.assert_array_equal(
    order.tokens_of_block(30, 'held_out', 3, 0), order.tokens_of_block(30, 'held_out', 4, 0)
  )


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
