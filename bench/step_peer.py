"""One training step of another library's TopK autoencoder, as that library takes it.

python -m bench.step_peer --library=sparsify --shape=512,8192,2048,32 [--device=cuda]     (in the peers' environment)
Every library gets the same decoder rows as weights of encoder and decoder, the same batches, Adam, and AuxK armed with
no latent dead. What else its step does is its own choice and stays: see bench/peers.md.
"""

import argparse
import importlib.metadata
import itertools

import torch  # pyrefly: ignore[missing-import]  (in the peers' environment only)

from bench import worker
from bench.libraries import LIBRARIES, Cell

_RATE, _STEPS, _DEAD_TOKENS = 1e-4, 100_000, 10_000_000


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m bench.step_peer', description=__doc__.splitlines()[0])
  parser.add_argument('--library', choices=LIBRARIES, required=True)
  parser.add_argument('--shape', metavar='D,N,B,K', required=True)
  parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='cuda is for sparsify alone')
  args = parser.parse_args()
  d, n, batch, k = (int(v) for v in args.shape.split(','))

  def prepare():
    load, package = LIBRARIES[args.library]
    build = load()
    pool_PBD, w_FD = (torch.from_numpy(a).to(args.device) for a in worker.inputs(d, n, batch))

    def begin():
      one = build(Cell(d, n, batch, k, _RATE, _STEPS, _DEAD_TOKENS), w_FD)
      x_BD = pool_PBD[0]
      with torch.no_grad():
        error = float((x_BD - one.reconstruct(x_BD)).pow(2).sum() / x_BD.pow(2).sum())
      batches = itertools.cycle(pool_PBD)
      versions = {name: importlib.metadata.version(name) for name in (package, 'torch')}

      def one_step():
        # Step 0 would start from the first batch, and from 1,000 on dictionary_learning tracks a threshold too.
        one.step(1, next(batches))
        if args.device == 'cuda':
          torch.cuda.synchronize()

      return (
        {'step': one_step, 'matmul': lambda: torch.nn.functional.linear(x_BD, w_FD)},
        {'error': error, 'threads': torch.get_num_threads(), 'versions': versions},
      )

    return begin

  worker.serve(prepare)


if __name__ == '__main__':
  main()
