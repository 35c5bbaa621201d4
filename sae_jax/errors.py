"""The one exception that means "the user asked for something impossible"; entry points print it as a single line."""

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

USER_ERROR_EXIT = 2
PREEMPTED = 42  # exit code: a checkpoint is saved and a restart is free
# Exit code after an error of the machine: no cell is charged. 128 + the signal of a failing memory or disk: engines
# restart it, as they would a dead node, but within a budget, for the machine may stay broken.
HOST_BROKEN = 128 + signal.SIGBUS


class UserError(Exception):
  """A mistake in the input. The message is one line: the value, the rule and the remedy."""

  def __str__(self) -> str:
    # A name that comes from a file may hold line breaks.
    return ' '.join(super().__str__().splitlines())


class BrokenFile(UserError):
  """A file that cannot be believed. No attempt of a cell is charged for it: the remedy is to move the file aside."""


def end_at_once(code: int) -> NoReturn:
  """Ends this process after what it has said, and waits for nothing else.

  Python's own end waits for threads, which may hang. It also waits for a checkpoint that is still being written, and the
  cell may be another worker's by now.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def one_line_errors(main: Callable[[list[str]], int]) -> Callable[[list[str] | None], None]:
  """Wraps an entry point: exits with its return code, or with one line on stderr for a `UserError`.

  Every other exception keeps its traceback.
  """

  @functools.wraps(main)
  def run(argv: list[str] | None = None) -> None:
    try:
      code = main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
      print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
      code = USER_ERROR_EXIT
    except BrokenPipeError:  # `... | head` has read enough; what is buffered must not raise again at exit
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      code = 128 + signal.SIGPIPE
    sys.exit(code)

  return run
