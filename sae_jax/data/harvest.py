"""Fills an activation store from a language model: text to windows to residual stream to blocks on disk.

python -m sae_jax.data.harvest --config=experiments/X.py --out=runs/store [--config.data.site=resid_post.8]
Killed at any moment, the same command goes on with the next block.
"""

import argparse
import contextlib
import importlib.metadata
import sys
import time

import jax
import ml_collections

from sae_jax import __version__, config, flags, schema
from sae_jax.data import store_writer
from sae_jax.data.reading import Reading
from sae_jax.errors import one_line_errors
from sae_jax.progress import Progress


def harvest(config_dict: ml_collections.ConfigDict, out: str, progress: bool = True) -> bool:
  """Writes the store that `config_dict.data` describes; True if there was anything left to do.

  The store is the first `data.store_tokens` tokens of the stream in `sae_jax.data.order`, and `held_out_tokens` of
  the held-out one; the last block of each is as short as that makes it. Raises `UserError` for settings that the
  subject or the text cannot meet, and when `out` holds another store.
  """
  data = config.resolve_data(config_dict)
  settings = {field.name: getattr(data, field.name) for field in schema.STORE_CONFIG}
  if store_writer.finished(out, settings, {}):
    return False
  reading = Reading(data)
  writer = store_writer.StoreWriter(
    out,
    d_model=reading.d_model,
    settings=settings,
    provenance=reading.subject.provenance
    | {
      'text_sha256': reading.windows['train'].corpus,
      'held_out_documents': reading.held_out_documents,
      'device_kind': jax.devices()[0].device_kind,
      'versions': {'sae_jax': __version__}
      | {name: importlib.metadata.version(name) for name in ('jax', 'numpy', 'tensorstore')},
    },
    flops_per_token=reading.flops_per_token,
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
      x_BD = reading.block(name, block, lambda tokens: shown.update(shown.done + tokens))
      writer.write(name, block, x_BD)
  writer.finish()
  return True


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog='python -m sae_jax.data.harvest',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--out', metavar='DIR', required=True, help='the store: a local folder or gs:// URL')
  args, config_dict = flags.parse(parser, argv)
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
