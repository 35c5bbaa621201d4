"""Gemma 2 and 3: RMSNorm on both sides of attention and MLP, layers that look back only so far, a GELU that gates.

Gemma 2 caps scores and logits. Gemma 3 has norms of queries and keys instead, and other rotary positions in the layers
that look at everything.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.subjects import rope
from sae_jax.subjects.layers import Rope, einsum, rms_norm, rotate
from sae_jax.subjects.settings import Settings
from sae_jax.subjects.subject import Attend, Names, Params, Tap, Tensors

NAMES = Names(
  prefixes=('model.', '', 'model.language_model.', 'language_model.model.'),
  block='layers.{}.',
  embedding='embed_tokens.weight',
  heads=('lm_head.weight', 'language_model.lm_head.weight'),
  # What looks at pictures is not read.
  ignored=r'.*\.rotary_emb\.inv_freq|(model\.)?(vision_tower|multi_modal_projector)\..*',
  tied=True,
)
_FULL, _SLIDING = 'full_attention', 'sliding_attention'


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
  full: tuple[bool, ...]  # which layers look at everything
  window: int  # how many positions the others look at
  rope_full: Rope
  rope_sliding: Rope
  norm_eps: float
  score_scale: float
  score_cap: float | None
  logit_cap: float | None
  qk_norm: bool
  embedding_scale: float


def arch_of(settings: Settings) -> Arch:
  """The sizes in settings."""
  three = settings.kind != 'gemma2'
  n_heads, n_layers = settings.whole('num_attention_heads', 8), settings.layers('num_hidden_layers')
  n_kv_heads, d_head = settings.whole('num_key_value_heads', 4), settings.whole('head_dim', 256, least=2)
  if n_heads % n_kv_heads:
    settings.refuse('num_key_value_heads', f'does not divide num_attention_heads={n_heads}; take a sound file')
  settings.choice('hidden_activation', ('gelu_pytorch_tanh',), 'gelu_pytorch_tanh')
  settings.choice('hidden_act', ('gelu_pytorch_tanh',), 'gelu_pytorch_tanh')
  settings.neutral('attention_bias', False)
  settings.neutral('use_bidirectional_attention', False)
  theta = settings.number('rope_theta', 1e6 if three else 1e4)
  ropes = [rope.of(settings, d_head, theta, _FULL)]
  local = settings.number('rope_local_base_freq', 1e4) if three else theta
  ropes.append(rope.of(settings, d_head, local, _SLIDING, scaled=not three))
  for turning in ropes:
    if turning.width != d_head or d_head % 2:
      settings.refuse(
        'head_dim', f'is {d_head}, of which {turning.width} turn; this family turns all of them, in pairs'
      )
  caps = [
    settings.number(key, default) if settings.has(key) or not (three or settings.states(key)) else None
    for key, default in (('attn_logit_softcapping', 50.0), ('final_logit_softcapping', 30.0))
  ]
  return Arch(
    d_model=(d_model := settings.whole('hidden_size')),
    n_layers=n_layers,
    n_heads=n_heads,
    n_kv_heads=n_kv_heads,
    d_head=d_head,
    d_ffn=settings.whole('intermediate_size'),
    vocabulary=settings.whole('vocab_size', 256_000 if not three else 262_208),
    context=settings.whole('max_position_embeddings', 8192 if not three else 131_072),
    full=_full(settings, n_layers, three),
    window=settings.whole('sliding_window', 4096),
    rope_full=ropes[0],
    rope_sliding=ropes[1],
    norm_eps=settings.number('rms_norm_eps', 1e-6),
    score_scale=settings.number('query_pre_attn_scalar', 256.0) ** -0.5,
    score_cap=caps[0],
    logit_cap=caps[1],
    qk_norm=three,
    embedding_scale=float(np.sqrt(np.float32(d_model))),
  )


def _full(settings: Settings, n_layers: int, three: bool) -> tuple[bool, ...]:
  """Which layers look at everything: every sixth of Gemma 3, every second of Gemma 2, where no list says otherwise."""
  every = settings.whole('sliding_window_pattern', settings.whole('_sliding_window_pattern', 6 if three else 2))
  if settings.has('layer_types'):
    return tuple(kind == _FULL for kind in settings.words('layer_types', (_FULL, _SLIDING), n_layers))
  return tuple((layer + 1) % every == 0 for layer in range(n_layers))


def tensors(arch: Arch) -> Tensors:
  """Names and shapes."""
  d, f, q, kv = arch.d_model, arch.d_ffn, arch.n_heads * arch.d_head, arch.n_kv_heads * arch.d_head
  norms = ('input', 'post_attention', 'pre_feedforward', 'post_feedforward')
  block = {f'{name}_layernorm.weight': (d,) for name in norms} | {
    'self_attn.q_proj.weight': (q, d),
    'self_attn.k_proj.weight': (kv, d),
    'self_attn.v_proj.weight': (kv, d),
    'self_attn.o_proj.weight': (d, q),
    'mlp.gate_proj.weight': (f, d),
    'mlp.up_proj.weight': (f, d),
    'mlp.down_proj.weight': (d, f),
  }
  block |= {f'self_attn.{one}_norm.weight': (arch.d_head,) for one in 'qk' if arch.qk_norm}
  return Tensors(block, {'embed_tokens.weight': (arch.vocabulary, d), 'norm.weight': (d,)})


def block_params(arch: Arch, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Weights of norms gain the 1 that the family adds to them."""
  del arch
  qkv, gate_up = (
    np.concatenate([w[f'{name}_proj.weight'] for name in names]).T
    for names in (('self_attn.q', 'self_attn.k', 'self_attn.v'), ('mlp.gate', 'mlp.up'))
  )
  found = {
    'qkv': qkv,
    'attention_out': w['self_attn.o_proj.weight'].T,
    'gate_up': gate_up,
    'down': w['mlp.down_proj.weight'].T,
  }
  norms = {
    name.removesuffix('.weight').removeprefix('self_attn.'): w[name] for name in w if name.endswith('norm.weight')
  }
  return found | {name: 1 + value.astype(np.float32) for name, value in norms.items()}


