"""The training loss as pure functions of sums over the batch (Gao et al. 2024, section 2 and appendix A)."""

import jax
import jax.numpy as jnp


def mse_gradient(error_BD: jax.Array, scale: jax.Array, batch: int) -> jax.Array:
  """d/dx_hat of scale * mean over tokens and components of (x - x_hat)^2, given error = x - x_hat.

  `batch` is the global number of tokens, of which this shard may hold a part.
  """
  return error_BD * (-2 * scale / (batch * error_BD.shape[-1]))


def residual_variance(square_sum: jax.Array, sum_D: jax.Array, batch: int) -> jax.Array:
  """Mean over tokens and components of (e - mean_batch e)^2, from sum ||e||^2 and sum e over the whole batch."""
  mean_square = square_sum / batch - jnp.sum((sum_D / batch) ** 2)
  return jnp.maximum(mean_square, 0) / sum_D.shape[-1]


def auxk_gradient(difference_BD: jax.Array, variance: jax.Array, coefficient: float, batch: int) -> jax.Array:
  """d/de_hat of coefficient * mean (e_hat - e)^2 / variance, given difference = e_hat - e.

  Zero where the normalised loss is not finite: a batch whose residual has no variance must not end the run.
  """
  gradient_BD = difference_BD * (2 * coefficient / (batch * difference_BD.shape[-1])) / variance
  return jnp.where(jnp.isfinite(gradient_BD), gradient_BD, 0)


def auxk_loss(difference_square_sum: jax.Array, variance: jax.Array, batch: int, width: int) -> jax.Array:
  """mean (e_hat - e)^2 / variance, 0 where not finite."""
  loss = difference_square_sum / (batch * width) / variance
  return jnp.where(jnp.isfinite(loss), loss, 0)
