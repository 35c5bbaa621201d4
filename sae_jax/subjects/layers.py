"""What decoders are made of, in float32: products, norms, rotary positions and causal attention."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Activations are data here, so accelerators must not round the inputs of matmuls to bfloat16 or tf32.
einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def rms_norm(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
  """x / sqrt(mean(x^2) + eps), times a weight a channel."""
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
  return x * scale * weight_D.reshape((1,) * (x.ndim - 1) + (-1,))


def layer_norm(x_BTD: jax.Array, weight_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
  """(x - mean) / sqrt(variance + eps), times a weight and plus a bias a channel."""
  centred_BTD = x_BTD - jnp.mean(x_BTD, axis=-1, keepdims=True)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(centred_BTD), axis=-1, keepdims=True) + eps)
  return centred_BTD * scale * weight_D[None, None] + bias_D[None, None]


@dataclasses.dataclass(frozen=True)
class Rope:
  """Rotary positions; hashable.

  Attributes:
    base: theta. Channel pair i of a head turns by base^(-i / half) a position.
    width: channels of a head that turn, the first ones.
    factor: what slows all of them down ('linear'), or the slow ones ('llama3').
    low, high, original: of 'llama3': pairs that turn more often than `high` times in `original` positions keep their
      pace, those that turn less often than `low` times are slowed down, and what is between goes over smoothly.
  """

  base: float
  width: int
  factor: float = 1.0
  low: float | None = None
  high: float | None = None
  original: int | None = None

  def angles(self, positions_T: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [1, T, 1, width / 2] of the angles at these positions."""
    half = self.width // 2
    pace = self.base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if self.original is not None and self.low is not None and self.high is not None:
      turns = self.original * pace / (2 * math.pi)
      kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
      pace = (1 - kept) * pace / self.factor + kept * pace
    elif self.factor != 1:
      pace = pace / self.factor
    angle = positions_T.astype(jnp.float32)[:, None] * pace[None]
    return jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]


def rotate(x_BTNC: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotary embedding on halves: of the channels that turn, i pairs with i + half, not with its neighbour."""
  cos, sin = angles
  half = cos.shape[-1]
  a, b = x_BTNC[..., :half], x_BTNC[..., half : 2 * half]
  turned = [a * cos - b * sin, b * cos + a * sin]
  return jnp.concatenate([*turned, *([x_BTNC[..., 2 * half :]] if x_BTNC.shape[-1] > 2 * half else [])], axis=-1)


def causal(queries_T: Any, keys_S: Any, window: Any = None) -> jax.Array:
  """Which positions may look at which: bool [T, S]. With a window only at the last `window`, their own included."""
  seen_TS = jnp.asarray(keys_S)[None] <= jnp.asarray(queries_T)[:, None]
  if window is not None:
    seen_TS &= jnp.asarray(keys_S)[None] > jnp.asarray(queries_T)[:, None] - window
  return seen_TS


def attention(
  q_BTNC: jax.Array, k_BSGC: jax.Array, v_BSGC: jax.Array, seen_TS: jax.Array, cap: float | None = None
) -> jax.Array:
  """What queries find, [B, T, N * C], head after head. Query head h reads key-value head h // (N / G).

  Args:
    q_BTNC: queries, scaled.
    k_BSGC, v_BSGC: keys and values.
    seen_TS: which keys a query may look at.
    cap: scores s become cap * tanh(s / cap).
  """
  b, t, n, c = q_BTNC.shape
  s, g = k_BSGC.shape[1:3]
  r = n // g
  # One matmul a group, and the division by the sum after the values: faster than a softmax for every head.
  q = q_BTNC.reshape(b, t, g, r, c).transpose(0, 2, 3, 1, 4).reshape(b, g, r * t, c)
  scores = einsum('bgqc,bsgc->bgqs', q, k_BSGC)
  if cap is not None:
    scores = cap * jnp.tanh(scores / cap)
  scores = jnp.where(seen_TS[None, None, None], scores.reshape(b, g, r, t, s), -jnp.inf).reshape(b, g, r * t, s)
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
  out = einsum('bgqs,bsgc->bgqc', weights, v_BSGC) / weights.sum(axis=-1, keepdims=True)
  return out.reshape(b, g, r, t, c).transpose(0, 3, 1, 2, 4).reshape(b, t, n * c)


def mean_seen(window_tokens: int, window: int | None) -> float:
  """Positions that attention looks at, on average over the positions of a window of tokens."""
  return float(np.minimum(np.arange(1, window_tokens + 1), window or window_tokens).mean())
