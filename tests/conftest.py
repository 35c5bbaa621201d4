"""Eight virtual CPU devices and strict numerics for every test; must run before any device is used."""

import os

import jax
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
# Two minutes in three of the suite are compilation, and many tests train the same small autoencoder: programs are kept
# beside pytest's own cache. Their keys hold the program, the options and jax's version.
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.1)


def pytest_configure(config):
  # A folder each for the processes of pytest-xdist: jax writes in place, and another might read half a program.
  own = os.environ.get('PYTEST_XDIST_WORKER', 'gw0')
  jax.config.update('jax_compilation_cache_dir', str(config.cache.mkdir(f'compiled_{own}')))
  # Another folder for the processes that tests start: a kill leaves half a program there, and reading that is a warning.
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(config.cache.mkdir(f'compiled_by_children_{own}'))
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'


@pytest.fixture
def x64():
  """Float64 inside one test."""
  with jax.enable_x64(True):
    yield
