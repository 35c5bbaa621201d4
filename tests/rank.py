"""Runs `-m MODULE` or `-c CODE` as a rank of a gang, all of whose compiled programs are kept.

Only rank 0 writes to jax's cache of compiled programs. On CPU devices every rank has programs of its own, so without
this the other ranks compile anew in every test.
"""

import runpy
import sys
from typing import Any

from jax._src import compilation_cache, compiler


def _write(key: str, seconds: float, name: str, backend: Any, executable: Any, callbacks: Any) -> None:
  if not callbacks:
    compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))


if __name__ == '__main__':
  compiler._cache_write = _write
  mode, what = sys.argv[1:3]
  sys.argv = [mode, *sys.argv[3:]]
  if mode == '-m':
    runpy.run_module(what, run_name='__main__', alter_sys=True)
  else:
    exec(compile(what, '<string>', 'exec'), {'__name__': '__main__'})
