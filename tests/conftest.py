"""Eight virtual CPU devices and strict numerics for every test; must run before any device is used."""

import hashlib
import os
import pathlib
import time
import zlib
from collections.abc import Iterator
from importlib import metadata

# On a busy machine eight devices on two cores wait for each other for longer than the 40 s after which XLA aborts. Also
# for the processes that tests start.
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_collective_call_terminate_timeout_seconds=1200'

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')

_KEPT_S = 14 * 86400  # seconds after which a compiled program is thrown away
_BEING_WRITTEN_S = 600  # a younger one may not be complete yet


def pytest_configure(config: pytest.Config) -> None:
  """Keeps compiled programs for later runs, in any checkout: compiling is most of what the tests cost.

  Keys hold the program, the options and jax's version. The folder is named after what they leave out.
  """
  machine = [
    line for line in pathlib.Path('/proc/cpuinfo').read_text().splitlines() if line.startswith(('flags', 'model'))
  ]
  key = hashlib.sha256('\n'.join(sorted(set(machine))).encode()).hexdigest()[:12]
  base = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache')
  folder = base / 'sae_jax' / f'compiled-{metadata.version("jaxlib")}-{key}'
  folder.mkdir(parents=True, exist_ok=True)
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    _drop_unusable(folder)
  jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.05)
  # For the processes that tests start.
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(folder)
  os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'


@pytest.fixture(autouse=True)
def _cache_of_programs() -> Iterator[None]:
  """A test that makes a mesh turns the cache off, see `sharding.make_mesh`; the next test finds it on."""
  yield
  if not jax.config.jax_enable_compilation_cache:
    jax.config.update('jax_enable_compilation_cache', True)
    compilation_cache.reset_cache()


def _drop_unusable(folder: pathlib.Path) -> None:
  """Deletes old programs, and those that a kill left half-written: jax writes them in place and keeps them for ever."""
  for path in folder.iterdir():
    age = time.time() - path.stat().st_mtime
    if age > _KEPT_S or (age > _BEING_WRITTEN_S and not _is_whole(path)):
      path.unlink(missing_ok=True)


def _is_whole(path: pathlib.Path) -> bool:
  try:
    zlib.decompress(path.read_bytes())
  except zlib.error:
    return False
  return True


@pytest.fixture
def x64():
  """Float64 inside one test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session')
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """A ledger of two shared cells that differ in their seed, both trained without a disturbance."""
  from sae_jax import training
  from sweeps import grid, ledger
  from tests import cells

  path = tmp_path_factory.mktemp('trained') / 'ledger'
  store = ledger.Ledger(str(path))
  resolved = tuple(({'train.seed': seed}, cells.cell(**{'train.seed': seed})) for seed in (0, 1))
  store.register(grid.Sweep('trained', 'experiments/tiny.py', resolved, dropped=0))
  for one in store.entries():
    assert training.train(one.cell, store.folder(one.id)) == 'done'
  return path
