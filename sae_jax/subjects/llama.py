"""The Llama family: a decoder with RMSNorm, rotary positions, grouped queries and SwiGLU, in float32.

Pure functions on a dict of arrays, as `subject.Family` asks for them. The blocks are stacked and run by `lax.scan`,
which compiles sooner and runs faster than an unrolled loop.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.subjects.files.gguf import GGUF
from sae_jax.subjects.site import Site
from sae_jax.subjects.subject import Tap

# Activations are data here, so accelerators must not round the inputs of matmuls to bfloat16 or tf32.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_STACKED = ('attention_norm', 'qkv', 'attention_out', 'ffn_norm', 'gate_up', 'down')
_MATRICES = ('qkv', 'attention_out', 'gate_up', 'down')
# How many of a block's matrices a site needs.
_NEEDS = {'resid_pre': 0, 'z': 1, 'attn_out': 2, 'resid_mid': 2, 'mlp_post': 3, 'mlp_out': 4, 'resid_post': 4}


@dataclasses.dataclass(frozen=True)
class Arch:
  """Sizes and constants of a Llama; hashable, so that it can be a static argument."""

  d_model: int
  n_layers: int
  n_heads: int
  n_kv_heads: int
  d_head: int
  d_ffn: int
  vocabulary: int
  context: int
  rope_base: float
  norm_eps: float


def arch_of(file: GGUF) -> Arch:
  """The sizes in a file. Raises `UserError` when one is missing."""
  d_model, n_heads = file.field('llama.embedding_length'), file.field('llama.attention.head_count')
  return Arch(
    d_model=d_model,
    n_layers=file.field('llama.block_count'),
    n_heads=n_heads,
    n_kv_heads=file.field('llama.attention.head_count_kv'),
    d_head=d_model // n_heads,
    d_ffn=file.field('llama.feed_forward_length'),
    vocabulary=file.field('llama.vocab_size'),
    context=file.field('llama.context_length'),
    rope_base=file.field('llama.rope.freq_base'),
    norm_eps=file.field('llama.attention.layer_norm_rms_epsilon'),
  )


def parameter_shapes(arch: Arch, n_blocks: int) -> dict[str, tuple[int, ...]]:
  """Shapes of `params` for the first `n_blocks` blocks; all of them are float32.

  `qkv` holds the columns of queries, keys and values side by side, `gate_up` those of the two halves of SwiGLU.
  """
  n, d, f = n_blocks, arch.d_model, arch.d_ffn
  return {
    'embedding': (arch.vocabulary, d),
    'final_norm': (d,),
    'attention_norm': (n, d),
    'qkv': (n, d, (arch.n_heads + 2 * arch.n_kv_heads) * arch.d_head),
    'attention_out': (n, arch.n_heads * arch.d_head, d),
    'ffn_norm': (n, d),
    'gate_up': (n, d, 2 * f),
    'down': (n, f, d),
  }


def params_of(file: GGUF, arch: Arch, n_blocks: int) -> dict[str, np.ndarray]:
  """The weights in a file, laid out as `parameter_shapes` says.

  Raises `UserError` when a tensor is missing or has another shape.
  """
  shapes = parameter_shapes(arch, n_blocks)
  params = {key: np.empty(shape, np.float32) for key, shape in shapes.items()}
  params['embedding'][:] = file.tensor('token_embd', shapes['embedding'])
  params['final_norm'][:] = file.tensor('output_norm', shapes['final_norm'])
  d, f, kv = arch.d_model, arch.d_ffn, arch.n_kv_heads * arch.d_head
  for i in range(n_blocks):
    q = _half_split(file.tensor(f'blk.{i}.attn_q', (d, d)), arch.n_heads)
    k = _half_split(file.tensor(f'blk.{i}.attn_k', (kv, d)), arch.n_kv_heads)
    v = file.tensor(f'blk.{i}.attn_v', (kv, d))
    params['qkv'][i] = np.concatenate([q, k, v]).T
    params['attention_out'][i] = file.tensor(f'blk.{i}.attn_output', (d, d)).T
    params['gate_up'][i] = np.concatenate([file.tensor(f'blk.{i}.ffn_{a}', (f, d)) for a in ('gate', 'up')]).T
    params['down'][i] = file.tensor(f'blk.{i}.ffn_down', (d, f)).T
    params['attention_norm'][i] = file.tensor(f'blk.{i}.attn_norm', (d,))
    params['ffn_norm'][i] = file.tensor(f'blk.{i}.ffn_norm', (d,))
  return params


def widths(arch: Arch) -> dict[str, int]:
  """The kinds of sites that a block has, and their widths."""
  others = {'z': arch.n_heads * arch.d_head, 'mlp_post': arch.d_ffn}
  return {kind: others.get(kind, arch.d_model) for kind in _NEEDS}


def flops(arch: Arch, site: Site, window_tokens: int) -> float:
  """Useful FLOPs for a token up to a site, on average over the positions of a window.

  A multiply-add counts two. The matrices count, and the attention's scores and values, which look at (T + 1) / 2
  positions on average. Norms, softmax and the look-up in the embedding count nothing.
  """
  shapes = parameter_shapes(arch, 1)
  sizes = [a * b for _, a, b in (shapes[key] for key in _MATRICES)]
  needed = _NEEDS[site.kind]
  matrices = site.layer * sum(sizes) + sum(sizes[:needed])
  attention = (site.layer + (needed > 0)) * 2 * arch.n_heads * arch.d_head * (window_tokens + 1) / 2
  return 2 * (matrices + attention)


def embed(arch: Arch, params: dict[str, jax.Array], ids_BT: jax.Array) -> jax.Array:
  """The residual stream that enters the first block: float32 [B, T, D]."""
  del arch
  return params['embedding'][ids_BT]


def run(arch: Arch, params: dict[str, jax.Array], x_BTD: jax.Array, first: int, stop: int) -> jax.Array:
  """The residual stream after blocks first, ..., stop - 1, of what enters block `first`."""
  if stop == first:
    return x_BTD
  layers = {key: params[key][first:stop] for key in _STACKED}
  angles = _rope_angles(arch, x_BTD.shape[1])

  def step(x_BTD: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
    return _block(arch, layer, x_BTD, angles, lambda _, value: value), None

  return jax.lax.scan(step, x_BTD, layers)[0]


def block(arch: Arch, params: dict[str, jax.Array], x_BTD: jax.Array, layer: int, tap: Tap) -> jax.Array:
  """One block, with every site of it passed through `tap`. Gives the stream that leaves the block."""
  return _block(arch, {key: params[key][layer] for key in _STACKED}, x_BTD, _rope_angles(arch, x_BTD.shape[1]), tap)


def unembed(arch: Arch, params: dict[str, jax.Array], x_BTD: jax.Array) -> jax.Array:
  """Logits of the next token, of the residual stream that leaves the last block: [B, T, vocabulary]."""
  return _einsum('btd,vd->btv', _rms_norm(x_BTD, params['final_norm'], arch.norm_eps), params['embedding'])


def _block(arch: Arch, p: dict[str, jax.Array], x_BTD: jax.Array, angles: tuple, tap: Tap) -> jax.Array:
  x_BTD = tap('resid_pre', x_BTD)
  h_BTD = _rms_norm(x_BTD, p['attention_norm'], arch.norm_eps)
  z_BTE = tap('z', _attention(arch, _einsum('btd,de->bte', h_BTD, p['qkv']), angles))
  attention_BTD = tap('attn_out', _einsum('bte,ed->btd', z_BTE, p['attention_out']))
  x_BTD = tap('resid_mid', x_BTD + attention_BTD)
  h_BTD = _rms_norm(x_BTD, p['ffn_norm'], arch.norm_eps)
  gate_BTF, up_BTF = jnp.split(_einsum('btd,df->btf', h_BTD, p['gate_up']), 2, axis=-1)
  post_BTF = tap('mlp_post', jax.nn.silu(gate_BTF) * up_BTF)
  mlp_BTD = tap('mlp_out', _einsum('btf,fd->btd', post_BTF, p['down']))
  return tap('resid_post', x_BTD + mlp_BTD)


def _attention(arch: Arch, qkv_BTE: jax.Array, angles: tuple) -> jax.Array:
  """Causal attention with grouped queries. Letters: g key-value head, r query head of its group, c channel."""
  b, t, _ = qkv_BTE.shape
  n, g, c = arch.n_heads, arch.n_kv_heads, arch.d_head
  r = n // g
  q, k, v = jnp.split(qkv_BTE.reshape(b, t, n + 2 * g, c), [n, n + g], axis=2)
  q, k = _rotate(q, angles) * c**-0.5, _rotate(k, angles)
  # One matmul a group, and the division by the sum after the values: faster than a softmax for every head.
  q = q.reshape(b, t, g, r, c).transpose(0, 2, 3, 1, 4).reshape(b, g, r * t, c)
  scores = _einsum('bgqc,bsgc->bgqs', q, k).reshape(b, g, r, t, t)
  causal = jnp.tril(jnp.ones((t, t), bool))[None, None, None]
  scores = jnp.where(causal, scores, -jnp.inf).reshape(b, g, r * t, t)
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
  out = _einsum('bgqs,bsgc->bgqc', weights, v) / weights.sum(axis=-1, keepdims=True)
  return out.reshape(b, g, r, t, c).transpose(0, 3, 1, 2, 4).reshape(b, t, n * c)


def _rms_norm(x_BTD: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True) + eps)
  return x_BTD * scale * weight_D[None, None]


def _rope_angles(arch: Arch, window: int) -> tuple[jax.Array, jax.Array]:
  half = arch.d_head // 2
  frequency = arch.rope_base ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = jnp.arange(window, dtype=jnp.float32)[:, None] * frequency[None]
  return jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]


def _rotate(x: jax.Array, angles: tuple) -> jax.Array:
  """Rotary embedding on halves: channel i pairs with i + c/2 (not with its neighbour, as GGUF stores them)."""
  cos, sin = angles
  a, b = jnp.split(x, 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _half_split(w_ED: np.ndarray, n_heads: int) -> np.ndarray:
  """Undoes GGUF's interleaving of the rows that RoPE pairs. Left as stored, the model runs and predicts badly."""
  rows, d = w_ED.shape
  return w_ED.reshape(n_heads, rows // n_heads // 2, 2, d).swapaxes(1, 2).reshape(rows, d)
