"""The tokenizer that a file of weights brings: text to ids, without any special token."""

import tokenizers

from sae_jax.errors import UserError
from sae_jax.subjects.files.gguf import GGUF


def of_gguf(file: GGUF) -> tokenizers.Tokenizer:
  """Byte-level BPE. Single digits are split off first, and no space is put in front of a text.

  Control tokens are not registered: `<|im_start|>` inside a text is text. Raises `UserError` for any other kind, whose
  splits would be wrong without a sign.
  """
  kind = file.field('tokenizer.ggml.model'), file.field('tokenizer.ggml.pre')
  if kind != ('gpt2', 'smollm'):
    raise UserError(f"{file.path} has the tokenizer {kind}, not ('gpt2', 'smollm'); add it in subjects/tokenizer.py")
  vocabulary = {token: i for i, token in enumerate(file.field('tokenizer.ggml.tokens'))}
  merges = [tuple(merge.split(' ')) for merge in file.field('tokenizer.ggml.merges')]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
    [
      tokenizers.pre_tokenizers.Digits(individual_digits=True),
      tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
  )
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  return tokenizer
