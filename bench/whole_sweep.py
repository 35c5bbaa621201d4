"""The demo's twenty cells from one store: our sweep, and what other libraries take for the same.

python -m bench.whole_sweep --store=runs/demo/store [--peers_python=runs/peers/bin/python] [--json=OUT]
Same tokens in the same order, same batches, same rule for the learning rate, whose constant is tuned for each
library. Started again, it goes on after the last finished cell. What is the same and what is not: bench/peers.md.
"""

import functools
import hashlib
import json
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from bench import command, sweep
from bench.alternate import machine
from bench.side_by_side import PEERS
from sae_jax import files, metrics, sharding
from sae_jax.config import Cell
from sae_jax.data.source import open_source
from sae_jax.errors import UserError, one_line_errors
from sae_jax.evaluate import Evaluator
from sae_jax.flags import whole
from sweeps import grid

TOKENS = 260_096  # of each cell: the demo's
_SIDE_BY_SIDE = ('dictionary_learning',)  # whose own loop trains many on one stream
_RATES = (5e-4, 1e-3, 2e-3)  # for n = 2^14; ours is the middle one
_MOST_RATES = 8
_DEAD_TOKENS = 10_000_000  # their default, which runs as short as these never reach
_ERRORS_AGREE = 1e-3
_PRELOADED = ('LD_PRELOAD', 'CXX')  # another library of matrices, other kernels of ours
_RAW, _EMA = 'sae_jax raw', 'sae_jax EMA'


def measure(
  store: str, python: str, work: pathlib.Path, tokens: int, every: int, libraries: Iterable[str]
) -> dict[str, Any]:
  """Every so many of the demo's cells on `tokens` of a store, by us and by other libraries; `work` keeps what is done.

  Raises `UserError` when a library cannot be started, when a cell of it did not see all tokens, and when its weights do not
  reconstruct with us as they do with it.
  """
  work.mkdir(parents=True, exist_ok=True)
  path = sweep.grid_file(work, every, {'data.path': os.path.abspath(store), 'train.tokens': tokens})
  cells = [cell for _, cell in grid.build(str(path)).cells]
  # Other cells, of another store or recipe, are others' work. So is what another machine or another library took.
  where = machine()
  of = [where[key] for key in ('cpu', 'cores', 'versions')] + [os.environ.get(key) for key in _PRELOADED]
  about = json.dumps([[cell.id for cell in cells], *of])
  folder = work / hashlib.sha256(about.encode()).hexdigest()[:12]
  folder.mkdir(exist_ok=True)
  runs = {name: _ours(path, folder, size) for name, size in ((sweep.TOGETHER, len(cells)), (sweep.APART, 1))}
  results = runs[sweep.TOGETHER].pop('results')
  if runs[sweep.APART].pop('results') != results:
    raise UserError(f'our cells do not end alike in a group and alone; see {folder}, and do not compare their time')
  nmse = {name: [results[cell.id][key] for cell in cells] for name, key in ((_RAW, 'nmse_raw'), (_EMA, 'nmse_ema'))}
  for library in libraries:
    runs[library] = _theirs(library, python, folder / library, cells)
    nmse[library] = runs[library].pop('nmse')
  return {
    'tokens': tokens,
    'cells': [{'n_latents': cell.sae.n_latents, 'k': cell.sae.k} for cell in cells],
    'runs': runs,
    'nmse': nmse,
    'nmse_over_ours': {
      name: {ours: [a / b for a, b in zip(values, nmse[ours], strict=True)] for ours in (_RAW, _EMA)}
      for name, values in nmse.items()
    },
    'machine': where,
  }


def _ours(path: pathlib.Path, folder: pathlib.Path, size: int) -> dict[str, Any]:
  """What a launch of the grid at `path` in groups of `size` took, and the NMSE and the parameters of each of its cells."""
  done, ledger = folder / f'group{size}.json', folder / f'group{size}'
  commit = metrics.git_commit()
  if not done.exists() or json.loads(done.read_text())['git_commit'] != commit:
    shutil.rmtree(ledger, ignore_errors=True)  # half a launch cannot be timed
    took, results = sweep.launch(path, ledger, size)
    kept = ('nmse_raw', 'nmse_ema', 'params_digest')
    record = took | {'git_commit': commit, 'results': {id: {key: r[key] for key in kept} for id, r in results.items()}}
    files.replace(str(done), json.dumps(record).encode())
  return json.loads(done.read_text())


