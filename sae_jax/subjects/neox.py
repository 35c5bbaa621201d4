"""GPT-NeoX, the family of Pythia: LayerNorm, rotary positions on a part of each head, attention and MLP side by side."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.subjects import rope
from sae_jax.subjects.layers import Rope, einsum, layer_norm, rotate
from sae_jax.subjects.settings import Settings
from sae_jax.subjects.subject import Attend, Names, Params, Tap, Tensors

NAMES = Names(
  prefixes=('gpt_neox.', ''),
  block='layers.{}.',
  embedding='embed_in.weight',
  heads=('embed_out.weight', 'lm_head.weight'),
  ignored=r'.*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)',  # masks and angles that old files carry
)
_GELU = {
  'gelu': functools.partial(jax.nn.gelu, approximate=False),
  'gelu_new': functools.partial(jax.nn.gelu, approximate=True),
  'gelu_fast': functools.partial(jax.nn.gelu, approximate=True),
}


@dataclasses.dataclass(frozen=True)
class Arch:
  """Sizes and constants; hashable, so that it can be a static argument."""

  d_model: int
  n_layers: int
  n_heads: int
  d_ffn: int
  vocabulary: int
  context: int
  rope: Rope
  norm_eps: float
  activation: str
  parallel: bool  # whether attention and MLP read the same stream
  attention_bias: bool = True


def arch_of(settings: Settings) -> Arch:
  """The sizes in settings."""
  d_model, n_heads = settings.whole('hidden_size'), settings.whole('num_attention_heads')
  if d_model % n_heads:
    settings.refuse('num_attention_heads', f'does not divide hidden_size={d_model}; take a sound file')
  partial, base = (
    settings.number('rotary_pct', 0.25),
    settings.number('rotary_emb_base', settings.number('rope_theta', 1e4)),
  )
  turning = rope.of(settings, d_model // n_heads, base, partial=settings.number('partial_rotary_factor', partial))
  if turning.width % 2 or not 0 < turning.width <= d_model // n_heads:
    settings.refuse('rotary_pct', f'turns {turning.width} of {d_model // n_heads} channels; they turn in pairs')
  return Arch(
    d_model=d_model,
    n_layers=settings.layers('num_hidden_layers'),
    n_heads=n_heads,
    d_ffn=settings.whole('intermediate_size'),
    vocabulary=settings.whole('vocab_size'),
    context=settings.whole('max_position_embeddings', 2048),
    rope=turning,
    norm_eps=settings.number('layer_norm_eps', 1e-5),
    activation=settings.choice('hidden_act', tuple(_GELU), 'gelu'),
    parallel=settings.flag('use_parallel_residual', True),
    attention_bias=settings.flag('attention_bias', True),
  )


def tensors(arch: Arch) -> Tensors:
  """Names and shapes."""
  d, f = arch.d_model, arch.d_ffn
  block = {
    f'{name}.{part}': (d,) for name in ('input_layernorm', 'post_attention_layernorm') for part in ('weight', 'bias')
  }
  for name, shape in {
    'attention.query_key_value': (3 * d, d), 'attention.dense': (d, d), 'mlp.dense_h_to_4h': (f, d), 'mlp.dense_4h_to_h': (d, f),
  }.items():  # fmt: skip
    block[f'{name}.weight'] = shape
    if arch.attention_bias or not name.startswith('attention'):
      block[f'{name}.bias'] = shape[:1]
  rest = {'embed_in.weight': (arch.vocabulary, d)}
  return Tensors(block, rest | {f'final_layer_norm.{part}': (d,) for part in ('weight', 'bias')})


def block_params(arch: Arch, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """As stored, with matrices turned to [in, out]."""
  del arch
  return {name: value.T for name, value in w.items()}


def rest_params(arch: Arch, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """As stored."""
  del arch
  final = np.stack([w['final_layer_norm.weight'], w['final_layer_norm.bias']])
  return {'embedding': w['embed_in.weight'], 'final_norm': final}


def widths(arch: Arch) -> dict[str, int]:
  """The kinds of sites. Side by side there is no stream between attention and MLP."""
  d = arch.d_model
  found = {'resid_pre': d, 'z': d, 'attn_out': d, 'resid_mid': d, 'mlp_post': arch.d_ffn, 'mlp_out': d, 'resid_post': d}
  return {kind: width for kind, width in found.items() if kind != 'resid_mid' or not arch.parallel}


def costs(arch: Arch) -> dict[str, tuple[int, bool]]:
  """Multiply-adds of a token before each site. Side by side, the MLP needs no attention."""
  d, f = arch.d_model, arch.d_ffn
  before = 0 if arch.parallel else 4 * d * d
  counts = {'resid_pre': 0, 'z': 3 * d * d, 'attn_out': 4 * d * d, 'resid_mid': 4 * d * d, 'mlp_post': before + d * f}
  counts |= {'mlp_out': before + 2 * d * f, 'resid_post': 4 * d * d + 2 * d * f}
  alone = ('resid_pre', 'mlp_post', 'mlp_out') if arch.parallel else ('resid_pre',)
  return {kind: (counts[kind], kind not in alone) for kind in widths(arch)}


def reach(arch: Arch) -> tuple[int | None, ...]:
  """Every layer looks at all positions."""
  return (None,) * arch.n_layers


def embed(arch: Arch, params: Params, ids_BT: jax.Array, positions_T: jax.Array) -> jax.Array:
  """The residual stream that enters the first block."""
  del arch, positions_T
  return params['embedding'][ids_BT].astype(jnp.float32)


def block(
  arch: Arch,
  p: dict[str, jax.Array],
  x_BTD: jax.Array,
  layer: jax.Array,
  positions_T: jax.Array,
  attend: Attend,
  tap: Tap,
) -> jax.Array:
  """x + attention(norm(x)) + MLP(another norm of x, or of x + attention)."""
  del layer
  b, t, d = x_BTD.shape
  n, c = arch.n_heads, d // arch.n_heads

  def linear(x: jax.Array, name: str) -> jax.Array:
    y = einsum('btd,de->bte', x, p[f'{name}.weight'])
    return y + p[f'{name}.bias'][None, None] if f'{name}.bias' in p else y

  def norm(x_BTD: jax.Array, name: str) -> jax.Array:
    return layer_norm(x_BTD, p[f'{name}.weight'], p[f'{name}.bias'], arch.norm_eps)

  x_BTD = tap('resid_pre', x_BTD)
  # The rows of each head lie together: its queries, its keys, its values.
  heads = linear(norm(x_BTD, 'input_layernorm'), 'attention.query_key_value').reshape(b, t, n, 3 * c)
  q, k, v = jnp.split(heads, 3, axis=-1)
  angles = arch.rope.angles(positions_T)
  z_BTD = tap('z', attend(rotate(q, angles) * c**-0.5, rotate(k, angles), v))
  attention_BTD = tap('attn_out', linear(z_BTD, 'attention.dense'))
  read_BTD = x_BTD if arch.parallel else tap('resid_mid', x_BTD + attention_BTD)
  h_BTF = linear(norm(read_BTD, 'post_attention_layernorm'), 'mlp.dense_h_to_4h')
  post_BTF = tap('mlp_post', _GELU[arch.activation](h_BTF))
  mlp_BTD = tap('mlp_out', linear(post_BTF, 'mlp.dense_4h_to_h'))
  return tap('resid_post', (x_BTD + attention_BTD if arch.parallel else read_BTD) + mlp_BTD)


def unembed(arch: Arch, params: Params, x_BTD: jax.Array) -> jax.Array:
  """Logits of the next token."""
  weight_D, bias_D = params['final_norm'].astype(jnp.float32)
  head_VD = params['head' if 'head' in params else 'embedding'].astype(jnp.float32)
  return einsum('btd,vd->btv', layer_norm(x_BTD, weight_D, bias_D, arch.norm_eps), head_VD)
