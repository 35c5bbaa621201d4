"""Products with k-sparse codes: the decoder's forward pass and every gradient, without a dense [B, F] code.

Decode and code gradient loop over the k slots, weight gradients over the rows. Measured on 2 AVX-512 cores at (d, n, B, k) =
(768, 32768, 2048, 32): decode 8 ms, code gradient 13 ms, both weight gradients 76 ms, against 295 ms for the
encoder's matmul; the einsum over a [B, k, d] gather costs ten times the first two.

`slots` bounds the loop where codes are shorter than the array (AuxK with few dead latents): slots from there on must
hold value 0. It may be traced, since nothing here is differentiated through.
"""

import jax
import jax.numpy as jnp

Slots = jax.Array | None


def decode(z_BK: jax.Array, idx_BK: jax.Array, w_FD: jax.Array, slots: Slots = None) -> jax.Array:
  """sum_k z[b, k] w[idx[b, k]]: reconstruction [B, D] in float32 or wider."""

  def add_slot(j, x_BD):
    return x_BD + z_BK[:, j, None] * w_FD[idx_BK[:, j]]

  return jax.lax.fori_loop(
    0, _count(z_BK, slots), add_slot, jnp.zeros((z_BK.shape[0], w_FD.shape[1]), w_FD.dtype)
  )


def code_gradient(idx_BK: jax.Array, w_FD: jax.Array, g_BD: jax.Array, slots: Slots = None) -> jax.Array:
  """<w[idx[b, k]], g[b]>: gradient [B, K] of the codes for reconstruction gradient g."""

  def slot(j, dz_KB):
    return dz_KB.at[j].set(jnp.sum(w_FD[idx_BK[:, j]] * g_BD, axis=-1))

  zeros_KB = jnp.zeros(idx_BK.shape[::-1], g_BD.dtype)
  return jax.lax.fori_loop(0, _count(idx_BK, slots), slot, zeros_KB).T


def add_weight_gradients(
  dw_enc_FD: jax.Array,
  dw_dec_FD: jax.Array,
  idx_BK: jax.Array,
  dz_BK: jax.Array,
  x_BD: jax.Array,
  z_BK: jax.Array,
  g_BD: jax.Array,
  slots: Slots = None,
) -> tuple[jax.Array, jax.Array]:
  """Adds sum_b dz[b, k] x[b] to row idx[b, k] of the first and sum_b z[b, k] g[b] to that of the second."""

  if slots is None:
    # Row by row, x[b] and g[b] stay in the nearest cache: 40 of 470 ms of the step at the shape above, 25 of 148 at
    # (512, 8192, 2048, 32), and two loops can run at once.
    def add_row(values_BK, rows_BD):
      return lambda b, total_FD: total_FD.at[idx_BK[b]].add(values_BK[b][:, None] * rows_BD[b][None])

    n_rows = idx_BK.shape[0]
    return (
      jax.lax.fori_loop(0, n_rows, add_row(dz_BK, x_BD), dw_enc_FD),
      jax.lax.fori_loop(0, n_rows, add_row(z_BK, g_BD), dw_dec_FD),
    )

  def add_slot(j, grads):
    dw_enc, dw_dec = grads
    rows_B = idx_BK[:, j]
    return dw_enc.at[rows_B].add(dz_BK[:, j, None] * x_BD), dw_dec.at[rows_B].add(z_BK[:, j, None] * g_BD)

  return jax.lax.fori_loop(0, slots, add_slot, (dw_enc_FD, dw_dec_FD))


def add_at(total_F: jax.Array, idx_BK: jax.Array, values_BK: jax.Array) -> jax.Array:
  """Adds values [B, K] to the entries of total [F] that their indices name."""
  return total_F.at[idx_BK].add(values_BK)


def used_slots(z_BK: jax.Array) -> jax.Array:
  """How many leading slots hold a positive value in some row; values descend along a row."""
  return jnp.max(jnp.sum(z_BK > 0, axis=1))


def _count(codes_BK: jax.Array, slots: Slots):
  return codes_BK.shape[1] if slots is None else slots
