"""Llama and its like: RMSNorm, rotary positions, grouped queries and SwiGLU.

Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3 differ in biases, in norms of queries and keys, and in how far back
attention looks.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.subjects import rope
from sae_jax.subjects.layers import Rope, einsum, rms_norm, rotate
from sae_jax.subjects.settings import Settings
from sae_jax.subjects.subject import Attend, Names, Params, Tap, Tensors

NAMES = Names(prefixes=('model.', ''), block='layers.{}.', embedding='embed_tokens.weight')
_KINDS = ('full_attention', 'sliding_attention')


@dataclasses.dataclass(frozen=True)
class Arch:
  """Sizes and constants; hashable, so that it can be a static argument."""

  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  d_head: int
  d_ffn: int
  vocabulary: int
  context: int
  rope: Rope
  norm_eps: float
  qkv_bias: bool = False
  out_bias: bool = False
  ffn_bias: bool = False
  qk_norm: bool = False
  windows: tuple[int | None, ...] = ()  # by layer, how many positions it looks at; empty where all look at all


def arch_of(settings: Settings) -> Arch:
  """The sizes in settings."""
  kind, d_model, n_heads = settings.kind, settings.whole('hidden_size'), settings.whole('num_attention_heads')
  n_kv_heads = settings.whole('num_key_value_heads', n_heads)
  if n_heads % n_kv_heads:
    settings.refuse('num_key_value_heads', f'does not divide num_attention_heads={n_heads}; take a sound file')
  if d_model % n_heads and not settings.has('head_dim') and kind != 'qwen3':
    settings.refuse('num_attention_heads', f'does not divide hidden_size={d_model}; take a sound file')
  d_head = settings.whole('head_dim', 128 if kind == 'qwen3' else d_model // n_heads, least=2)
  n_layers, biased = settings.layers('num_hidden_layers'), settings.flag('attention_bias', False)
  settings.choice('hidden_act', ('silu',), 'silu')
  turning = rope.of(settings, d_head, settings.number('rope_theta', 1e4))
  if turning.width != d_head or d_head % 2:
    settings.refuse('head_dim', f'is {d_head}, of which {turning.width} turn; this family turns all of them, in pairs')
  return Arch(
    d_model=d_model,
    n_layers=n_layers,
    n_heads=n_heads,
    n_kv_heads=n_kv_heads,
    d_head=d_head,
    d_ffn=settings.whole('intermediate_size'),
    vocabulary=settings.whole('vocab_size'),
    context=settings.whole('max_position_embeddings', 2048),
    rope=turning,
    norm_eps=settings.number('rms_norm_eps', 1e-6),
    qkv_bias=biased or kind == 'qwen2',
    out_bias=biased and kind != 'qwen2',
    ffn_bias=settings.flag('mlp_bias', False),
    qk_norm=kind == 'qwen3',
    windows=_windows(settings, kind, n_layers),
  )


def _windows(settings: Settings, kind: str, n_layers: int) -> tuple[int | None, ...]:
  """How many positions each layer looks at; empty where all look at all."""
  if kind == 'llama':
    return ()
  used = settings.flag('use_sliding_window', kind == 'mistral')
  first = settings.whole('max_window_layers', 28, least=0) if kind != 'mistral' else 0
  if not used or (settings.states('sliding_window') and not settings.has('sliding_window')):
    if settings.has('layer_types'):
      settings.words('layer_types', _KINDS[:1], n_layers)
    settings.whole('sliding_window', 1)
    return ()
  size = settings.whole('sliding_window', 4096)
  kinds = tuple(_KINDS[layer >= first] for layer in range(n_layers))
  if settings.has('layer_types'):
    # All layers of Mistral are alike, whatever a list says.
    kinds = settings.words('layer_types', _KINDS[kind == 'mistral' :], n_layers)
  found = tuple(size if one == _KINDS[1] else None for one in kinds)
  return found if any(found) else ()


def tensors(arch: Arch) -> Tensors:
  """Names and shapes."""
  d, f, q, kv = arch.d_model, arch.d_ffn, arch.n_heads * arch.d_head, arch.n_kv_heads * arch.d_head
  block = {
    'input_layernorm.weight': (d,),
    'self_attn.q_proj.weight': (q, d),
    'self_attn.k_proj.weight': (kv, d),
    'self_attn.v_proj.weight': (kv, d),
    'self_attn.o_proj.weight': (d, q),
    'post_attention_layernorm.weight': (d,),
    'mlp.gate_proj.weight': (f, d),
    'mlp.up_proj.weight': (f, d),
    'mlp.down_proj.weight': (d, f),
  }
  biased = [*(['q', 'k', 'v'] if arch.qkv_bias else []), *(['o'] if arch.out_bias else [])]
  names = [f'self_attn.{one}_proj' for one in biased]
  names += [f'mlp.{one}_proj' for one in ('gate', 'up', 'down') if arch.ffn_bias]
  block |= {f'{name}.bias': block[f'{name}.weight'][:1] for name in names}
  if arch.qk_norm:
    block |= {f'self_attn.{one}_norm.weight': (arch.d_head,) for one in 'qk'}
  return Tensors(block, {'embed_tokens.weight': (arch.vocabulary, d), 'norm.weight': (d,)})


def block_params(arch: Arch, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """`qkv` holds the columns of queries, keys and values side by side, `gate_up` those of the two halves of SwiGLU."""

  def joined(part: str, *names: str) -> np.ndarray:
    return np.concatenate([w[f'{name}_proj.{part}'] for name in names]).T

  qkv, gate_up = ('self_attn.q', 'self_attn.k', 'self_attn.v'), ('mlp.gate', 'mlp.up')
  found = {
    'attention_norm': w['input_layernorm.weight'],
    'qkv': joined('weight', *qkv),
    'attention_out': w['self_attn.o_proj.weight'].T,
    'ffn_norm': w['post_attention_layernorm.weight'],
    'gate_up': joined('weight', *gate_up),
    'down': w['mlp.down_proj.weight'].T,
  }
  if arch.qkv_bias:
    found['qkv_bias'] = joined('bias', *qkv)
  if arch.out_bias:
    found['attention_out_bias'] = w['self_attn.o_proj.bias']
  if arch.ffn_bias:
    found |= {'gate_up_bias': joined('bias', *gate_up), 'down_bias': w['mlp.down_proj.bias']}
  if arch.qk_norm:
    found |= {'q_norm': w['self_attn.q_norm.weight'], 'k_norm': w['self_attn.k_norm.weight']}
  return found


def rest_params(arch: Arch, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Embedding and last norm."""
  del arch
  return {'embedding': w['embed_tokens.weight'], 'final_norm': w['norm.weight']}


