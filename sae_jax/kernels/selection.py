"""The columns of the k largest of each row on a CPU, by a kernel in C++ (selection.cc).

XLA's own top-k sorts on one core. The kernel finds the same columns in the same order, so that every bit of a run stays
as it is without it. The machine's C++ compiler builds it when it is first asked for, into the user's cache folder. Without a
compiler there is no kernel, and XLA's top-k is taken.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.resources
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import tempfile

import jax
import jax.numpy as jnp

_SYMBOL = 'sae_jax_columns'
_FLAGS = ('-O3', '-march=native', '-std=c++17', '-shared', '-fPIC', '-w')
_COMPILE_SECONDS = 120


def columns(product_BF: jax.Array, bias_F: jax.Array, k: int) -> jax.Array:
  """Indices [B, k] of the k largest of each row of product + bias, descending, as `jax.lax.top_k` orders them.

  On a CPU, in float32, and where `available` says so. No gradient goes through.
  """
  made = jax.ShapeDtypeStruct((product_BF.shape[0], k), jnp.int32)
  call = jax.ffi.ffi_call(_SYMBOL, made, vmap_method='sequential')
  return call(jax.lax.stop_gradient(product_BF), jax.lax.stop_gradient(bias_F))


@functools.cache
def available() -> bool:
  """Whether this process has the kernel. The first call builds or loads it."""
  compiler = shlex.split(os.environ.get('CXX') or 'c++')
  if not shutil.which(compiler[0]):
    return False
  source = importlib.resources.files(__package__).joinpath('selection.cc').read_bytes()
  key = hashlib.sha256(
    source + repr((jax.lib.__version__, compiler, _FLAGS, platform.libc_ver(), _instructions())).encode()
  ).hexdigest()
  try:
    library = _built(source, compiler, _cache() / f'selection-{key[:16]}.so')
  # No folder to write to, no header, a compiler too old, …; a user without a home is a RuntimeError.
  except (OSError, RuntimeError, subprocess.SubprocessError):
    return False
  jax.ffi.register_ffi_target(_SYMBOL, jax.ffi.pycapsule(getattr(library, _SYMBOL)), platform='cpu')
  return True


def _built(source: bytes, compiler: list[str], path: pathlib.Path) -> ctypes.CDLL:
  """The library at this path, compiled where it is not there or cannot be loaded."""
  if path.exists():
    with contextlib.suppress(OSError):
      return ctypes.CDLL(str(path))
    path.unlink(missing_ok=True)  # cut short by a full disk or a loss of power
  path.parent.mkdir(parents=True, exist_ok=True)
  # Made under another name: several processes may build at once, and one may be killed.
  with tempfile.TemporaryDirectory(dir=path.parent) as name:
    made, written = pathlib.Path(name, path.name), pathlib.Path(name, 'selection.cc')
    written.write_bytes(source)
    command = [*compiler, *_FLAGS, f'-I{jax.ffi.include_dir()}', str(written), '-o', str(made)]
    subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_SECONDS)
    if not path.exists():  # never under another process: on a network's disk its pages would be gone
      made.replace(path)
  return ctypes.CDLL(str(path))


def _cache() -> pathlib.Path:
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache', 'sae_jax')


def _instructions() -> str:
  """Those of this CPU: a home folder may serve machines of several kinds."""
  try:
    with open('/proc/cpuinfo') as f:
      return next((line for line in f if line.startswith(('flags', 'Features'))), '')
  except OSError:
    return ''
