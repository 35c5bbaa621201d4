"""Fills an activation store from a language model: text to windows to residual stream to blocks on disk.

python -m sae_jax.data.harvest --config=experiments/X.py --out=runs/store [--config.data.site=resid_post.8]
Killed at any moment, the same command goes on with the next block.
"""

import argparse
import contextlib
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ml_collections

from sae_jax import __version__, config, files, flags, schema
from sae_jax.errors import one_line_errors
from sae_jax.progress import Progress

if TYPE_CHECKING:  # they load jax, which --help does without
  from sae_jax.data import store_writer
  from sae_jax.data.reading import Reading


def harvest(config_dict: ml_collections.ConfigDict, out: str, progress: bool = True, sites: Sequence[str] = ()) -> bool:
  """Writes the store that `config_dict.data` describes; True if there was anything left to do.

  Of several sites each gets a store of its own, `<out>/<site>`, and the model runs once for all.

  The store is the first `data.store_tokens` tokens of the stream in `sae_jax.data.order`, and `held_out_tokens` of
  the held-out one; the last block of each is as short as that makes it. Raises `UserError` for settings that the
  subject or the text cannot meet, and when `out` holds another store.
  """
  from sae_jax.data import store_writer
  from sae_jax.data.reading import Reading
  from sae_jax.subjects import text

  data = config.resolve_data(config_dict)
  settings = {field.name: getattr(data, field.name) for field in schema.STORE_CONFIG}
  places = {site: files.join(out, site) for site in sites} or {data.site: out}
  # A folder may hold other texts than it did.
  made_from = {'text_sha256': text.sha256(text.load(data.text))} if text.is_folder(data.text) else {}
  places = {
    site: place
    for site, place in places.items()
    if not store_writer.finished(place, settings | {'site': site}, made_from)
  }
  if not places:
    return False
  reading = Reading(data, tuple(places))
  writers = [_writer(reading, place, settings | {'site': site}) for site, place in places.items()]
  todo = {
    (name, block): [writer for writer in writers if not writer.done(name, block)]
    for name in ('held_out', 'train')
    for block in range(writers[0].streams[name].blocks)
  }
  todo = {at: lacking for at, lacking in todo.items() if lacking}
  total = sum(stream.tokens for stream in writers[0].streams.values())
  left = sum(writers[0].streams[name].size(block) for name, block in todo)
  with contextlib.closing(Progress('harvest', total, total - left, progress)) as shown:
    for name, block in todo:
      found = reading.block(name, block, lambda tokens: shown.update(shown.done + tokens))
      for writer, x_BD in zip(writers, found, strict=True):
        if writer in todo[name, block]:
          writer.write(name, block, x_BD)
  for writer in writers:
    writer.finish()
  return True


def _writer(reading: 'Reading', out: str, settings: dict[str, Any]) -> 'store_writer.StoreWriter':
  """Of the store of one site."""
  import jax

  from sae_jax.data import store_writer

  return store_writer.StoreWriter(
    out,
    d_model=reading.subject.width(settings['site']),
    settings=settings,
    provenance=reading.subject.provenance
    | {
      'text_sha256': reading.windows['train'].corpus,
      'held_out_documents': reading.held_out_documents,
      'device_kind': jax.devices()[0].device_kind,
      'versions': {'sae_jax': __version__}
      | {name: importlib.metadata.version(name) for name in ('jax', 'numpy', 'tensorstore')},
    },
    flops_per_token=reading.flops_at(settings['site']),
  )


@one_line_errors
def main(argv: list[str]) -> int:
  parser = argparse.ArgumentParser(
    prog='python -m sae_jax.data.harvest',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--out', metavar='DIR', required=True, help='the store: a local folder or gs:// URL')
  parser.add_argument('--sites', metavar='A,B', default='', help='a store each, in DIR/A and DIR/B, from one pass')
  args, config_dict = flags.parse(parser, argv)
  began, sites = time.monotonic(), [site for site in args.sites.split(',') if site]
  try:
    worked = harvest(config_dict, args.out, sites=sites)
  except KeyboardInterrupt:
    print(f'interrupted; the same command goes on with the next block of {args.out}', file=sys.stderr)
    return 130
  took = f', in {time.monotonic() - began:.0f} s' if worked else '; it was finished before'
  for place in [files.join(args.out, site) for site in sites] or [args.out]:
    meta = config.read_store_file(place)
    print(
      f'{place}: {meta["tokens"]:,} training and {meta["held_out_tokens"]:,} held-out tokens of width '
      f'{meta["d_model"]}, identity {meta["identity"][:12]}{took}'
    )
  return 0


if __name__ == '__main__':
  main()
