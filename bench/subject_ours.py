"""The subject's forward pass as a harvest runs it; the counterpart of bench/subject_peer.py.

python -m bench.subject_ours --subject=smollm2-135m --windows=IDS.npy --site=resid_post.12 [--check=DIR]
"""

import argparse
import pathlib

import jax
import numpy as np

from bench import worker
from sae_jax import subjects


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m bench.subject_ours', description=__doc__.splitlines()[0])
  parser.add_argument('--subject', required=True, help='a name or a folder')
  parser.add_argument('--windows', metavar='FILE.npy', required=True, help='ids of one call, int32 [B, T]')
  parser.add_argument('--site', required=True)
  parser.add_argument('--check', metavar='DIR', help='write logits.npy and residual.npy of these windows here')
  args = parser.parse_args()
  ids_BT = np.load(args.windows)

  def prepare():
    jax.config.update('jax_platforms', 'cpu')

    def begin():
      subject = subjects.load(args.subject)

      def forward():
        return np.asarray(subject.residual(ids_BT, args.site))

      def logits():
        return np.asarray(subject.logits(ids_BT))

      if args.check:
        out = pathlib.Path(args.check)
        np.save(out / 'logits.npy', logits())
        np.save(out / 'residual.npy', forward())
      return {'forward': forward, 'logits': logits}, {'versions': {'jax': jax.__version__}, 'threads': None}

    return begin

  worker.serve(prepare)


if __name__ == '__main__':
  main()
