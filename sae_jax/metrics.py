"""What a run leaves behind: metrics.jsonl, result.json, failure.json, and what a person sees meanwhile."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
import traceback
from typing import Any

from tqdm import tqdm

from sae_jax import files
from sae_jax.errors import UserError

METRICS, RESULT, FAILURE = 'metrics.jsonl', 'result.json', 'failure.json'


class MetricsFile:
  """Appends one JSON object a line. A later line for a step replaces an earlier one.

  Where files cannot be appended to (object stores) each attempt has its own file, rewritten whole, and the reader
  merges them.
  """

  def __init__(self, workdir: str):
    self._local = files.is_local(workdir)
    if self._local:
      self._path = files.join(workdir, METRICS)
      files.local(self._path).parent.mkdir(parents=True, exist_ok=True)
      _drop_partial_line(files.local(self._path))
    else:
      attempts = [n for n in files.listdir(workdir) if n.startswith('metrics')]
      self._path = files.join(workdir, f'metrics.{len(attempts):04d}.jsonl')
      self._lines: list[str] = []

  def write(self, step: int, values: dict[str, Any]) -> None:
    line = json.dumps({'step': step} | values, allow_nan=False) + '\n'
    if self._local:
      with open(files.local(self._path), 'a') as f:
        f.write(line)
    else:
      self._lines.append(line)
      files.replace(self._path, ''.join(self._lines).encode())


def read_metrics(workdir: str) -> list[dict[str, Any]]:
  """Lines of all attempts by step, the later attempt and line winning. A torn last line is passed over."""
  by_step: dict[int, dict[str, Any]] = {}
  for name in files.listdir(workdir):
    if name.startswith('metrics') and name.endswith('.jsonl'):
      for line in files.read(files.join(workdir, name)).decode(errors='replace').splitlines():
        try:
          record = json.loads(line)
          by_step[int(record['step'])] = record
        except (ValueError, KeyError, TypeError):
          continue
  return [by_step[step] for step in sorted(by_step)]


def commit_result(workdir: str, result: dict[str, Any]) -> None:
  """Writes result.json, once: the moment a cell is finished. Raises FileExistsError if another did."""
  files.create(files.join(workdir, RESULT), json.dumps(result, indent=1, allow_nan=False).encode() + b'\n')
  files.remove(files.join(workdir, FAILURE))


def record_failure(
  workdir: str, error: BaseException, exit_code: int | None = None, permanent: bool = False
) -> None:
  """Writes failure.json, counting attempts. `permanent` failures are not worth a retry; a `UserError` is one, except
  for a full disk."""
  path = files.join(workdir, FAILURE)
  try:
    attempts = int(json.loads(files.read(path))['attempts'])
  except (FileNotFoundError, ValueError, KeyError, TypeError):
    attempts = 0
  record = {
    'error': ' '.join(str(error).split())[:2000],
    'kind': type(error).__name__,
    'traceback': ''.join(traceback.format_exception(error))[-8000:],
    'attempts': attempts + 1,
    'permanent': permanent or (isinstance(error, UserError) and not files.is_disk_full(error)),
    'exit_code': exit_code,
    'host': socket.gethostname(),
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }
  try:
    files.replace(path, json.dumps(record, indent=1).encode() + b'\n')
  except OSError as unwritten:  # on a full disk the error itself matters more than its record
    print(f'{path} could not be written ({unwritten.strerror})', file=sys.stderr)


def versions() -> dict[str, str]:
  """Versions of what decides a result's bits."""
  names = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
  return {'sae_jax': _own_version(), 'python': platform.python_version()} | {
    name: importlib.metadata.version(name) for name in names
  }


def git_commit() -> str:
  """Commit of the source tree, with '+' when it has uncommitted changes; '' outside a checkout."""
  where = os.path.dirname(os.path.abspath(__file__))

  def git(*args):
    return subprocess.run(
      ('git', '-C', where, *args), capture_output=True, text=True, timeout=10, check=True
    ).stdout

  try:
    changed = git('status', '--porcelain', '--untracked-files=no').strip()
    return git('rev-parse', '--short=12', 'HEAD').strip() + ('+' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return ''


class Progress:
  """A bar with NMSE, tokens/s and ETA when a person watches, one plain line every ten seconds otherwise."""

  def __init__(self, label: str, steps: int, start: int, batch_tokens: int, visible: bool = True):
    self._visible = visible
    self._label, self._steps, self._batch = label, steps, batch_tokens
    self._step = self._start = start
    self._begin = self._last_line = time.monotonic()
    # tqdm counts tokens, so that its rate is one people compare.
    self._bar = (
      tqdm(total=steps * batch_tokens, initial=start * batch_tokens, desc=label, unit='tok', unit_scale=True)
      if visible and sys.stderr.isatty()
      else None
    )

  def update(self, step: int, nmse: float) -> None:
    if self._bar is not None:
      self._bar.set_postfix_str(f'step {step}/{self._steps}  nmse {nmse:.4f}', refresh=False)
      self._bar.update((step - self._step) * self._batch)
    elif self._visible and ((now := time.monotonic()) - self._last_line >= 10 or step == self._steps):
      self._last_line = now
      rate = (step - self._start) / max(1e-9, now - self._begin)
      left = (self._steps - step) / rate if rate > 0 else math.inf
      print(
        f'{self._label}: step {step}/{self._steps}  nmse {nmse:.4f}  {rate * self._batch:,.0f} tokens/s  '
        f'{left:.0f} s left',
        file=sys.stderr,
        flush=True,
      )
    self._step = step

  def note(self, text: str) -> None:
    """One line that does not break the bar."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    elif self._visible:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def _own_version() -> str:
  from sae_jax import __version__

  return __version__


def _drop_partial_line(path) -> None:
  """Ends a file that a kill cut mid-line, so that the next line does not join the torn one."""
  if not path.exists():
    return
  with open(path, 'rb+') as f:
    data = f.read()
    f.truncate(data.rfind(b'\n') + 1)
