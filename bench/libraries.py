"""TopK autoencoders of other libraries, each with a training step as that library takes it: in the peers' environment only.

All use Adam and arm AuxK. What else a step does is the library's own choice and stays: see bench/peers.md.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# Nothing may ask the network for anything.
os.environ |= {'WANDB_MODE': 'disabled', 'HF_HUB_OFFLINE': '1'}
if '--device=cuda' not in sys.argv:
  os.environ['SPARSIFY_DISABLE_TRITON'] = '1'  # its kernels need a GPU

import torch  # pyrefly: ignore[missing-import]  (in the peers' environment only)


@dataclasses.dataclass(frozen=True)
class Cell:
  """What is to be trained. A latent is dead after `dead_tokens` tokens in which it did not fire."""

  d: int
  n: int
  batch: int
  k: int
  rate: float
  steps: int
  dead_tokens: int


class Training(NamedTuple):
  """An autoencoder in training: `step(at, x_BD)` takes the number of the step, from 0, and its batch."""

  step: Callable[[int, Any], Any]
  reconstruct: Callable[[Any], Any]
  weights: Callable[[], dict[str, Any]]  # under the names that a cell of ours has for them


Build = Callable[[Cell, Any], Training]  # the second argument: rows [F, D] to start both matrices from, or None


def _sparsify():
  """The body of the loop of `sparsify.Trainer.fit`, which wants a language model around it."""
  from sparsify import SparseCoder, SparseCoderConfig
  from transformers import get_linear_schedule_with_warmup

  def build(cell: Cell, w_FD: Any) -> Training:
    torch.set_float32_matmul_precision('high')  # as fit() does
    device = 'cpu' if w_FD is None else w_FD.device
    sae = SparseCoder(cell.d, SparseCoderConfig(num_latents=cell.n, k=cell.k), device=device, dtype=torch.float32)
    if w_FD is not None:
      sae.encoder.weight.data.copy_(w_FD)
      sae.W_dec.data.copy_(w_FD)
    adam = torch.optim.Adam(sae.parameters(), lr=cell.rate)
    schedule = get_linear_schedule_with_warmup(adam, 0, cell.steps)  # its trainer has no other than to fall to 0
    idle_F = torch.zeros(cell.n, dtype=torch.long, device=device)
    fired_F = torch.zeros(cell.n, dtype=torch.bool, device=device)

    def step(at: int, x_BD: Any) -> None:
      if at == 0:
        sae.b_dec.data = x_BD.mean(0)
      sae.set_decoder_norm_to_unit_norm()
      variance = (x_BD - x_BD.mean(0)).pow(2).sum()
      out = sae(x=x_BD, y=x_BD, dead_mask=idle_F > cell.dead_tokens, total_variance=variance)
      fired_F[out.latent_indices.flatten()] = True
      float(out.fvu.detach())  # fit() reads both every step
      float(out.auxk_loss.detach())
      (out.fvu + out.auxk_loss / 32).backward()
      sae.remove_gradient_parallel_to_decoder_directions()
      adam.step()
      adam.zero_grad()
      schedule.step()
      idle_F.add_(len(x_BD))
      idle_F[fired_F] = 0
      fired_F.zero_()

    def weights():
      w_enc_FD, b_enc_F = sae.encoder.weight, sae.encoder.bias
      return {'w_enc_FD': w_enc_FD, 'w_dec_FD': sae.W_dec, 'b_enc_F': b_enc_F, 'b_pre_D': sae.b_dec}

    return Training(step, lambda x_BD: sae(x_BD).sae_out, weights)

  return build


def _dictionary_learning():
  from dictionary_learning.trainers.top_k import TopKTrainer

  def build(cell: Cell, w_FD: Any) -> Training:
    trainer = TopKTrainer(
      steps=cell.steps,
      activation_dim=cell.d,
      dict_size=cell.n,
      k=cell.k,
      layer=0,
      lm_name='none',
      lr=cell.rate,
      warmup_steps=0,
      device='cpu',
      seed=0,
    )
    trainer.dead_feature_threshold = cell.dead_tokens
    sae = trainer.ae
    if w_FD is not None:
      sae.encoder.weight.data.copy_(w_FD)
      sae.decoder.weight.data.copy_(w_FD.T)

    def weights():
      w_enc_FD, w_dec_FD = sae.encoder.weight, sae.decoder.weight.T
      return {'w_enc_FD': w_enc_FD, 'w_dec_FD': w_dec_FD, 'b_enc_F': sae.encoder.bias, 'b_pre_D': sae.b_dec}

    return Training(trainer.update, sae, weights)

  return build


def _saelens():
  from sae_lens.config import SAETrainerConfig
  from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
  from sae_lens.training.sae_trainer import SAETrainer

  def build(cell: Cell, w_FD: Any) -> Training:
    # Dense codes, its default: sparse ones do not train on a CPU together with its division by decoder norms, and
    # without that division a step took half as long again (3.3 s for 2.1 s at 512, 8192, 1024, 32; torch 2.14).
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=cell.d, d_sae=cell.n, k=cell.k, apply_b_dec_to_input=True))
    if w_FD is not None:
      sae.W_enc.data.copy_(w_FD.T)
      sae.W_dec.data.copy_(w_FD)
    config = SAETrainerConfig(
      total_training_samples=cell.steps * cell.batch,
      train_batch_size_samples=cell.batch,
      lr=cell.rate,
      lr_end=cell.rate,
      dead_feature_window=cell.dead_tokens // cell.batch,
    )
    trainer = SAETrainer(config, sae, iter(()))

    def step(at: int, x_BD: Any) -> None:
      trainer.step(x_BD)
      trainer.n_training_steps += 1

    def weights():
      norm_F = sae.W_dec.norm(dim=1)  # it divides codes by these norms, which is the same as rows of norm 1
      w_enc_FD, w_dec_FD = sae.W_enc.T * norm_F[:, None], sae.W_dec / norm_F[:, None]
      return {'w_enc_FD': w_enc_FD, 'w_dec_FD': w_dec_FD, 'b_enc_F': sae.b_enc * norm_F, 'b_pre_D': sae.b_dec}

    return Training(step, sae, weights)

  return build


# By name: what imports the library and returns how to build one of its autoencoders, and the package's name.
LIBRARIES = {
  'sparsify': (_sparsify, 'eai-sparsify'),
  'dictionary_learning': (_dictionary_learning, 'dictionary-learning'),
  'saelens': (_saelens, 'sae-lens'),
}
