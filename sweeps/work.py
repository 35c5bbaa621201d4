"""A worker: claims and trains cells until none is left. The same command on every host of a pod or cluster.

python -m sweeps.work --ledger=DIR

Largest cells first, so that the sweep does not end waiting for one. A worker also waits for the cells that others
are training: if one of those workers dies, its cell must be picked up.
"""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable

from sae_jax import files, flops, metrics
from sae_jax.errors import UserError, one_line_errors
from sweeps import grid, ledger

PREEMPTED = 42
SOME_FAILED = 1
Train = Callable[..., str]  # sae_jax.train.train


class Stop:
  """Turns the first SIGTERM or SIGINT into a request to save and leave; the second one kills."""

  def __init__(self) -> None:
    self.signum: int | None = None
    for signum in (signal.SIGTERM, signal.SIGINT):
      signal.signal(signum, self._handle)

  def _handle(self, signum: int, _: object) -> None:
    self.signum = signum
    for again in (signal.SIGTERM, signal.SIGINT):
      signal.signal(again, signal.SIG_DFL)

  def __call__(self) -> bool:
    return self.signum is not None


def run(
  store: ledger.Ledger,
  train: Train,
  *,
  stop: Callable[[], bool],
  permanent: tuple[type[Exception], ...] = (),
  max_failures: int = ledger.MAX_FAILURES,
  poll_s: float = 5.0,
) -> int:
  """Trains until every cell is done (0) or failed for good (1), or `stop` becomes true (42).

  An exception in one cell is recorded there and leaves the others alone; after a `UserError` or one of `permanent`
  the cell is not tried again. Raises `LeaseLost` when another worker
  took over the cell in training: this process must end without touching it again.
  """
  while not stop():
    states = store.states(max_failures)
    if all(s.state in ('done', 'failed') for s in states):
      return SOME_FAILED if any(s.state == 'failed' for s in states) else 0
    waiting = sorted((s for s in states if s.state == 'waiting'), key=_precedence)
    lease, cell = next(((taken, s.cell) for s in waiting if (taken := store.claim(s.cell.id))), (None, None))
    if lease is None or cell is None:
      _sleep(poll_s, stop)
      continue
    with lease:
      folder, name = store.folder(cell.id), f'{cell.id} {grid.label(cell.overrides)}'
      print(f'cell {name}: starts', flush=True)
      try:
        outcome = train(
          cell.config, folder, should_stop=_lease_or(stop, lease), label=grid.label(cell.overrides)
        )
      except ledger.LeaseLost:
        raise
      except Exception as error:  # whatever a cell raises is that cell's: the sweep goes on
        lease.check()
        metrics.record_failure(folder, error, permanent=isinstance(error, permanent))
        print(f'cell {name}: failed, {type(error).__name__}: {ledger.printable(str(error))}', flush=True)
      else:
        print(f'cell {name}: {outcome}', flush=True)
  return PREEMPTED


def _precedence(state: ledger.CellState) -> tuple[int, float, str]:
  """Fresh cells before failed ones, then the most expensive."""
  return state.attempts, -flops.cell_flops(state.cell.config)['dense'], state.cell.id


def _lease_or(stop: Callable[[], bool], lease: ledger.Lease) -> Callable[[], bool]:
  def should_stop() -> bool:
    lease.check()
    return stop()

  return should_stop


def _sleep(seconds: float, stop: Callable[[], bool]) -> None:
  # In short naps: Python goes on sleeping after a signal handler has run.
  until = time.monotonic() + seconds
  while time.monotonic() < until and not stop():
    time.sleep(min(0.2, seconds))


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog='python -m sweeps.work',
    description='Claim and train the unfinished cells of a ledger until none is left.',
    epilog='Exit codes: 0 all done, 1 some failed for good, 42 stopped by SIGTERM with a checkpoint, 130 by Ctrl-C.',
  )
  parser.add_argument('--ledger', required=True, help='folder or fsspec URL that sweeps.launch has filled')
  add_max_failures(parser)
  return parser


def add_max_failures(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--max_failures', type=int, default=ledger.MAX_FAILURES, help='attempts of a cell (default %(default)s)'
  )


def check_max_failures(value: int) -> None:
  if value < 1:
    raise UserError(f'--max_failures={value} is below 1; a cell needs at least one attempt')


@one_line_errors
def main(argv: list[str]) -> int:
  stop = Stop()  # before the heavy imports: a signal in those seconds must not be lost
  args = _parser().parse_args(argv)
  check_max_failures(args.max_failures)
  store = ledger.Ledger(args.ledger)
  store.cells()

  import jax

  from sae_jax import train as training

  if files.is_local(store.path):
    # Cells of one shape compile once for all workers and restarts.
    jax.config.update('jax_compilation_cache_dir', str(files.local(files.join(store.path, 'compile_cache'))))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  try:
    code = run(
      store, training.train, stop=stop, permanent=(training.Diverged,), max_failures=args.max_failures
    )
  except ledger.LeaseLost as error:
    print(f'lease lost: {error}', file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(
      PREEMPTED
    )  # not sys.exit: a checkpoint still being written belongs to a cell that is no longer ours
  return 128 + signal.SIGINT if code == PREEMPTED and stop.signum == signal.SIGINT else code


if __name__ == '__main__':
  main()
