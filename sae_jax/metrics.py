"""What a run leaves behind: metrics.jsonl, result.json, failure.json."""

import datetime
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import sae_jax
from sae_jax import faults, files, schema
from sae_jax.errors import UserError

# What /proc/cpuinfo says of a processor, on x86 and on Arm, that compiled code depends on.
_CPU = (
  'vendor_id',
  'cpu family',
  'model',
  'model name',
  'flags',
  'CPU implementer',
  'CPU architecture',
  'CPU variant',
  'CPU part',
  'Features',
)
_METRICS = re.compile(r'metrics(\.([0-9]+))?\.jsonl')
_ALL_LINES = 2**26  # bytes of a metrics file, about 100,000 lines; more is not read
_KINDS = {field.line: field.kind for field in schema.CURVES}


class MetricsFile:
  """Appends one JSON object a line. A later line for a step replaces an earlier one.

  A line is on the disk when `write` returns, so before the checkpoint that makes its steps past.

  Where files cannot be appended to (object stores) each attempt has its own file, rewritten whole, and the reader
  merges them.
  """

  def __init__(self, workdir: str, cell_id: str):
    self._local, self._cell = files.is_local(workdir), cell_id
    if self._local:
      self._path = files.join(workdir, schema.METRICS)
      files.local(self._path).parent.mkdir(parents=True, exist_ok=True)
      _drop_partial_line(files.local(self._path))
    else:
      attempts = [n for n in files.listdir(workdir) if n.startswith('metrics')]
      self._path = files.join(workdir, f'metrics.{len(attempts):04d}.jsonl')
      self._lines: list[bytes] = []

  def write(self, step: int, values: dict[str, Any]) -> None:
    line = schema.dump_line({'step': step} | values, self._cell)
    if self._local:
      files.append(self._path, line)
    else:
      self._lines.append(line)
      files.replace(self._path, b''.join(self._lines))


def read_metrics(workdir: str, cell_id: str) -> list[dict[str, Any]]:
  """Lines of all attempts by step, the later attempt and line winning.

  A line that was cut short, was changed, belongs to another cell, or has a number of the wrong type is left out.
  """
  by_step = {line['step']: line for line in reversed(list(newest_lines(workdir, cell_id)))}
  return [by_step[step] for step in sorted(by_step)]


def newest_lines(workdir: str, cell_id: str) -> Iterator[dict[str, Any]]:
  """Every line that can be believed, from the last of the newest attempt to the first of the oldest.

  The files are read as far as the caller goes, so that the last line is cheap.
  """
  attempts = [found for found in map(_METRICS.fullmatch, files.listdir(workdir)) if found]
  # The one without a number, to which all attempts on a local disk append, counts as the oldest.
  for attempt in sorted(attempts, key=lambda found: int(found[2] or -1), reverse=True):
    try:
      data = files.read(files.join(workdir, attempt[0]), _ALL_LINES)
    except (FileNotFoundError, IsADirectoryError, schema.Broken):
      continue
    for text in reversed(data.split(b'\n')):
      if not text:
        continue
      try:
        line = schema.parse(text)
        schema.check(line, (), cell_id)
        if all(schema.is_kind(line[key], kind) for key, kind in _KINDS.items() if line.get(key) is not None):
          if line.get('step') is not None and line['step'] >= 0:
            yield schema.content(line)
      except schema.Broken:
        continue


def commit_result(workdir: str, result: dict[str, Any]) -> None:
  """Writes result.json, once: the moment a cell is finished.

  Raises FileExistsError if another did, and `schema.Broken` for a result that no reader would believe.
  """
  data = schema.dump(result)
  schema.check(schema.parse(data), schema.RESULTS)
  files.create(files.join(workdir, schema.RESULT), data)
  files.remove(files.join(workdir, schema.FAILURE))


def record_failure(workdir: str, error: BaseException, exit_code: int | None = None, permanent: bool = False) -> None:
  """Writes failure.json, counting attempts. `permanent` failures are not worth a retry; a `UserError` is one, except
  for a full disk."""
  path = files.join(workdir, schema.FAILURE)
  try:
    before = schema.parse(files.read(path))
    schema.check(before, schema.FAILURES)
    attempts = before['attempts']
  except (FileNotFoundError, IsADirectoryError, schema.Broken):
    attempts = 0
  record = {
    'error': ' '.join(str(error).split())[:2000],
    'kind': type(error).__name__,
    'traceback': ''.join(traceback.format_exception(error))[-8000:],
    'attempts': attempts + 1,
    'permanent': permanent or (isinstance(error, UserError) and not faults.is_disk_full(error)),
    'exit_code': exit_code,
    'host': socket.gethostname(),
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }
  try:
    files.replace(path, schema.dump(record))
  except OSError as unwritten:  # on a full disk the error itself matters more than its record
    print(f'{path} could not be written ({unwritten.strerror})', file=sys.stderr)


def versions() -> dict[str, str]:
  """Versions of what decides a result's bits."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  return {'sae_jax': sae_jax.__version__, 'python': platform.python_version()} | {
    name: importlib.metadata.version(name) for name in names
  }


def processor() -> dict[str, Any]:
  """What decides the bits of a run on cpu devices: the cores it may use, and a hash of model and instruction set.

  Two cores, one core and SSE4.2 alone gave three results of one cell. The hash is '' where /proc/cpuinfo is missing.
  """
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
  try:
    lines = pathlib.Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines()
  except OSError:
    return {'n_cores': cores, 'cpu': ''}
  known = [line for line in lines if line.partition(':')[0].strip() in _CPU]
  # What XLA is told of its threads and instruction set.
  known += [f'{name}={os.environ[name]}' for name in ('NPROC', 'PJRT_NPROC') if name in os.environ]
  known += sorted(word for word in os.environ.get('XLA_FLAGS', '').split() if word.startswith('--xla_cpu_'))
  return {'n_cores': cores, 'cpu': hashlib.sha256('\n'.join(known).encode()).hexdigest()[:12]}


def git_commit() -> str:
  """Commit of the source tree, with '+' when it has uncommitted changes; '' outside a checkout."""
  where = os.path.dirname(os.path.abspath(__file__))

  def git(*args: str) -> str:
    return subprocess.run(('git', '-C', where, *args), capture_output=True, text=True, timeout=10, check=True).stdout

  try:
    changed = git('status', '--porcelain', '--untracked-files=no').strip()
    return git('rev-parse', '--short=12', 'HEAD').strip() + ('+' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return ''


def _drop_partial_line(path: pathlib.Path) -> None:
  """Ends a file that a kill cut mid-line, so that the next line does not join the torn one."""
  if not path.exists():
    return
  with open(path, 'rb+') as f:
    start = max(0, f.seek(0, os.SEEK_END) - schema.SMALL)  # no line is longer
    f.seek(start)
    f.truncate(start + f.read().rfind(b'\n') + 1)
