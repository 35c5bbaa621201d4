"""Being asked to stop by a signal. Plain Python, for a worker listens before it loads jax."""

import signal

STOP = (signal.SIGTERM, signal.SIGINT)


class Signalled:
  """True once this process was sent SIGTERM or SIGINT; `signum` is the last of them. Make it in the main thread."""

  def __init__(self) -> None:
    self.signum: int | None = None
    self.listen()

  def __call__(self) -> bool:
    return self.signum is not None

  def listen(self) -> None:
    """Takes the signals, also back from whoever took them meanwhile."""
    for number in STOP:
      signal.signal(number, self._hear)

  def ask(self) -> None:
    """Asks this run to stop, as a SIGTERM would."""
    self.signum = self.signum or signal.SIGTERM

  def _hear(self, signum: int, frame: object) -> None:
    self.signum = signum
