"""Kernels in C++ for a CPU, built on this machine.

The machine's C++ compiler builds them when they are first asked for, into the user's cache folder. Without a compiler
there are no kernels, and XLA's own ways are taken.
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

_SOURCES = ('blocks.h', 'products.cc', 'selection.cc')
_SYMBOLS = ('sae_jax_add_weight_gradients', 'sae_jax_columns', 'sae_jax_decode')
# A product and a sum are one operation only where a kernel says so: XLA's results are rounded twice where it does not.
_FLAGS = ('-O3', '-march=native', '-ffp-contract=off', '-std=c++17', '-shared', '-fPIC', '-w')
_COMPILE_SECONDS = 120


@functools.cache
def available() -> bool:
  """Whether this process has the kernels. The first call builds or loads them."""
  try:
    compiler = shlex.split(os.environ.get('CXX', '')) or ['c++']
  except ValueError:  # a quotation that does not end
    return False
  if not shutil.which(compiler[0]):
    return False
  here = importlib.resources.files(__package__)
  sources = {name: here.joinpath(name).read_bytes() for name in _SOURCES}
  about = (sources, jax.lib.__version__, compiler, _FLAGS, platform.libc_ver(), _instructions())
  key = hashlib.sha256(repr(about).encode()).hexdigest()
  try:
    library = _built(sources, compiler, _cache() / f'kernels-{key[:16]}.so')
    kernels = {symbol: getattr(library, symbol) for symbol in _SYMBOLS}
  # No folder to write to, no header, a compiler too old, …; a user without a home is a RuntimeError. What a compiler made
  # may not fit this machine, or lack a kernel, which is an AttributeError.
  except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError):
    return False
  for symbol, kernel in kernels.items():
    jax.ffi.register_ffi_target(symbol, jax.ffi.pycapsule(kernel), platform='cpu')
  return True


def _built(sources: dict[str, bytes], compiler: list[str], path: pathlib.Path) -> ctypes.CDLL:
  """The library at this path, compiled where it is not there or is not whole.

  Its SHA-256 stands behind it in the file. A library that a full disk or a loss of power cut short would end this process
  while it is loaded, and every later one.
  """
  with contextlib.suppress(FileNotFoundError):
    if _is_whole(path.read_bytes()):
      return ctypes.CDLL(str(path))
    path.unlink()
  path.parent.mkdir(parents=True, exist_ok=True)
  # Made under another name: several processes may build at once, and one may be killed.
  with tempfile.TemporaryDirectory(dir=path.parent) as name:
    made = pathlib.Path(name, path.name)
    for source, text in sources.items():
      pathlib.Path(name, source).write_bytes(text)
    units = [str(pathlib.Path(name, source)) for source in sources if source.endswith('.cc')]
    command = [*compiler, *_FLAGS, f'-I{jax.ffi.include_dir()}', *units, '-o', str(made)]
    subprocess.run(command, check=True, capture_output=True, timeout=_COMPILE_SECONDS)
    library = made.read_bytes()
    with open(made, 'wb') as f:
      f.write(library + hashlib.sha256(library).digest())
      f.flush()
      os.fsync(f.fileno())
    if not path.exists():  # never under another process: on a network's disk its pages would be gone
      made.replace(path)
  return ctypes.CDLL(str(path))


def _is_whole(data: bytes) -> bool:
  size = hashlib.sha256().digest_size
  return hashlib.sha256(data[:-size]).digest() == data[-size:]


def _cache() -> pathlib.Path:
  return pathlib.Path(os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache', 'sae_jax')


def _instructions() -> str:
  """Those of this CPU: a home folder may serve machines of several kinds."""
  try:
    with open('/proc/cpuinfo') as f:
      return next((line for line in f if line.startswith(('flags', 'Features'))), '')
  except OSError:
    return ''
