"""The tokenizer that a GGUF file brings: text to ids, without any special token."""

import pathlib
from collections.abc import Callable
from typing import Any

import tokenizers

from sae_jax.errors import UserError

_SPACE = '\u2581'
_NORMAL, _USER_DEFINED = 1, 4  # kinds of pieces that text can become
_JOINED = (_NORMAL, _USER_DEFINED)


def of_gguf(field: Callable[[str], Any], path: pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer that the fields of a file describe.

  Control tokens are not registered: `<|im_start|>` inside a text is text. Raises `UserError` for a kind that is not
  known, whose splits would be wrong without a sign.
  """
  kind = field('tokenizer.ggml.model'), field('tokenizer.ggml.pre')
  match kind:
    case ('gpt2', 'smollm'):
      return _bytes(field)
    case ('llama', 'default'):
      if field('tokenizer.ggml.add_space_prefix'):
        raise UserError(
          f'{path}: tokenizer.ggml.add_space_prefix=True puts a space before every text, which is not known here; take the '
          "model's folder of safetensors"
        )
      return _pieces(field)
  raise UserError(f"{path} has the tokenizer {kind}, not ('gpt2', 'smollm'); add it in subjects/tokenizer.py")


def _bytes(field: Callable[[str], Any]) -> tokenizers.Tokenizer:
  """Byte-level BPE. Single digits are split off first, and no space is put in front of a text."""
  vocabulary = {token: i for i, token in enumerate(field('tokenizer.ggml.tokens'))}
  merges = [tuple(merge.split(' ')) for merge in field('tokenizer.ggml.merges')]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer


def _pieces(field: Callable[[str], Any]) -> tokenizers.Tokenizer:
  """BPE over characters with bytes for unknown ones, as SentencePiece has it. Such files hold pieces and no merges.

  Every split of a piece into two pieces is a merge, and pieces with a lower id are made first. Runs of spaces and line
  breaks, which users define, are found before anything is merged.
  """
  tokens, kinds = field('tokenizer.ggml.tokens'), field('tokenizer.ggml.token_type')
  vocabulary = {token: i for i, token in enumerate(tokens)}
  merges = []
  for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
    if kind in _JOINED:
      splits = ((token[:at], token[at:]) for at in range(1, len(token)))
      merges += [(i, vocabulary[a], vocabulary[b], a, b) for a, b in splits if a in vocabulary and b in vocabulary]
  merges.sort()
  model = tokenizers.models.BPE(
    vocabulary, [(a, b) for *_, a, b in merges], byte_fallback=True, fuse_unk=True, unk_token='<unk>'
  )
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.normalizer = tokenizers.normalizers.Replace(' ', _SPACE)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(' ', 'merged_with_previous')
  tokenizer.decoder = tokenizers.decoders.Sequence(
    [
      tokenizers.decoders.Replace(_SPACE, ' '),
      tokenizers.decoders.ByteFallback(),
      tokenizers.decoders.Fuse(),
    ]
  )
  defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
  tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in defined])
  return tokenizer
