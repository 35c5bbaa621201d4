"""Whose fault an error is: the disk's, the machine's, or the work's. Plain Python."""

import errno

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_FULL_TEXTS = ('No space left', 'no space left', 'ENOSPC', 'Disk quota')
# What only the machine can be blamed for. EAGAIN comes from a fork without room for another process.
_OF_HOST = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO, errno.ESTALE)
# The same from libraries that keep no errno, and what Python says where a thread cannot be started.
_OF_HOST_TEXTS = (
  'Too many open files',
  'Cannot allocate memory',
  'Input/output error',
  'Stale file handle',
  "can't start new thread",
)


def is_disk_full(error: BaseException) -> bool:
  """Whether an error, or the one that caused it, says that there is no space left."""
  return _is_of(_chain(error, contexts=False), _DISK_FULL, _DISK_FULL_TEXTS)


def is_host_error(error: BaseException) -> bool:
  """Whether an error, or one that led to it, is of the machine: no descriptors, memory, processes or working disk.

  No cell is at fault, and a new process may do better, here or elsewhere. A full disk is not meant: it needs a person.
  """
  return not is_disk_full(error) and _is_of(_chain(error, contexts=True), _OF_HOST, _OF_HOST_TEXTS)


def _is_of(errors: list[BaseException], numbers: tuple[int, ...], texts: tuple[str, ...]) -> bool:
  return any(
    (isinstance(one, OSError) and one.errno in numbers) or any(text in str(one) for text in texts) for one in errors
  )


def _chain(error: BaseException, contexts: bool) -> list[BaseException]:
  """An error and its causes, each once; with `contexts` also what was being handled when one of them was raised."""
  chain: list[BaseException] = []
  left: list[BaseException | None] = [error]
  while left:
    one = left.pop()
    if one is not None and all(one is not other for other in chain):
      chain.append(one)
      left += [one.__cause__, one.__context__ if contexts and not one.__suppress_context__ else None]
  return chain