def _theirs(library: str, python: str, folder: pathlib.Path, cells: list[Cell]) -> dict[str, Any]:
  """What a library took for all cells in one process, and the NMSE of each, tuned on two of them."""
  middle, sparsest = cells[len(cells) // 2], max(cells, key=lambda cell: cell.sae.n_latents / cell.sae.k)

  def trained(some: list[Cell], rate: float, dead_tokens: int, kind: str = 'tuning') -> list[dict[str, Any]]:
    return _trained(library, python, folder / f'{kind}-{rate:g}-{dead_tokens}', some, rate, dead_tokens)

  ours = middle.loss.dead_tokens
  tried = tuned(lambda rate: trained([middle], rate, ours)[0]['nmse'], _RATES)
  rate = min(tried, key=lambda c: tried[c])
  by_dead = {tokens: trained([sparsest], rate, tokens)[0]['nmse'] for tokens in (ours, _DEAD_TOKENS)}
  dead_tokens = min(by_dead, key=lambda tokens: by_dead[tokens])
  done = trained(cells, rate, dead_tokens, 'cells')
  if any(one['versions'] != done[0]['versions'] for one in done):
    raise UserError(f'the cells of {library} in {folder} are of several versions of it; delete that folder')
  return {
    'seconds': max(one['start_s'] for one in done) + sum(one['seconds'] for one in done),
    'cpu_s': max(one['start_cpu_s'] for one in done) + sum(one['cpu_s'] for one in done),
    'peak_bytes': max(one['peak_bytes'] for one in done),
    'load_of_others': max(one['load_of_others'] for one in done),
    'nmse': [one['nmse'] for one in done],
    'rate_at_16k': rate,
    'tried': {f'{c:g}': found for c, found in sorted(tried.items())},
    'dead_tokens': dead_tokens,
    'tried_dead_tokens': by_dead,
    'seconds_of_cells': [one['seconds'] for one in done],
    'threads': done[0]['threads'],
    'versions': done[0]['versions'],
  }


def tuned(nmse_at: Callable[[float], float], rates: Iterable[float]) -> dict[float, float]:
  """NMSE at each of the rates, and at halves or doubles of them until the best is not at an end."""
  tried = {rate: nmse_at(rate) for rate in rates}
  while (best := min(tried, key=lambda rate: tried[rate])) in (low := min(tried), high := max(tried)):
    if len(tried) == _MOST_RATES:
      raise UserError(
        f'the best of {len(tried)} learning rates is still at an end ({best:g}); start from other ones than {tuple(rates)}'
      )
    beyond = low / 2 if best == low else high * 2
    tried[beyond] = nmse_at(beyond)
  return tried


def _trained(
  library: str, python: str, out: pathlib.Path, cells: list[Cell], rate: float, dead_tokens: int
) -> list[dict[str, Any]]:
  """What training took of each cell, with its `nmse`. Trains those that are not done, in a process of the library's."""
  out.mkdir(parents=True, exist_ok=True)
  named = {f'n{cell.sae.n_latents}-k{cell.sae.k}': cell for cell in cells}
  done = {name: out / f'{name}.json' for name in named}
  together = library in _SIDE_BY_SIDE
  missing = {name: cell for name, cell in named.items() if not done[name].exists()}
  if missing:
    todo = named if together else missing
    (out / 'cells.todo').write_text(
      json.dumps({name: _fields(cell, rate) | {'dead_tokens': dead_tokens} for name, cell in todo.items()})
    )
    flags = [f'--library={library}', f'--store={cells[0].data.path}', f'--cells={out / "cells.todo"}', f'--out={out}']
    flags += [f'--eval_tokens={cells[0].eval.tokens}', f'--began={time.monotonic()}', *['--together'] * together]
    sweep.run('bench.sweep_peer', *flags, python=python)
  return [
    checked(f'{library} {name}', json.loads(done[name].read_text()), cell, out / f'{name}.npz')
    for name, cell in named.items()
  ]


def _fields(cell: Cell, rate: float) -> dict[str, Any]:
  """Fields of `bench.libraries.Cell`: those of a cell of ours, with the constant of its learning rate replaced."""
  return {
    'd': cell.sae.d_model,
    'n': cell.sae.n_latents,
    'batch': cell.train.batch_tokens,
    'k': cell.sae.k,
    'rate': cell.optim.learning_rate * rate / cell.recipe.learning_rate_at_16k,
    'steps': cell.train.steps,
  }


def checked(label: str, took: dict[str, Any], cell: Cell, weights: pathlib.Path) -> dict[str, Any]:
  """`took` with the `nmse` of the weights by our definition, on our held-out tokens.

  Raises `UserError` when not all tokens were trained on, and when the library finds another error with these weights.
  """
  asked = cell.train.steps * cell.train.batch_tokens
  if took['tokens'] != asked:
    raise UserError(
      f'{label} was trained on {took["tokens"]} of {asked} tokens; delete {weights.parent} and start again'
    )
  with np.load(weights) as params:
    (found,) = _evaluator(cell)(dict(params))
  ours = found.mse * cell.eval.tokens * cell.sae.d_model
  if not abs(ours / took['square_error'] - 1) < _ERRORS_AGREE:
    raise UserError(
      f'{label} has a squared error of {took["square_error"]:.6g} by its library and {ours:.6g} by us; the weights in '
      f'{weights} do not mean the same in both, so correct bench/libraries.py'
    )
  return took | {'nmse': found.nmse}


@functools.cache
def _evaluator(cell: Cell) -> Evaluator:
  return Evaluator(cell, sharding.make_mesh(cell.mesh), open_source(cell))


def table(row: dict[str, Any]) -> str:
  """Markdown: a row a library, ours twice; below it the rates that were tried."""
  runs, over = row['runs'], row['nmse_over_ours']
  out = [
    f'{len(row["cells"])} cells of {row["tokens"]:,} tokens each:',
    '',
    f'| | whole sweep | over ours, {sweep.TOGETHER} | over ours, {sweep.APART} | CPU time | peak memory | NMSE over ours, raw '
    '| NMSE over ours, EMA |',
    '|---|---|---|---|---|---|---|---|',
  ]
  for name, run in runs.items():
    times = [f'{run["seconds"] / runs[ours]["seconds"]:.2f}' for ours in (sweep.TOGETHER, sweep.APART)]
    ratios = over.get(name, over[_EMA])
    spread = [f'{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})' for values in ratios.values()]
    label = name if name in PEERS else f'sae_jax, {name}'
    size = f'{run["peak_bytes"] / 1e9:.2f} GB'
    out.append(
      '| ' + ' | '.join([label, f'{run["seconds"]:,.0f} s', *times, f'{run["cpu_s"]:,.0f} s', size, *spread]) + ' |'
    )
  for name, run in runs.items():
    if name in PEERS:
      tried = ', '.join(f'{rate} {found:.4f}' for rate, found in run['tried'].items())
      dead = ', '.join(f'{tokens:,} {found:.4f}' for tokens, found in run['tried_dead_tokens'].items())
      out += [
        '',
        f'{name}: learning rate {run["rate_at_16k"]:g} at n = 2^14. NMSE of the middle cell by rate: {tried}. A latent is '
        f'dead after {run["dead_tokens"]:,} tokens. NMSE of the sparsest cell by these tokens: {dead}.',
      ]
  return '\n'.join(out)


@one_line_errors
def main(argv: list[str]) -> int:
  parser = command.parser('whole_sweep', __doc__)
  parser.add_argument('--store', metavar='DIR', required=True, help="the demo's, on this machine")
  command.add_peers_python(parser)
  parser.add_argument('--library', choices=PEERS, action='append', help='only this one; may repeat (default all)')
  parser.add_argument(
    '--tokens', type=whole('--tokens', 512), default=TOKENS, help='of each cell (default %(default)s)'
  )
  parser.add_argument('--every', type=whole('--every'), default=1, help='only every so many cells, for a quick try')
  parser.add_argument(
    '--work', metavar='DIR', default='runs/whole_sweep', help='what is done so far (default %(default)s)'
  )
  args = parser.parse_args(argv)
  work = pathlib.Path(args.work).absolute()
  row = measure(args.store, args.peers_python, work, args.tokens, args.every, args.library or PEERS)
  return command.report(row, table(row), args.json)


if __name__ == '__main__':
  main()
