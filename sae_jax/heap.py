"""Keeps the memory of a step for the next one. Without this a CPU asks the system for fresh pages in every step.

glibc hands large arrays back to the system as soon as they are freed. The next step then touches new pages, and the system
fills each with zeros first. `keep` has glibc hold on to them. It is about the C library of a process on Linux; with another
one, and for the memory of an accelerator, nothing happens.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_MMAP_MAX_AT_FIRST = 65536
_TRIM_THRESHOLD_AT_MOST = 2**26  # where glibc itself moves it to
_NEVER = -1  # as a size the largest of all; 2^31 - 1 would be 2 GB


def one_arena() -> None:
  """Has all threads take memory from one arena. Call it before there are threads.

  An arena of a thread's own holds no large arrays: those would come from the system, whatever `keep` says.
  """
  if glibc := _glibc():
    glibc.mallopt(_ARENA_MAX, 1)


@contextlib.contextmanager
def kept() -> Iterator[None]:
  """Freed memory stays with the process inside, and goes back to the system at the end. See `keep`."""
  keep()
  try:
    yield
  finally:
    if glibc := _glibc():
      glibc.mallopt(_MMAP_MAX, _MMAP_MAX_AT_FIRST)
      glibc.mallopt(_TRIM_THRESHOLD, _TRIM_THRESHOLD_AT_MOST)
      glibc.malloc_trim(0)


def keep() -> None:
  """Freed memory stays with the process from now on.

  Call it when what lives long has been made. Arrays made later would keep apart what is freed between them.
  """
  if glibc := _glibc():
    glibc.mallopt(_TRIM_THRESHOLD, _NEVER)
    glibc.mallopt(_MMAP_MAX, 0)


def _glibc() -> Any:
  """The C library of this process where it is glibc, else None."""
  try:
    library = ctypes.CDLL(None)
  except (OSError, TypeError):  # a system without one to ask
    return None
  # Others have a `mallopt` too, with other numbers.
  return library if hasattr(library, 'gnu_get_libc_version') else None
