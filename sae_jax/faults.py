"""Whose fault an error is: the disk's, the machine's, or the work's. Plain Python."""

import errno

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
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
    return True
  if any(text in str(error) for text in ('No space left', 'no space left', 'ENOSPC', 'Disk quota')):
    return True
  return error.__cause__ is not None and is_disk_full(error.__cause__)


def is_host_error(error: BaseException) -> bool:
  """Whether an error, or one that led to it, is of the machine: no descriptors, memory, processes or working disk.

  No cell is at fault, and a new process may do better, here or elsewhere. A full disk is not meant: it needs a person.
  """
  if is_disk_full(error):
    return False
  seen: list[BaseException] = []
  left: list[BaseException | None] = [error]
  while left:
    one = left.pop()
    if one is None or any(one is other for other in seen):
      continue
    if isinstance(one, OSError) and one.errno in _OF_HOST:
      return True
    if any(text in str(one) for text in _OF_HOST_TEXTS):
      return True
    seen.append(one)
    left += [one.__cause__, None if one.__suppress_context__ else one.__context__]
  return False