def widths(arch: Arch) -> dict[str, int]:
  """All seven kinds of sites."""
  d = arch.d_model
  z = arch.n_heads * arch.d_head
  return {
    'resid_pre': d, 'z': z, 'attn_out': d, 'resid_mid': d, 'mlp_post': arch.d_ffn, 'mlp_out': d, 'resid_post': d,
  }  # fmt: skip


def costs(arch: Arch) -> dict[str, tuple[int, bool]]:
  """Multiply-adds of a token before each site."""
  d, q, kv = arch.d_model, arch.n_heads * arch.d_head, arch.n_kv_heads * arch.d_head
  z = d * (q + 2 * kv)
  post = z + q * d + 2 * d * arch.d_ffn
  found = {'resid_pre': 0, 'z': z, 'attn_out': z + q * d, 'resid_mid': z + q * d, 'mlp_post': post}
  found |= dict.fromkeys(('mlp_out', 'resid_post'), post + arch.d_ffn * d)
  return {kind: (count, kind != 'resid_pre') for kind, count in found.items()}


def reach(arch: Arch) -> tuple[int | None, ...]:
  """How many positions each layer looks at."""
  return arch.windows or (None,) * arch.n_layers


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
  """x + attention(norm(x)), and of that x + MLP(norm(x))."""
  b, t, _ = x_BTD.shape
  n, g, c = arch.n_heads, arch.n_kv_heads, arch.d_head
  x_BTD = tap('resid_pre', x_BTD)
  qkv_BTE = _plus(einsum('btd,de->bte', rms_norm(x_BTD, p['attention_norm'], arch.norm_eps), p['qkv']), p, 'qkv')
  q, k, v = jnp.split(qkv_BTE.reshape(b, t, n + 2 * g, c), [n, n + g], axis=2)
  if arch.qk_norm:
    q, k = rms_norm(q, p['q_norm'], arch.norm_eps), rms_norm(k, p['k_norm'], arch.norm_eps)
  angles = arch.rope.angles(positions_T)
  window = jnp.array([w or arch.context for w in arch.windows])[layer] if arch.windows else None
  z_BTE = tap('z', attend(rotate(q, angles) * c**-0.5, rotate(k, angles), v, window))
  attention_BTD = tap('attn_out', _plus(einsum('bte,ed->btd', z_BTE, p['attention_out']), p, 'attention_out'))
  x_BTD = tap('resid_mid', x_BTD + attention_BTD)
  h_BTF = _plus(einsum('btd,df->btf', rms_norm(x_BTD, p['ffn_norm'], arch.norm_eps), p['gate_up']), p, 'gate_up')
  gate_BTF, up_BTF = jnp.split(h_BTF, 2, axis=-1)
  post_BTF = tap('mlp_post', jax.nn.silu(gate_BTF) * up_BTF)
  mlp_BTD = tap('mlp_out', _plus(einsum('btf,fd->btd', post_BTF, p['down']), p, 'down'))
  return tap('resid_post', x_BTD + mlp_BTD)


def unembed(arch: Arch, params: Params, x_BTD: jax.Array) -> jax.Array:
  """Logits of the next token."""
  norm_D, head_VD = (
    params[key].astype(jnp.float32) for key in ('final_norm', 'head' if 'head' in params else 'embedding')
  )
  return einsum('btd,vd->btv', rms_norm(x_BTD, norm_D, arch.norm_eps), head_VD)


def _plus(x: jax.Array, p: dict[str, jax.Array], name: str) -> jax.Array:
  bias = p.get(f'{name}_bias')
  return x if bias is None else x + bias[None, None]
