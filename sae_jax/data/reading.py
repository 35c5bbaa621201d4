"""A language model reading a text: the activations that a harvest writes and a live source gives."""

import functools
from collections.abc import Callable

import jax
import numpy as np

from sae_jax import subjects
from sae_jax.cell import DataConfig
from sae_jax.data import order, windows
from sae_jax.errors import UserError
from sae_jax.subjects import text
from sae_jax.subjects.subject import Subject


class Reading:
  """A model, its windows in two streams, 'train' and 'held_out', and the order of their tokens.

  Attributes:
    subject: the model, with the blocks that the site needs, or all of them for the `whole` one.
    sites: where in it.
    windows: those of each stream.
    streams: the geometry of each.
    block_windows: how many windows have their tokens shuffled together.
    held_out_documents: the names of the documents that are held out.
    positions: the rule that says which positions of a window count.
    d_model: width of an activation at the first site.
    flops_per_token: useful FLOPs of the model up to the first site for a token that counts; those that do not count are
      shared out.

  Raises `UserError` for a subject, site or text that does not exist, and for windows longer than the model's context or
  more tokens than the text holds.
  """

  def __init__(self, data: DataConfig, sites: tuple[str, ...] = (), *, whole: bool = False):
    self.sites = sites or (data.site,)
    given = {'subject': data.subject, 'site': all(self.sites), 'text': data.text}
    for key, example in (('subject', 'smollm2-135m'), ('site', 'resid_post.12'), ('text', 'sotu')):
      if not given[key]:
        raise UserError(f'data.{key} is not set; name one, such as --config.data.{key}={example}')
    window, sizes = data.window_tokens, {'train': data.store_tokens, 'held_out': data.held_out_tokens}
    self.subject, split, self.held_out_documents = _opened(
      data.subject,
      () if whole else self.sites,
      data.weights,
      data.text,
      window,
      *sizes.values(),
      data.seed,
      data.positions,
    )
    self.block_windows, self.positions = data.block_windows, data.positions
    self._counted = windows.counted(window, data.positions)
    block_tokens = data.block_windows * self._counted
    self.windows = {'train': split.train, 'held_out': split.held_out}
    self.streams = {name: order.Stream(tokens, block_tokens, data.seed) for name, tokens in sizes.items()}
    self.d_model, self.flops_per_token = self.subject.width(self.sites[0]), self.flops_at(self.sites[0])

  def flops_at(self, site: str) -> float:
    """`flops_per_token` at a site."""
    window = self.windows['train'].ids_WT.shape[1]
    return self.subject.flops(site, window) * window / self._counted

  def windows_of(self, stream: str, block: int) -> windows.Windows:
    """The windows of a block. Their tokens may be more than the block's, whose last ones are then not used."""
    return self.windows[stream][block * self.block_windows : (block + 1) * self.block_windows]

  def order_of(self, stream: str, block: int) -> np.ndarray:
    """Where each token of a block comes from: a row of what counts in the block's windows."""
    n_tokens = len(self.windows_of(stream, block)) * self._counted
    return order.tokens_of_block(n_tokens, stream, self.streams[stream].seed, block)[: self.streams[stream].size(block)]

  def block(
    self, stream: str, block: int, update: Callable[[int], None] = lambda tokens: None
  ) -> tuple[np.ndarray, ...]:
    """Raw activations of a block in stream order, at each site: float32 [tokens of the block, D].

    `update` hears of the tokens done after each forward call.
    """
    ids_WT = self.windows_of(stream, block).ids_WT
    n, window = ids_WT.shape
    step = windows_per_call(jax.default_backend(), window)
    # Padding the last call to the same shape saves a compilation.
    padded_WT = np.concatenate([ids_WT, np.repeat(ids_WT[-1:], -n % step, axis=0)])
    found = [np.empty((n, self._counted, self.subject.width(site)), np.float32) for site in self.sites]
    for i in range(0, n, step):
      count = min(step, n - i)
      for x_WTD, part_WTD in zip(found, self.subject.residuals(padded_WT[i : i + step], self.sites), strict=True):
        x_WTD[i : i + count] = windows.counting(np.asarray(part_WTD)[:count], self.positions)
      update(count * self._counted)
    order = self.order_of(stream, block)
    return tuple(x_WTD.reshape(-1, x_WTD.shape[-1])[order] for x_WTD in found)


def windows_per_call(platform: str, window_tokens: int) -> int:
  """Windows in one forward call of one device. On a CPU, more tokens than this leave the caches."""
  return max(1, (1024 if platform == 'cpu' else 32_768) // window_tokens)


@functools.lru_cache(maxsize=1)  # a worker opens one stream for cell after cell; reading all text takes seconds
def _opened(
  subject_name: str,
  sites: tuple[str, ...],
  weights: str,
  text_name: str,
  window_tokens: int,
  store_tokens: int,
  held_out_tokens: int,
  seed: int,
  positions: str,
) -> tuple[Subject, windows.Split, list[str]]:
  """The subject, its windows, and the names of the documents that are held out."""
  documents = text.load(text_name)
  subject = subjects.load(subject_name, sites or None, weights)
  if window_tokens > subject.arch.context:
    raise UserError(f'data.window_tokens={window_tokens} exceeds the context of {subject.arch.context}; lower it')
  split = windows.split(
    subject.encode([document for _, document in documents]),
    corpus=text.sha256(documents),
    start_token=subject.start_token,
    window_tokens=window_tokens,
    store_tokens=store_tokens,
    held_out_tokens=held_out_tokens,
    seed=seed,
    positions=positions,
  )
  return subject, split, [documents[i][0] for i in split.held_out_documents]
