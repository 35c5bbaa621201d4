"""Parts of a measurement, one after another until the time is up, each in a process of its own, all in one JSON file.

What hangs, crashes or breaks its device costs its own part and no other. The file is written whole after every row, so that
it can be cut off at any moment. Processes are forked: what they need is imported once, and no device may be used before.
"""

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from tqdm import tqdm

from sae_jax import files

Row = dict[str, Any]
# What a row is about, and what measures the rest of it. It may give a status of its own.
Measured = tuple[Row, Callable[[], Row]]

_PATIENCE = 3  # times its estimate that a part may take
_LONGEST = 300  # characters of an error
_fork = multiprocessing.get_context('fork')


class Skipped(Exception):
  """A row that cannot be had on this machine; the message says why."""


class Part(NamedTuple):
  name: str
  seconds: float  # about what it takes; with less time left it is skipped
  rows: Callable[[], Iterable[Measured]]  # called in the part's own process


def run(parts: Sequence[Part], seconds: float, record: Row, out: str | None) -> None:
  """Runs the parts in turn and fills `record['parts']`, which is written to `out` together with the rest of the record.

  An entry has a status: 'done'; 'failed' with a one-line error, when any of its rows is, or its process; 'skipped' with the
  reason. Entries of parts that were not reached say so from the beginning.
  """
  end = time.monotonic() + seconds
  entries = [{'part': part.name, 'status': 'skipped', 'reason': 'not reached', 'rows': []} for part in parts]
  record['parts'] = entries

  def write() -> None:
    if out:
      files.write_output(out, json.dumps(record, indent=1, allow_nan=False).encode() + b'\n', '--json')

  write()
  for part, entry in zip(tqdm(parts, unit='part', disable=None), entries, strict=True):
    began = time.monotonic()
    if (left := end - began) < part.seconds:
      entry['reason'] = f'{left:.0f} s are left and it takes about {part.seconds:.0f}'
    else:
      entry |= {'status': 'failed', 'error': 'cut off'}  # what a killed run leaves of its last part
      del entry['reason']
      error = _follow(part, min(left, _PATIENCE * part.seconds), entry['rows'], write)
      del entry['error']
      entry |= _verdict(entry['rows'], error) | {'seconds': round(time.monotonic() - began, 1)}
    write()
    why = entry.get('error') or entry.get('reason')
    line = f'{part.name}: {entry["status"]}{f" ({why})" if why else ""}; {end - time.monotonic():.0f} s left'
    tqdm.write(line, file=sys.stderr)


def _follow(part: Part, seconds: float, rows: list[Row], write: Callable[[], None]) -> str | None:
  """Collects the rows of a part's process. Returns what went wrong with the process itself."""
  receiver, sender = _fork.Pipe(duplex=False)
  process = _fork.Process(target=_measure, args=(part, sender))
  process.start()
  sender.close()
  end = time.monotonic() + seconds
  try:
    while receiver.poll(max(0.0, end - time.monotonic())):
      rows.append(receiver.recv())
      write()
    return f'stopped after {seconds:.0f} s'
  except EOFError:
    process.join(max(0.0, end - time.monotonic()))
    return f'its process ended with code {process.exitcode}' if process.exitcode else None
  finally:
    process.kill()
    process.join()
    receiver.close()


def _verdict(rows: Sequence[Row], error: str | None) -> Row:
  failed = [row for row in rows if row['status'] == 'failed']
  if error or failed:
    return {'status': 'failed', 'error': error or f'{len(failed)} of {len(rows)} rows: {failed[0]["error"]}'}
  if rows and all(row['status'] == 'skipped' for row in rows):
    return {'status': 'skipped', 'reason': rows[0]['reason']}
  return {'status': 'done'}


def _measure(part: Part, sender: Connection) -> None:
  threading.Thread(target=_end_with_parent, daemon=True).start()
  try:
    for about, measure in part.rows():
      sender.send(about | _attempt(measure))
  except Exception as error:
    sender.send(_failed(error))


def _end_with_parent() -> None:
  """So that a killed run leaves no process that holds the device."""
  multiprocessing.parent_process().join()
  os.kill(os.getpid(), signal.SIGKILL)


def _attempt(measure: Callable[[], Row]) -> Row:
  try:
    row = {'status': 'done'} | measure()
    json.dumps(row, allow_nan=False)  # else no part could be written any more
    return row
  except Skipped as skipped:
    return {'status': 'skipped', 'reason': str(skipped)}
  except Exception as error:
    return _failed(error)


def _failed(error: Exception) -> Row:
  return {'status': 'failed', 'error': f'{type(error).__name__}: {" ".join(str(error).split())}'[:_LONGEST]}
