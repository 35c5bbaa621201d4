"""GGUF, the file format of llama.cpp, read in the words of Hugging Face: the same settings, the same names of tensors."""

import functools
import hashlib
import pathlib
import re
from typing import Any

import gguf
import numpy as np
import tokenizers

from sae_jax.cell_state import printable
from sae_jax.errors import UserError
from sae_jax.subjects import tokenizer
from sae_jax.subjects.settings import Settings

_WORDS = {
  'hidden_size': 'embedding_length',
  'num_hidden_layers': 'block_count',
  'num_attention_heads': 'attention.head_count',
  'num_key_value_heads': 'attention.head_count_kv',
  'intermediate_size': 'feed_forward_length',
  'vocab_size': 'vocab_size',
  'max_position_embeddings': 'context_length',
  'rope_theta': 'rope.freq_base',
  'rms_norm_eps': 'attention.layer_norm_rms_epsilon',
  'sliding_window': 'attention.sliding_window',
}
_SCALING = {'rope_type': 'rope.scaling.type', 'factor': 'rope.scaling.factor'}
_HEAD = (
  'attention.key_length',
  'attention.value_length',
  'rope.dimension_count',
)  # one width, in the models known here
_TENSORS = {
  'token_embd': 'model.embed_tokens',
  'output_norm': 'model.norm',
  'output': 'lm_head',
  'attn_norm': 'input_layernorm',
  'attn_q': 'self_attn.q_proj',
  'attn_k': 'self_attn.k_proj',
  'attn_v': 'self_attn.v_proj',
  'attn_output': 'self_attn.o_proj',
  'attn_q_norm': 'self_attn.q_norm',
  'attn_k_norm': 'self_attn.k_norm',
  'ffn_norm': 'post_attention_layernorm',
  'ffn_gate': 'mlp.gate_proj',
  'ffn_up': 'mlp.up_proj',
  'ffn_down': 'mlp.down_proj',
}
# Gemma has norms on both sides of attention and MLP.
_TENSORS_OF_GEMMA = _TENSORS | {
  'post_attention_norm': 'post_attention_layernorm',
  'ffn_norm': 'pre_feedforward_layernorm',
  'post_ffw_norm': 'post_feedforward_layernorm',
}


class GGUF:
  """An open file. Its tensors stay on disk until they are asked for.

  Attributes:
    settings: as config.json would state them.
    shapes: of every tensor, by the name that Hugging Face gives it.

  Raises `UserError` when it cannot be read, or holds a model of a kind whose conventions are not known here.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    try:
      self._reader = gguf.GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
      raise UserError(f'{path} is not a readable GGUF file ({error}); install it again') from None
    self._architecture = self.field('general.architecture')
    begin = f'{self._architecture}.'
    match self._architecture:
      case 'llama':
        more, names, self._undo = {}, _TENSORS, self._undo_llama
      case 'gemma3':
        # What llama.cpp has as constants; it knows the model of 27B by its 62 blocks.
        scalar = 168 if self.field('gemma3.block_count') == 62 else 256
        more = {'rope_local_base_freq': 1e4, 'sliding_window_pattern': 6, 'query_pre_attn_scalar': scalar}
        more |= {'vocab_size': len(self.field('tokenizer.ggml.tokens'))}
        names, self._undo = _TENSORS_OF_GEMMA, _undo_gemma
      case _:
        raise UserError(
          f'{path}: the architecture {self._architecture!r} is not known; add it as docs/add_a_subject.md says, or take '
          "the model's folder of safetensors"
        )
    stated = {key.removeprefix(begin): self.field(key) for key in self._reader.fields if key.startswith(begin)}
    values = {word: stated.pop(key) for word, key in _WORDS.items() if key in stated}
    if heads := [stated[key] for key in _HEAD if key in stated]:
      values['head_dim'] = heads[0]
    scaling = {word: stated.pop(key) for word, key in _SCALING.items() if key in stated}
    more |= {'rope_scaling': scaling} if scaling else {}
    # Under its own name nobody reads a field, so that it is refused.
    values |= {begin + key: value for key, value in stated.items() if key not in _HEAD or value != heads[0]}
    if 'tokenizer.ggml.bos_token_id' in self._reader.fields:
      values['bos_token_id'] = self.field('tokenizer.ggml.bos_token_id')
    kind = {'gemma3': 'gemma3_text'}.get(self._architecture, self._architecture)
    self.settings = Settings({'model_type': kind} | values | more, str(path))
    self._tensors = {_renamed(tensor.name, names): tensor for tensor in self._reader.tensors}
    # GGUF states shapes in reverse.
    self.shapes = {name: tuple(int(n) for n in one.shape[::-1]) for name, one in self._tensors.items()}

  def field(self, key: str) -> Any:
    """The value of a field. Raises `UserError` when there is none that can be read."""
    if key not in self._reader.fields:
      raise UserError(f'{self.path} has no field {key}; take a complete file')
    try:
      return self._reader.fields[key].contents()
    except (ValueError, IndexError) as error:
      raise UserError(f'{self.path}: the field {key} cannot be read ({error}); take a sound file') from None

  def tensor(self, name: str) -> np.ndarray:
    """A tensor by the name that Hugging Face gives it, dequantised to float32."""
    found = self._tensors[name]
    try:
      values = gguf.dequantize(found.data, found.tensor_type)
    except NotImplementedError:
      raise UserError(
        f'{self.path}: {name} is {found.tensor_type.name}, which is not known here; take other digits'
      ) from None
    return self._undo(name, values.reshape(self.shapes[name]))

  def tokenizer(self) -> tokenizers.Tokenizer:
    """That of the file."""
    try:
      return tokenizer.of_gguf(self.field, self.path)
    except UserError:
      raise
    except Exception as error:  # the library raises nothing more special
      raise UserError(f'{self.path} holds no sound tokenizer ({printable(str(error))[:120]}); copy it again') from None

  @functools.cached_property
  def provenance(self) -> dict[str, Any]:
    """What the file is, with its hash."""
    with open(self.path, 'rb') as f:
      digest = hashlib.file_digest(f, 'sha256').hexdigest()
    return {
      'subject_file': self.path.name,
      'subject_sha256': digest,
      'subject_weights': f'{self._architecture}, dequantised to float32',
      'tokenizer': 'of the same file',
    }

  def _undo_llama(self, name: str, w: np.ndarray) -> np.ndarray:
    """Undoes the interleaving of the rows that RoPE pairs. Left as stored, the model runs and predicts badly."""
    if not name.endswith(('q_proj.weight', 'k_proj.weight')):
      return w
    heads = self.settings.whole('num_attention_heads' if name.endswith('q_proj.weight') else 'num_key_value_heads')
    rows, d = w.shape
    return w.reshape(heads, rows // heads // 2, 2, d).swapaxes(1, 2).reshape(rows, d)


def _undo_gemma(name: str, w: np.ndarray) -> np.ndarray:
  """Takes off the 1 that llama.cpp has added to weights of norms."""
  return w - 1 if name.endswith('norm.weight') else w


def _renamed(name: str, names: dict[str, str]) -> str:
  """A tensor's name at Hugging Face; its own where that is not known, so that it is refused by it."""
  found = re.fullmatch(r'(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)', name)
  if found is None or found[2] not in names:
    return name
  layer, word, part = found.groups()
  return f'model.layers.{layer}.{names[word]}.{part}' if layer else f'{names[word]}.{part}'
