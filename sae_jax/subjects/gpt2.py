"""GPT-2: learned positions, LayerNorm, biases everywhere, a GELU of tanh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.subjects.layers import einsum, layer_norm
from sae_jax.subjects.settings import Settings
from sae_jax.subjects.subject import Attend, Names, Params, Tap, Tensors

NAMES = Names(
  prefixes=('transformer.', ''),
  block='h.{}.',
  embedding='wte.weight',
  ignored=r'.*\.attn\.(bias|masked_bias)',  # masks that old files carry
  tied=True,
)


@dataclasses.dataclass(frozen=True)
class Arch:
  """Sizes and constants; hashable, so that it can be a static argument."""

  d_model: int
  n_layers: int
  n_heads: int
  d_ffn: int
  vocabulary: int
  context: int
  norm_eps: float


def arch_of(settings: Settings) -> Arch:
  """The sizes in settings."""
  d_model, n_heads = settings.whole('n_embd'), settings.whole('n_head')
  if d_model % n_heads:
    settings.refuse('n_head', f'does not divide n_embd={d_model}; take a sound file')
  settings.choice('activation_function', ('gelu_new',), 'gelu_new')
  settings.neutral('scale_attn_weights', True)
  settings.neutral('scale_attn_by_inverse_layer_idx', False)
  settings.neutral('add_cross_attention', False)
  return Arch(
    d_model=d_model,
    n_layers=settings.layers('n_layer'),
    n_heads=n_heads,
    d_ffn=settings.whole('n_inner', 4 * d_model),
    vocabulary=settings.whole('vocab_size'),
    context=settings.whole('n_positions', 1024),
    norm_eps=settings.number('layer_norm_epsilon', 1e-5),
  )


def tensors(arch: Arch) -> Tensors:
  """Names and shapes. Matrices are stored as [in, out]."""
  d, f = arch.d_model, arch.d_ffn
  block = {f'{name}.{part}': (d,) for name in ('ln_1', 'ln_2') for part in ('weight', 'bias')}
  for name, shape in {
    'attn.c_attn': (d, 3 * d), 'attn.c_proj': (d, d), 'mlp.c_fc': (d, f), 'mlp.c_proj': (f, d),
  }.items():  # fmt: skip
    block |= {f'{name}.weight': shape, f'{name}.bias': shape[1:]}
  rest = {'wte.weight': (arch.vocabulary, d), 'wpe.weight': (arch.context, d), 'ln_f.weight': (d,), 'ln_f.bias': (d,)}
  return Tensors(block, rest)


def block_params(arch: Arch, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """As stored."""
  del arch
  return w


def rest_params(arch: Arch, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """As stored."""
  del arch
  return {
    'embedding': w['wte.weight'],
    'positions': w['wpe.weight'],
    'ln_f': np.stack([w['ln_f.weight'], w['ln_f.bias']]),
  }


def widths(arch: Arch) -> dict[str, int]:
  """All seven kinds of sites."""
  d = arch.d_model
  kinds = ('resid_pre', 'z', 'attn_out', 'resid_mid', 'mlp_post', 'mlp_out', 'resid_post')
  return dict.fromkeys(kinds, d) | {'mlp_post': arch.d_ffn}


def costs(arch: Arch) -> dict[str, tuple[int, bool]]:
  """Multiply-adds of a token before each site."""
  d, f = arch.d_model, arch.d_ffn
  counts = {
    'resid_pre': 0,
    'z': 3 * d * d,
    'attn_out': 4 * d * d,
    'resid_mid': 4 * d * d,
    'mlp_post': 4 * d * d + d * f,
  }
  counts |= dict.fromkeys(('mlp_out', 'resid_post'), 4 * d * d + 2 * d * f)
  return {kind: (count, kind != 'resid_pre') for kind, count in counts.items()}


def reach(arch: Arch) -> tuple[int | None, ...]:
  """Every layer looks at all positions."""
  return (None,) * arch.n_layers


def embed(arch: Arch, params: Params, ids_BT: jax.Array, positions_T: jax.Array) -> jax.Array:
  """The residual stream that enters the first block: token and position."""
  del arch
  token_BTD, position_TD = params['embedding'][ids_BT], params['positions'][positions_T]
  return token_BTD.astype(jnp.float32) + position_TD.astype(jnp.float32)[None]


def block(
  arch: Arch,
  p: dict[str, jax.Array],
  x_BTD: jax.Array,
  layer: jax.Array,
  positions_T: jax.Array,
  attend: Attend,
  tap: Tap,
) -> jax.Array:
  """x + attention(norm(x)), and of that x + MLP(norm(x))."""
  del layer, positions_T
  b, t, d = x_BTD.shape

  def linear(x: jax.Array, name: str) -> jax.Array:
    return einsum('btd,de->bte', x, p[f'{name}.weight']) + p[f'{name}.bias'][None, None]

  def norm(x_BTD: jax.Array, name: str) -> jax.Array:
    return layer_norm(x_BTD, p[f'{name}.weight'], p[f'{name}.bias'], arch.norm_eps)

  x_BTD = tap('resid_pre', x_BTD)
  heads = linear(norm(x_BTD, 'ln_1'), 'attn.c_attn').reshape(b, t, 3, arch.n_heads, d // arch.n_heads)
  q, k, v = (heads[:, :, part] for part in range(3))
  z_BTD = tap('z', attend(q * (d // arch.n_heads) ** -0.5, k, v))
  x_BTD = tap('resid_mid', x_BTD + tap('attn_out', linear(z_BTD, 'attn.c_proj')))
  post_BTF = tap('mlp_post', jax.nn.gelu(linear(norm(x_BTD, 'ln_2'), 'mlp.c_fc'), approximate=True))
  return tap('resid_post', x_BTD + tap('mlp_out', linear(post_BTF, 'mlp.c_proj')))


def unembed(arch: Arch, params: Params, x_BTD: jax.Array) -> jax.Array:
  """Logits of the next token."""
  weight_D, bias_D = params['ln_f'].astype(jnp.float32)
  head_VD = params['head' if 'head' in params else 'embedding'].astype(jnp.float32)
  return einsum('btd,vd->btv', layer_norm(x_BTD, weight_D, bias_D, arch.norm_eps), head_VD)
