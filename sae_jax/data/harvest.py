"""Fills an activation store from a language model: text to windows to residual stream to blocks on disk.

python -m sae_jax.data.harvest --config=experiments/X.py --out=runs/store [--config.data.site=resid_post.8]
Killed at any moment, the same command goes on with the next block.
"""

import argparse
import contextlib
import importlib.metadata
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import ml_collections
import numpy as np

from sae_jax import __version__, config, config_flags, schema, subjects
from sae_jax.data import order, store_writer
from sae_jax.errors import UserError, one_line_errors
from sae_jax.progress import Progress
from sae_jax.subjects import text
from sae_jax.subjects.subject import Subject


def harvest(config_dict: ml_collections.ConfigDict, out: str, progress: bool = True) -> bool:
  """Writes the store that `config_dict.data` describes; True if there was anything left to do.

  The store is the first `data.store_tokens` tokens of the stream in `sae_jax.data.order`, and `held_out_tokens` of
  the held-out one; the last block of each is as short as that makes it. Raises `UserError` for settings that the
  subject or the text cannot meet, and when `out` holds another store.
  """
  settings = settings_of(config_dict)
  if store_writer.finished(out, settings, {}):
    return False
  documents = text.load(settings['text'])
  subject = subjects.load(settings['subject'], settings['site'])
  site, window = settings['site'], settings['window_tokens']
  width = subject.width(site)
  if window > subject.arch.context:
    raise UserError(f'data.window_tokens={window} exceeds the context of {subject.arch.context}; lower it')
  plan = order.plan(
    subject.encode([document for _, document in documents]),
    start_token=subject.start_token,
    window_tokens=window,
    store_tokens=settings['store_tokens'],
    held_out_tokens=settings['held_out_tokens'],
    seed=settings['seed'],
  )
  writer = store_writer.StoreWriter(
    out,
    d_model=width,
    settings=settings,
    provenance=subject.provenance
    | {
      'text_sha256': text.sha256(documents),
      'held_out_documents': [documents[i][0] for i in plan.held_out_documents],
      'device_kind': jax.devices()[0].device_kind,
      'versions': {'sae_jax': __version__}
      | {name: importlib.metadata.version(name) for name in ('jax', 'numpy', 'tensorstore')},
    },
    flops_per_token=subject.flops(site, window) * window / (window - 1),
  )
  todo = [
    (name, block)
    for name in ('held_out', 'train')
    for block in range(writer.streams[name].blocks)
    if not writer.done(name, block)
  ]
  total = sum(stream.tokens for stream in writer.streams.values())
  left = sum(writer.streams[name].size(block) for name, block in todo)
  with contextlib.closing(Progress('harvest', total, total - left, progress)) as shown:
    for name, block in todo:
      windows_WT = {'train': plan.train_WT, 'held_out': plan.held_out_WT}[name]
      x_BD = block_activations(
        subject, site, windows_WT, name, block, settings, lambda tokens: shown.update(shown.done + tokens)
      )
      writer.write(name, block, x_BD[: writer.streams[name].size(block)])
  writer.finish()
  return True


def settings_of(config_dict: ml_collections.ConfigDict) -> dict[str, Any]:
  """The data settings of a store with defaults filled in, validated like a cell's. Raises `UserError`."""
  # A store has no width before the subject is loaded, and the autoencoder's width does not matter here.
  placeholder = {'data.source': 'live', 'data.identity': '', 'sae.d_model': config_dict.sae.d_model or 2}
  data = config.resolve(config.override(config_dict, placeholder)).data
  for key, example in (('subject', 'smollm2-135m'), ('site', 'resid_post.12'), ('text', 'sotu')):
    if not getattr(data, key):
      raise UserError(f'data.{key} is not set; give the store one, such as --config.data.{key}={example}')
  return {field.name: getattr(data, field.name) for field in schema.STORE_CONFIG}


def windows_per_call(platform: str, window_tokens: int) -> int:
  """Windows in one forward call of one device. On a 2-core CPU 512 to 2,048 tokens are alike, 8,192 15 % slower (caches)."""
  return max(1, (1024 if platform == 'cpu' else 32_768) // window_tokens)


def block_activations(
  subject: Subject,
  site: str,
  windows_WT: np.ndarray,
  stream: str,
  block: int,
  settings: dict[str, Any],
  update: Callable[[int], None] = lambda tokens: None,
) -> np.ndarray:
  """Raw activations of a whole block in stream order: float32 [windows of the block * (T - 1), D].

  `stream` is 'train' or 'held_out'; `update` hears of the tokens done after each forward call.
  """
  size = settings['block_windows']
  windows_WT = windows_WT[block * size : (block + 1) * size]
  n, window = windows_WT.shape
  step = windows_per_call(jax.default_backend(), window)
  # Padding the last call to the same shape saves a compilation.
  padded_WT = np.concatenate([windows_WT, np.repeat(windows_WT[-1:], -n % step, axis=0)])
  x_WTD = np.empty((n, window - 1, subject.width(site)), np.float32)
  for i in range(0, n, step):
    count = min(step, n - i)
    x_WTD[i : i + count] = np.asarray(subject.residual(padded_WT[i : i + step], site))[:count, 1:]
    update(count * (window - 1))
  x_BD = x_WTD.reshape(-1, x_WTD.shape[-1])
  return x_BD[order.tokens_of_block(len(x_BD), stream, settings['seed'], block)]


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog='python -m sae_jax.data.harvest',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--out', metavar='DIR', required=True, help='the store: a local folder or gs:// URL')
  args, config_dict = config_flags.parse(parser, argv)
  began = time.monotonic()
  try:
    worked = harvest(config_dict, args.out)
  except KeyboardInterrupt:
    print(f'interrupted; the same command goes on with the next block of {args.out}', file=sys.stderr)
    return 130
  meta = config.read_store_file(args.out)
  print(
    f'{args.out}: {meta["tokens"]:,} training and {meta["held_out_tokens"]:,} held-out tokens of width '
    f'{meta["d_model"]}, identity {meta["identity"][:12]}'
    + (f', in {time.monotonic() - began:.0f} s' if worked else '; it was finished before')
  )
  return 0


if __name__ == '__main__':
  main()
