"""What an autoencoder in use can be asked beside its own codes: another activation, a threshold for a wanted L0, and better
values (Gao et al. 2024, section 5).

Any activation applies to the dense codes of a family. Those of a selection are ReLU of its pre-activations.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import checks
from sae_jax.arrays import Array
from sae_jax.errors import UserError

_NUMBERS = 2**24  # codes that exist at once while a threshold is sought
_ROWS = 256  # tokens that are refined at once, at most
_ROUNDS = 8  # of power iteration


@dataclasses.dataclass(frozen=True)
class TopK:
  """The k largest codes of each token. Raises `UserError` for a k below 1."""

  k: int

  def __post_init__(self) -> None:
    checks.whole('k', self.k, 1, 2**31 - 1, 'give how many latents of a token may be active')


@dataclasses.dataclass(frozen=True)
class Threshold:
  """The codes above a value, the same for all latents. Raises `UserError` for a value below 0."""

  value: float

  def __post_init__(self) -> None:
    remedy = 'give the one that threshold_for finds'
    checks.number('value', self.value, 'a finite number of at least 0', remedy, least=0)


Activation = TopK | Threshold


def check(activation: Any, n_latents: int) -> None:
  """Raises `UserError` unless an autoencoder with so many latents can take this activation; None is its own."""
  if activation is not None and not isinstance(activation, Activation):
    raise UserError(
      f'activation={checks.shown(activation)} is none; give sae_jax.TopK(k), sae_jax.Threshold(value), or None for its own'
    )
  if isinstance(activation, TopK):
    checks.whole('activation.k', activation.k, 1, n_latents, 'there are no more latents')


def threshold_for(dense: Callable[[Array], jax.Array], x_BD: np.ndarray, n_latents: int, l0: Any) -> Threshold:
  """The threshold above which these tokens have `l0` active latents on average.

  Args:
    dense: gives the dense codes [R, F] of some rows.
    x_BD: at least one token.
    n_latents: F.
    l0: wanted, in (0, F].

  Raises:
    UserError: another `l0`, or more than there are codes above 0.
  """
  wanted = round(checks.positive('l0', l0, 'give how many latents of a token shall be active') * len(x_BD))
  if l0 > n_latents:
    raise UserError(f'l0={l0} is more than the {n_latents} latents there are; ask for fewer')
  # The value after the wanted ones is the threshold.
  found, positive = largest(dense, x_BD, n_latents, wanted + 1)
  if positive < wanted:
    raise UserError(
      f'l0={l0} but these tokens have {positive / len(x_BD):.4g} codes above 0 on average; ask for no more than that'
    )
  return Threshold(float(found[-1]) if positive > wanted else 0.0)


def largest(
  dense: Callable[[Array], jax.Array], x_BD: np.ndarray, n_latents: int, count: int
) -> tuple[np.ndarray, int]:
  """The largest codes of all these tokens, descending, at most `count` of those above 0; and how many are above 0."""
  rows, positive, values = max(1, _NUMBERS // n_latents), 0, np.zeros(0, np.float32)
  # Of every part of the tokens only what can be among them is kept.
  for first in range(0, len(x_BD), rows):
    z_RF = np.asarray(dense(x_BD[first : first + rows]))
    found = z_RF[z_RF > 0]
    positive += len(found)
    values = np.concatenate([values, found])
    if len(values) > count:
      values = -np.partition(-values, count - 1)[:count]
  return -np.sort(-values), positive


@functools.partial(jax.jit, static_argnames='steps')
def refined(w_dec_FD: jax.Array, target_BD: jax.Array, z_BK: jax.Array, idx_BK: jax.Array, steps: int) -> jax.Array:
  """Values [B, K] >= 0 with which the same latents come closest to the target; where z is 0 it stays 0.

  For each token that is min |t - sum_j z_j w_j|^2, by projected gradients with momentum, which starts anew where it leads
  astray (O'Donoghue and Candes 2015). A token that became no better keeps its values.
  """

  def one(token: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    target_D, z_K, idx_K = token
    z_K = jnp.maximum(z_K, 0)
    w_KD = jnp.where((z_K > 0)[:, None], w_dec_FD[idx_K], 0)
    gram_KK, along_K = w_KD @ w_KD.T, w_KD @ target_D
    bound = _largest_eigenvalue(gram_KK)

    def step(carry: tuple[jax.Array, ...], _: None) -> tuple[tuple[jax.Array, ...], None]:
      last_K, ahead_K, t = carry
      gradient_K = gram_KK @ ahead_K - along_K
      next_K = jnp.maximum(ahead_K - gradient_K / bound, 0)
      astray = (ahead_K - next_K) @ (next_K - last_K) > 0
      t_next = jnp.where(astray, 1, (1 + jnp.sqrt(1 + 4 * t**2)) / 2)
      momentum = jnp.where(astray, 0, (t - 1) / t_next)
      return (next_K, next_K + momentum * (next_K - last_K), t_next), None

    def excess(v_K: jax.Array) -> jax.Array:
      return v_K @ (gram_KK @ v_K - 2 * along_K)

    (best_K, _, _), _ = jax.lax.scan(step, (z_K, z_K, jnp.ones((), z_K.dtype)), length=steps)
    return jnp.where(excess(best_K) < excess(z_K), best_K, z_K)

  with jax.default_matmul_precision('highest'):
    return jax.lax.map(one, (target_BD, z_BK, idx_BK), batch_size=refined_at_once(z_BK.shape[1], w_dec_FD.shape[1]))


def refined_at_once(k: int, d_model: int) -> int:
  """How many tokens with k latents: each takes k rows of the decoder, and their products with each other."""
  return max(1, min(_ROWS, _NUMBERS // max(1, k * (k + d_model))))


def _largest_eigenvalue(gram_KK: jax.Array) -> jax.Array:
  """An upper bound of it: by Collatz and Wielandt max_i (A v)_i / v_i is one, with A = |gram|, for any v > 0.

  Power iteration brings v close to the eigenvector of A. A row of zeros counts for nothing.
  """
  a_KK = jnp.abs(gram_KK)

  def round_(_: int, v_K: jax.Array) -> jax.Array:
    v_K = a_KK @ v_K
    return v_K / jnp.maximum(jnp.max(v_K), 1e-30)

  v_K = jax.lax.fori_loop(0, _ROUNDS, round_, jnp.ones(len(a_KK), a_KK.dtype))
  bound = jnp.max(jnp.where(v_K > 0, (a_KK @ v_K) / jnp.where(v_K > 0, v_K, 1), 0), initial=0)
  return jnp.where(bound > 0, bound, 1)
