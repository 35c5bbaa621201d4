"""Steering of a penalty's coefficient, so that a wanted number of latents a token is active.

A damped controller on the logarithm of L0 over its target. Reacting to the change of the error as well as to the error
keeps it from swinging. Its gains fall with the steps, not with the budget: so a long run is, at every step, what a shorter
run with the same end would be, and the loss that late steps minimise stays nearly the same.
"""

import jax
import jax.numpy as jnp

_MEMORY = 0.9  # of the running mean of the error
_PULL, _DAMPING, _MOST = 0.01, 1.0, 0.1
_FULL_STEPS = 1000  # with full gains; then they fall as 1 over the steps


def start(coefficient: float) -> dict[str, jax.Array]:
  """What steering carries from step to step, beginning with a coefficient above 0."""
  return {'log_coefficient': jnp.log(jnp.asarray(coefficient, jnp.float32)), 'log_excess': jnp.zeros((), jnp.float32)}


def steer(carried: dict[str, jax.Array], l0: jax.Array, target: int, step: jax.Array) -> dict[str, jax.Array]:
  """The same after a step with this L0; `step` counts those before it."""
  excess = jnp.log(jnp.maximum(l0, 1e-3) / target)
  before = jnp.where(step == 0, excess, carried['log_excess'])
  smooth = _MEMORY * before + (1 - _MEMORY) * excess
  gain = jnp.minimum(1, _FULL_STEPS / (step + 1))
  move = gain * jnp.clip(_PULL * smooth + _DAMPING * (smooth - before), -_MOST, _MOST)
  return {'log_coefficient': carried['log_coefficient'] + move, 'log_excess': smooth}
