"""The same model in transformers, from the same file or folder; a harvest has the layers after the site cut off.

python -m bench.subject_peer --subject=FILE.gguf --windows=IDS.npy --site=resid_post.12 [--check=DIR]   (peers' environment)
"""

import argparse
import copy
import importlib.metadata
import os
import pathlib

os.environ['HF_HUB_OFFLINE'] = '1'

import numpy as np
import torch  # pyrefly: ignore[missing-import]  (in the peers' environment only)

from bench import worker

_NAMES = (('layers', 'norm'), ('h', 'ln_f'), ('layers', 'final_layer_norm'))  # of the blocks and of the last norm


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m bench.subject_peer', description=__doc__.splitlines()[0])
  parser.add_argument('--subject', metavar='FILE.gguf or FOLDER', required=True)
  parser.add_argument('--windows', metavar='FILE.npy', required=True, help='ids of one call, int32 [B, T]')
  parser.add_argument('--site', required=True)
  parser.add_argument('--check', metavar='DIR', help='write logits.npy and residual.npy of these windows here')
  args = parser.parse_args()
  ids_BT = torch.from_numpy(np.load(args.windows)).long()

  def prepare():
    from transformers import AutoModelForCausalLM

    def begin():
      path = pathlib.Path(args.subject)
      where = {'gguf_file': path.name} if path.is_file() else {}
      model = AutoModelForCausalLM.from_pretrained(
        path.parent if path.is_file() else path, dtype=torch.float32, **where
      ).eval()
      # The same modules, of which this one runs only the first blocks, and no last norm: what comes out is the stream.
      decoder = copy.copy(model.base_model)
      decoder._modules = dict(decoder._modules)
      blocks, norm = next(pair for pair in _NAMES if hasattr(decoder, pair[1]))
      setattr(decoder, blocks, getattr(decoder, blocks)[: int(args.site.removeprefix('resid_post.')) + 1])
      setattr(decoder, norm, torch.nn.Identity())

      def forward():
        with torch.inference_mode():
          return decoder(ids_BT, use_cache=False).last_hidden_state.numpy()

      def logits():
        with torch.inference_mode():
          return model(ids_BT, use_cache=False).logits.numpy()

      if args.check:
        np.save(pathlib.Path(args.check) / 'logits.npy', logits())
        np.save(pathlib.Path(args.check) / 'residual.npy', forward())
      return {'forward': forward, 'logits': logits}, {
        'versions': {name: importlib.metadata.version(name) for name in ('transformers', 'torch')},
        'attention': model.config._attn_implementation,
        'threads': torch.get_num_threads(),
      }

    return begin

  worker.serve(prepare)


if __name__ == '__main__':
  main()
