"""Eight virtual CPU devices and strict numerics for every test; must run before any device is used."""

import jax
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture
def x64():
  """Float64 inside one test."""
  with jax.enable_x64(True):
    yield