def rest_params(arch: Arch, w: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Embedding and last norm."""
  del arch
  return {'embedding': w['embed_tokens.weight'], 'final_norm': 1 + w['norm.weight'].astype(np.float32)}


def widths(arch: Arch) -> dict[str, int]:
  """All seven kinds of sites."""
  kinds = ('resid_pre', 'z', 'attn_out', 'resid_mid', 'mlp_post', 'mlp_out', 'resid_post')
  return dict.fromkeys(kinds, arch.d_model) | {'z': arch.n_heads * arch.d_head, 'mlp_post': arch.d_ffn}


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
  return tuple(None if full else arch.window for full in arch.full)


def embed(arch: Arch, params: Params, ids_BT: jax.Array, positions_T: jax.Array) -> jax.Array:
  """The residual stream that enters the first block."""
  del positions_T
  return params['embedding'][ids_BT].astype(jnp.float32) * arch.embedding_scale


def block(
  arch: Arch,
  p: dict[str, jax.Array],
  x_BTD: jax.Array,
  layer: jax.Array,
  positions_T: jax.Array,
  attend: Attend,
  tap: Tap,
) -> jax.Array:
  """x + norm(attention(norm(x))), and of that x + norm(MLP(norm(x)))."""
  b, t, _ = x_BTD.shape
  n, g, c = arch.n_heads, arch.n_kv_heads, arch.d_head

  def norm(x: jax.Array, name: str) -> jax.Array:
    return rms_norm(x, p[name], arch.norm_eps)

  x_BTD = tap('resid_pre', x_BTD)
  qkv_BTE = einsum('btd,de->bte', norm(x_BTD, 'input_layernorm'), p['qkv'])
  q, k, v = jnp.split(qkv_BTE.reshape(b, t, n + 2 * g, c), [n, n + g], axis=2)
  if arch.qk_norm:
    q, k = norm(q, 'q_norm'), norm(k, 'k_norm')
  full = jnp.array(arch.full)[layer]
  both = zip(arch.rope_full.angles(positions_T), arch.rope_sliding.angles(positions_T), strict=True)
  cos, sin = (jnp.where(full, of_full, of_sliding) for of_full, of_sliding in both)
  window = jnp.where(full, arch.context, arch.window)
  q, k = rotate(q, (cos, sin)) * arch.score_scale, rotate(k, (cos, sin))
  z_BTE = tap('z', attend(q, k, v, window, arch.score_cap))
  attention_BTD = einsum('bte,ed->btd', z_BTE, p['attention_out'])
  x_BTD = tap('resid_mid', x_BTD + tap('attn_out', norm(attention_BTD, 'post_attention_layernorm')))
  gate_up_BTF = einsum('btd,df->btf', norm(x_BTD, 'pre_feedforward_layernorm'), p['gate_up'])
  gate_BTF, up_BTF = jnp.split(gate_up_BTF, 2, axis=-1)
  post_BTF = tap('mlp_post', jax.nn.gelu(gate_BTF, approximate=True) * up_BTF)
  mlp_BTD = norm(einsum('btf,fd->btd', post_BTF, p['down']), 'post_feedforward_layernorm')
  return tap('resid_post', x_BTD + tap('mlp_out', mlp_BTD))


def unembed(arch: Arch, params: Params, x_BTD: jax.Array) -> jax.Array:
  """Logits of the next token."""
  norm_D, head_VD = (
    params[key].astype(jnp.float32) for key in ('final_norm', 'head' if 'head' in params else 'embedding')
  )
  logits_BTV = einsum('btd,vd->btv', rms_norm(x_BTD, norm_D, arch.norm_eps), head_VD)
  return logits_BTV if arch.logit_cap is None else arch.logit_cap * jnp.tanh(logits_BTV / arch.logit_cap)
