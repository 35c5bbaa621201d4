"""A Llama in one GGUF file: sizes, dequantised weights of as many layers as needed, and its tokenizer."""

import hashlib
import pathlib
from typing import Any

import gguf
import numpy as np
import tokenizers

from sae_jax.errors import UserError
from sae_jax.subjects import llama


class GGUFLlama:
  """An open GGUF file (its tensors stay on disk until `params` asks for them).

  Attributes: arch, path. Raises `UserError` when the file is not a Llama with a byte-level BPE.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      self._reader = gguf.GGUFReader(path)
      kind = self._field('general.architecture'), self._field('tokenizer.ggml.model')
    except (OSError, ValueError, KeyError, IndexError) as error:
      raise UserError(f'{path} is not a readable GGUF file ({error}); install it again') from None
    if kind != ('llama', 'gpt2'):
      raise UserError(f'{path} holds {kind}, not a llama with a gpt2 tokenizer; add a loader in sae_jax/subjects')
    d_model, n_heads = self._field('llama.embedding_length'), self._field('llama.attention.head_count')
    self.arch = llama.Arch(
      d_model=d_model,
      n_layers=self._field('llama.block_count'),
      n_heads=n_heads,
      n_kv_heads=self._field('llama.attention.head_count_kv'),
      d_head=d_model // n_heads,
      d_ffn=self._field('llama.feed_forward_length'),
      vocabulary=self._field('llama.vocab_size'),
      context=self._field('llama.context_length'),
      rope_base=self._field('llama.rope.freq_base'),
      norm_eps=self._field('llama.attention.layer_norm_rms_epsilon'),
    )
    self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}

  def params(self, n_layers: int) -> dict[str, np.ndarray]:
    """Float32 weights of the first `n_layers` layers, laid out as `llama.parameter_shapes` says.

    Raises `UserError` when a tensor is missing or has another shape.
    """
    shapes = llama.parameter_shapes(self.arch, n_layers)
    params = {key: np.empty(shape, np.float32) for key, shape in shapes.items()}
    params['embedding'][:] = self._tensor('token_embd', shapes['embedding'])
    params['final_norm'][:] = self._tensor('output_norm', shapes['final_norm'])
    d, f, kv = self.arch.d_model, self.arch.d_ffn, self.arch.n_kv_heads * self.arch.d_head
    for i in range(n_layers):
      q = _half_split(self._tensor(f'blk.{i}.attn_q', (d, d)), self.arch.n_heads)
      k = _half_split(self._tensor(f'blk.{i}.attn_k', (kv, d)), self.arch.n_kv_heads)
      v = self._tensor(f'blk.{i}.attn_v', (kv, d))
      params['qkv'][i] = np.concatenate([q, k, v]).T
      params['attention_out'][i] = self._tensor(f'blk.{i}.attn_output', (d, d)).T
      params['gate_up'][i] = np.concatenate([self._tensor(f'blk.{i}.ffn_{a}', (f, d)) for a in ('gate', 'up')]).T
      params['down'][i] = self._tensor(f'blk.{i}.ffn_down', (d, f)).T
      params['attention_norm'][i] = self._tensor(f'blk.{i}.attn_norm', (d,))
      params['ffn_norm'][i] = self._tensor(f'blk.{i}.ffn_norm', (d,))
    return params

  def tokenizer(self) -> tokenizers.Tokenizer:
    """Byte-level BPE with single digits split off first and no prefix space (`tokenizer.ggml.pre` = smollm).

    Control tokens are not registered: `<|im_start|>` inside a text is text. Raises `UserError` for another
    pre-tokenizer, whose splits would be wrong without a sign.
    """
    pre = self._field('tokenizer.ggml.pre')
    if pre != 'smollm':
      raise UserError(f'{self.path} uses the pre-tokenizer {pre!r}; only smollm is implemented: add its splits here')
    tokens, merges = self._field('tokenizer.ggml.tokens'), self._field('tokenizer.ggml.merges')
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [tuple(m.split(' ')) for m in merges]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
      [
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
      ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer

  def sha256(self) -> str:
    with open(self.path, 'rb') as f:
      return hashlib.file_digest(f, 'sha256').hexdigest()

  def _field(self, key: str) -> Any:
    return self._reader.fields[key].contents()

  def _tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    tensor = self._tensors.get(f'{name}.weight')
    if tensor is None:
      raise UserError(f'{self.path} has no tensor {name}.weight; it is not a complete llama')
    # GGUF states shapes in reverse.
    if tuple(int(n) for n in tensor.shape[::-1]) != shape:
      raise UserError(f'{self.path}: {name}.weight has shape {tensor.shape[::-1]}, not {shape}; wrong architecture')
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)


def _half_split(w_ED: np.ndarray, n_heads: int) -> np.ndarray:
  """Undoes GGUF's interleaving of the rows that RoPE pairs: left as stored, the model runs and is 2.2 nats worse."""
  rows, d = w_ED.shape
  return w_ED.reshape(n_heads, rows // n_heads // 2, 2, d).swapaxes(1, 2).reshape(rows, d)
