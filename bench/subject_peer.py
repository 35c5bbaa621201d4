"""The same model in transformers, from the same file, with the layers after the site cut off.

python -m bench.subject_peer --gguf=FILE --windows=IDS.npy --site=resid_post.12 [--check=DIR]   (peers' environment)
"""

import argparse
import importlib.metadata
import os
import pathlib

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch  # pyrefly: ignore[missing-import]  (in the peers' environment only)

from bench import worker


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m bench.subject_peer', description=__doc__.splitlines()[0])
  parser.add_argument('--gguf', metavar='FILE', required=True)
  parser.add_argument('--windows', metavar='FILE.npy', required=True, help='ids of one call, int32 [B, T]')
  parser.add_argument('--site', required=True)
  parser.add_argument('--check', metavar='DIR', help='write logits.npy and residual.npy of these windows here')
  args = parser.parse_args()
  ids_BT = torch.from_numpy(np.load(args.windows)).long()

  def prepare():
    from transformers import AutoModelForCausalLM

    def begin():
      path = pathlib.Path(args.gguf)
      model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()

      def forward():
        with torch.inference_mode():
          return decoder(ids_BT, use_cache=False).last_hidden_state.numpy()

      if args.check:
        with torch.inference_mode():
          np.save(pathlib.Path(args.check) / 'logits.npy', model(ids_BT, use_cache=False).logits.numpy())
      decoder = model.model
      decoder.layers = decoder.layers[: int(args.site.removeprefix('resid_post.')) + 1]
      decoder.norm = torch.nn.Identity()  # what comes out is the residual stream
      if args.check:
        np.save(pathlib.Path(args.check) / 'residual.npy', forward())
      return {'forward': forward}, {
        'versions': {name: importlib.metadata.version(name) for name in ('transformers', 'torch')},
        'attention': model.config._attn_implementation,
        'threads': torch.get_num_threads(),
      }

    return begin

  worker.serve(prepare)


if __name__ == '__main__':
  main()
