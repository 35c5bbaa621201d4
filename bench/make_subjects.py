"""Makes tiny random language models with transformers, and writes down what transformers computes with them.

python -m bench.make_subjects tests/subjects           (environment: torch 2.14.1, transformers 5.24.0)
python -m bench.make_subjects --timed=gpt2 FOLDER      only a folder, of a model of a size that is worth timing

Each folder is an ordinary Hugging Face folder, with reference.npz beside it: logits, every site of every block, and
logits after an edit at every kind of site, once with the weights as they are and once with all matrices LARGE times as
large. At the small scale the attention's soft-cap moves nothing, at the large one an epsilon does not: both are needed.
A folder without weights has another config for the weights of the folder that BORROWED names (tests/tiny_subjects.py). Weights are random, so no
licence applies. tests/test_subject_parity.py compares our families with these numbers.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import tokenizers
import torch  # pyrefly: ignore[missing-import]  (in the peers' environment only)
import transformers  # pyrefly: ignore[missing-import]

from tests.tiny_subjects import BORROWED, KEPT, KEPT_EDITED, LARGE, START, edited

ROWS, WINDOW = 2, 24  # longer than every sliding window here
VOCABULARY, WIDTH = 101, 48

_COMMON = {'vocab_size': VOCABULARY, 'hidden_size': WIDTH, 'num_hidden_layers': 2, 'attention_dropout': 0.0}
_NARROW = _COMMON | {
  'intermediate_size': 64,
  'num_attention_heads': 6,
  'num_key_value_heads': 2,
  'max_position_embeddings': 64,
  'bos_token_id': 1,
  'eos_token_id': 2,
}
_GROUPED = _NARROW | {'head_dim': 16}  # 6 heads of it are wider than the model
# Of its wavelengths some are kept, some are divided by the factor and some lie between.
_LLAMA3 = {
  'rope_type': 'llama3',
  'rope_theta': 10_000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 64,
}
_NEOX = _COMMON | {
  'intermediate_size': 128,
  'num_attention_heads': 3,
  'max_position_embeddings': 64,
  'hidden_act': 'gelu',
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 10_000.0, 'partial_rotary_factor': 0.25},
  'bos_token_id': 0,
  'eos_token_id': 0,
}
_GEMMA = _GROUPED | {'sliding_window': 8, 'query_pre_attn_scalar': 24, 'bos_token_id': 2, 'eos_token_id': 1}
_GEMMA3_ROPE = {
  'full_attention': {'rope_type': 'default', 'rope_theta': 1_000_000.0},
  'sliding_attention': {'rope_type': 'default', 'rope_theta': 10_000.0},
}
_GEMMA3 = _GEMMA | {
  'num_hidden_layers': 3,
  'layer_types': ['sliding_attention', 'sliding_attention', 'full_attention'],
  'rope_parameters': _GEMMA3_ROPE,
}
# Folder: the classes' name and what the config is made from.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
  'llama': ('Llama', _GROUPED | {'rope_parameters': _LLAMA3, 'tie_word_embeddings': False, 'rms_norm_eps': 1e-5}),
  'mistral': ('Mistral', _GROUPED | {'sliding_window': 8, 'tie_word_embeddings': False, 'rms_norm_eps': 1e-6}),
  # use_sliding_window is false by default, and then the window counts for nothing.
  'qwen2': ('Qwen2', _NARROW | {'sliding_window': 8, 'tie_word_embeddings': True}),
  'qwen3': ('Qwen3', _GROUPED | {'tie_word_embeddings': False}),
  'gpt2': (
    'GPT2',
    {'vocab_size': VOCABULARY, 'n_embd': WIDTH, 'n_layer': 2, 'n_head': 6, 'n_positions': 64}
    | {'bos_token_id': 0, 'eos_token_id': 0},
  ),
  'gpt_neox': ('GPTNeoX', _NEOX | {'use_parallel_residual': True}),
  'gpt_neox_serial': ('GPTNeoX', _NEOX | {'use_parallel_residual': False}),
  'gemma2': ('Gemma2', _GEMMA),
  'gemma3': ('Gemma3', _GEMMA3),
  'gemma3_linear': (
    'Gemma3',
    _GEMMA3
    | {
      'rope_parameters': _GEMMA3_ROPE
      | {'full_attention': {**_GEMMA3_ROPE['full_attention'], 'rope_type': 'linear', 'factor': 8.0}}
    },
  ),
}
# Large enough that arithmetic takes the time; otherwise like those above.
_TIMED_SIZE = {'vocab_size': 16_384, 'num_hidden_layers': 6, 'hidden_size': 512, 'max_position_embeddings': 256}
TIMED: dict[str, tuple[str, dict[str, Any]]] = {
  'gpt2': (
    'GPT2',
    {'vocab_size': 16_384, 'n_embd': 512, 'n_layer': 6, 'n_head': 8, 'n_positions': 256}
    | {'bos_token_id': 0, 'eos_token_id': 0},
  ),
  'gpt_neox': ('GPTNeoX', _NEOX | _TIMED_SIZE | {'intermediate_size': 2048, 'num_attention_heads': 8}),
  'gemma3': (
    'Gemma3',
    {**_GEMMA, **_TIMED_SIZE, 'intermediate_size': 1536, 'num_attention_heads': 4, 'num_key_value_heads': 1}
    | {'head_dim': 128, 'query_pre_attn_scalar': 128, 'sliding_window': 64, 'rope_parameters': _GEMMA3_ROPE},
  ),
}
# Of the others every weight has the same value in float32, float16 and bfloat16, so that a test can store them as it likes.
_FULL_PRECISION = ('gpt2', 'gemma3')

_TEXT = """the quick brown fox jumps over the lazy dog, and the five boxing wizards jump quickly. a jar of thick liquid and \
the other things that the dog had hidden there were found by the fox; nobody knew whether they were there in the morning. \
"""

# For each kind of site a module of the block (the block itself is '') and whether it is what goes in or what comes out.
_LLAMA_SITES = {
  'resid_pre': ('', 'in'),
  'z': ('self_attn.o_proj', 'in'),
  'attn_out': ('self_attn.o_proj', 'out'),
  'resid_mid': ('post_attention_layernorm', 'in'),
  'mlp_post': ('mlp.down_proj', 'in'),
  'mlp_out': ('mlp.down_proj', 'out'),
  'resid_post': ('', 'out'),
}
_GEMMA_SITES = _LLAMA_SITES | {
  'attn_out': ('post_attention_layernorm', 'out'),
  'resid_mid': ('pre_feedforward_layernorm', 'in'),
  'mlp_out': ('post_feedforward_layernorm', 'out'),
}
_GPT2_SITES = {
  'resid_pre': ('', 'in'),
  'z': ('attn.c_proj', 'in'),
  'attn_out': ('attn.c_proj', 'out'),
  'resid_mid': ('ln_2', 'in'),
  'mlp_post': ('mlp.c_proj', 'in'),
  'mlp_out': ('mlp.c_proj', 'out'),
  'resid_post': ('', 'out'),
}
_NEOX_SITES = {
  'resid_pre': ('', 'in'),
  'z': ('attention.dense', 'in'),
  'attn_out': ('attention.dense', 'out'),
  'resid_mid': ('post_attention_layernorm', 'in'),
  'mlp_post': ('mlp.dense_4h_to_h', 'in'),
  'mlp_out': ('mlp.dense_4h_to_h', 'out'),
  'resid_post': ('', 'out'),
}
_SITES = {'GPT2': _GPT2_SITES, 'GPTNeoX': _NEOX_SITES, 'Gemma2': _GEMMA_SITES, 'Gemma3': _GEMMA_SITES}


def make(kind: str, settings: dict[str, Any], seed: int, short: bool) -> Any:
  """A model with random weights, of few bits if they are to be `short`.

  Biases and norms get noise too, since at 0 and 1 they would hide mistakes.
  """
  suffix = 'TextConfig' if kind == 'Gemma3' else 'Config'
  config = getattr(transformers, kind + suffix)(**settings)
  config._attn_implementation = 'eager'
  model = getattr(transformers, 'GPT2LMHeadModel' if kind == 'GPT2' else kind + 'ForCausalLM')(config).eval()
  torch.manual_seed(seed)
  for parameter in model.parameters():
    noise = torch.randn_like(parameter)
    value = 0.06 * noise if parameter.ndim > 1 else parameter.detach() + 0.2 * noise
    parameter.data = value.bfloat16().float() if short else value
  return model


def sites_of(name: str) -> dict[str, tuple[str, str]]:
  kind, settings = MODELS[name]
  sites = _SITES.get(kind, _LLAMA_SITES)
  return {
    key: value for key, value in sites.items() if not (settings.get('use_parallel_residual') and key == 'resid_mid')
  }


def reference(model: Any, sites: dict[str, tuple[str, str]], ids_BT: np.ndarray) -> dict[str, np.ndarray]:
  """What transformers computes: see tests/test_subject_parity.py for the names."""
  base = model.base_model
  blocks = base.h if hasattr(base, 'h') else base.layers
  ids = torch.from_numpy(ids_BT).long()
  clean: dict[str, np.ndarray] = {}
  with torch.inference_mode():
    with _hooks(
      [
        (block, *where, lambda x, key=f'{kind}.{layer}': clean.update({key: x.numpy().copy()}))
        for layer, block in enumerate(blocks)
        for kind, where in sites.items()
      ]
    ):
      logits_BTV = model(ids, use_cache=False).logits.numpy()
    out = {key: x[:, KEPT] for key, x in ({'logits': logits_BTV} | clean).items()}
    out['ce'] = _ce(logits_BTV, ids_BT)
    last = len(blocks) - 1
    for kind, layer in [*((kind, 0) for kind in sites), ('resid_pre', last), ('mlp_post', last), ('resid_post', last)]:
      with _hooks(_edit(blocks[layer], kind, sites)):
        found_BTV = model(ids, use_cache=False).logits.numpy()
      key = f'edit.{kind}.{layer}'
      out[key] = found_BTV[:, KEPT_EDITED]
      out[f'{key}.ce'] = _ce(found_BTV, ids_BT)
      out[f'{key}.kl'] = _kl(logits_BTV, found_BTV)
  return {key: value.astype(np.float32) for key, value in out.items()}


def _edit(block: Any, kind: str, sites: dict[str, tuple[str, str]]) -> list[tuple[Any, str, str, Callable]]:
  """Hooks that change the activations at a site from START on."""

  def change(x: torch.Tensor) -> torch.Tensor:
    x_BTD = x.numpy().copy()
    x_BTD[:, START:] = edited(x_BTD[:, START:])
    return torch.from_numpy(x_BTD)

  if kind != 'resid_mid':
    return [(block, *sites[kind], change)]
  # The stream goes past the norm that reads it, so what attention adds makes the difference.
  stream = []
  return [
    (block, *sites['resid_pre'], stream.append),
    (block, *sites['attn_out'], lambda x: change(stream[-1] + x) - stream[-1]),
  ]


def _log_p(logits_BTV: np.ndarray) -> np.ndarray:
  return torch.from_numpy(logits_BTV[:, :-1]).double().log_softmax(-1).numpy()


def _ce(logits_BTV: np.ndarray, ids_BT: np.ndarray) -> np.ndarray:
  return -np.take_along_axis(_log_p(logits_BTV), ids_BT[:, 1:, None], axis=-1)[..., 0]


def _kl(clean_BTV: np.ndarray, edited_BTV: np.ndarray) -> np.ndarray:
  clean_BTV, edited_BTV = _log_p(clean_BTV), _log_p(edited_BTV)
  return (np.exp(clean_BTV) * (clean_BTV - edited_BTV)).sum(-1)


@contextmanager
def _hooks(wanted: list[tuple[Any, str, str, Callable]]) -> Iterator[None]:
  """Shows `call` what goes into or comes out of modules, and puts what it gives, if anything, in its place."""
  handles = []
  for block, path, side, call in wanted:
    module = block.get_submodule(path)

    def before(_, args, kwargs, call=call):
      if args:
        found = call(args[0])
        return None if found is None else ((found, *args[1:]), kwargs)
      found = call(kwargs['hidden_states'])
      return None if found is None else (args, kwargs | {'hidden_states': found})

    def after(_, args, out, call=call):
      found = call(out[0] if isinstance(out, tuple) else out)
      return (found, *out[1:]) if isinstance(out, tuple) and found is not None else found

    handles.append(
      module.register_forward_pre_hook(before, with_kwargs=True)
      if side == 'in'
      else module.register_forward_hook(after)
    )
  try:
    yield
  finally:
    for handle in handles:
      handle.remove()


def tokenizer() -> tokenizers.Tokenizer:
  """Byte-level pairs. The alphabet is that of the text, so that there are fewer ids than the models have."""
  found = tokenizers.Tokenizer(tokenizers.models.BPE())
  found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  found.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=VOCABULARY - 5, special_tokens=['<pad>', '<s>', '</s>'], show_progress=False
  )
  found.train_from_iterator([_TEXT], trainer)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m bench.make_subjects', description=(__doc__ or '').splitlines()[0])
  parser.add_argument('out', metavar='OUT', type=pathlib.Path, help='the folder to write into')
  parser.add_argument('--timed', choices=list(TIMED), help='make only this, without a reference')
  args = parser.parse_args()
  if args.timed:
    make(*TIMED[args.timed], seed=0, short=False).save_pretrained(args.out)
    return
  torch.set_num_threads(1)
  ids_BT = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, WINDOW)).astype(np.int32)
  ids_BT[0, :2] = 0, VOCABULARY - 1
  for name in MODELS:
    folder = args.out / name
    lender = BORROWED.get(name, name)
    model = make(*MODELS[name], list(MODELS).index(lender), lender not in _FULL_PRECISION)
    if lender == name:
      model.save_pretrained(folder)
      (folder / 'generation_config.json').unlink(missing_ok=True)
    else:
      folder.mkdir(parents=True, exist_ok=True)
      model.config.save_pretrained(folder)
    found = {'ids': ids_BT}
    for scale in (1, LARGE):
      if scale != 1:
        for parameter in model.parameters():
          if parameter.ndim > 1:
            parameter.data *= scale
      numbers = reference(model, sites_of(name), ids_BT)
      found |= {f'{scale}/{key}': value for key, value in numbers.items()}
    np.savez_compressed(folder / 'reference.npz', **found)
    print(f'{name}: {sum(p.numel() for p in model.parameters()):,} parameters', file=sys.stderr)
  tokenizer().save(str(args.out / 'llama' / 'tokenizer.json'))


if __name__ == '__main__':
  main()
