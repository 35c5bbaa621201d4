"""One training step of another library's TopK autoencoder, as that library takes it.

python -m bench.step_peer --library=sparsify --shape=512,8192,2048,32 [--device=cuda]     (in the peers' environment)
Every library gets the same decoder rows as weights of encoder and decoder, the same batches, Adam, and AuxK armed with
no latent dead. What else its step does is its own choice and stays: see bench/peers.md.
"""

import argparse
import importlib.metadata
import itertools
import os
import sys

# Nothing may ask the network for anything.
os.environ |= {'WANDB_MODE': 'disabled', 'HF_HUB_OFFLINE': '1'}
if '--device=cuda' not in sys.argv:
  os.environ['SPARSIFY_DISABLE_TRITON'] = '1'  # its kernels need a GPU

import torch  # pyrefly: ignore[missing-import]  (in the peers' environment only)

from bench import worker

_RATE = 1e-4


def _sparsify():
  """The body of the loop of `sparsify.Trainer.fit`, which wants a language model around it."""
  from sparsify import SparseCoder, SparseCoderConfig
  from transformers import get_linear_schedule_with_warmup

  def build(d, n, batch, k, w_FD):
    torch.set_float32_matmul_precision('high')  # as fit() does
    sae = SparseCoder(d, SparseCoderConfig(num_latents=n, k=k), device=w_FD.device, dtype=torch.float32)
    sae.encoder.weight.data.copy_(w_FD)
    sae.W_dec.data.copy_(w_FD)
    adam = torch.optim.Adam(sae.parameters(), lr=_RATE)
    schedule = get_linear_schedule_with_warmup(adam, 1000, 100_000)
    idle_F = torch.zeros(n, dtype=torch.long, device=w_FD.device)
    fired_F = torch.zeros(n, dtype=torch.bool, device=w_FD.device)

    def step(x_BD):
      sae.set_decoder_norm_to_unit_norm()
      variance = (x_BD - x_BD.mean(0)).pow(2).sum()
      out = sae(x=x_BD, y=x_BD, dead_mask=idle_F > 10_000_000, total_variance=variance)
      fired_F[out.latent_indices.flatten()] = True
      float(out.fvu.detach())  # fit() reads both every step
      float(out.auxk_loss.detach())
      (out.fvu + out.auxk_loss / 32).backward()
      sae.remove_gradient_parallel_to_decoder_directions()
      adam.step()
      adam.zero_grad()
      schedule.step()
      idle_F.add_(batch)
      idle_F[fired_F] = 0
      fired_F.zero_()

    return step, lambda x_BD: sae(x_BD).sae_out

  return build, 'eai-sparsify'


def _dictionary_learning():
  from dictionary_learning.trainers.top_k import TopKTrainer

  def build(d, n, batch, k, w_FD):
    trainer = TopKTrainer(
      steps=100_000,
      activation_dim=d,
      dict_size=n,
      k=k,
      layer=0,
      lm_name='none',
      lr=_RATE,
      device='cpu',
      seed=0,
    )
    trainer.ae.encoder.weight.data.copy_(w_FD)
    trainer.ae.decoder.weight.data.copy_(w_FD.T)
    # Step 0 would set the pre-bias to the geometric median, and from 1,000 on a threshold is tracked too.
    return lambda x_BD: trainer.update(1, x_BD), trainer.ae

  return build, 'dictionary-learning'


def _saelens():
  from sae_lens.config import SAETrainerConfig
  from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
  from sae_lens.training.sae_trainer import SAETrainer

  def build(d, n, batch, k, w_FD):
    # Dense codes, its default: sparse ones do not train on a CPU together with its division by decoder norms, and
    # without that division a step took half as long again (3.3 s for 2.1 s at 512, 8192, 1024, 32; torch 2.14).
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=n, k=k, apply_b_dec_to_input=True))
    sae.W_enc.data.copy_(w_FD.T)
    sae.W_dec.data.copy_(w_FD)
    trainer = SAETrainer(
      SAETrainerConfig(total_training_samples=100_000 * batch, train_batch_size_samples=batch, lr=_RATE, lr_end=_RATE),
      sae,
      iter(()),
    )

    def step(x_BD):
      trainer.step(x_BD)
      trainer.n_training_steps += 1

    return step, sae

  return build, 'sae-lens'


_LIBRARIES = {'sparsify': _sparsify, 'dictionary_learning': _dictionary_learning, 'saelens': _saelens}


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m bench.step_peer', description=__doc__.splitlines()[0])
  parser.add_argument('--library', choices=_LIBRARIES, required=True)
  parser.add_argument('--shape', metavar='D,N,B,K', required=True)
  parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu', help='cuda is for sparsify alone')
  args = parser.parse_args()
  d, n, batch, k = (int(v) for v in args.shape.split(','))

  def prepare():
    build, package = _LIBRARIES[args.library]()
    pool_PBD, w_FD = (torch.from_numpy(a).to(args.device) for a in worker.inputs(d, n, batch))

    def begin():
      step, reconstruct = build(d, n, batch, k, w_FD)
      x_BD = pool_PBD[0]
      with torch.no_grad():
        error = float((x_BD - reconstruct(x_BD)).pow(2).sum() / x_BD.pow(2).sum())
      batches = itertools.cycle(pool_PBD)
      versions = {name: importlib.metadata.version(name) for name in (package, 'torch')}

      def one_step():
        step(next(batches))
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
