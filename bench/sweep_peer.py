"""Trains cells as TopK autoencoders of another library, from a store of ours.

python -m bench.sweep_peer --library=sparsify --store=DIR --cells=FILE.json --out=DIR --began=SECONDS  (peers' environment)
One cell after another, or with --together all of them updated on every batch. Of each finished cell NAME.npz holds the
weights under our names, and NAME.json, which is written last, what it took.
"""

import argparse
import importlib.metadata
import json
import pathlib
import time
from typing import Any

import numpy as np
import torch  # pyrefly: ignore[missing-import]  (in the peers' environment only)

from bench import worker
from bench.libraries import LIBRARIES, Build, Cell
from bench.stored import Stored


def train(cells: dict[str, Cell], build: Build, store: Stored, out: pathlib.Path, tell: dict[str, Any]) -> None:
  """Trains cells side by side on the same batches, and writes what is left of each; `tell` goes into every NAME.json.

  Each is said to have taken an equal share of the time. Reading, building, training and writing weights are timed.
  """
  began, cpu_s, before = time.monotonic(), time.process_time(), worker.cpu_time()
  ((batch, steps),) = {(cell.batch, cell.steps) for cell in cells.values()}
  trainings = {}
  for name, cell in cells.items():
    torch.manual_seed(0)
    trainings[name] = build(cell, None)
  seen = dict.fromkeys(cells, 0)
  for at in range(steps):
    x_BD = torch.from_numpy(store.rows(at * batch, (at + 1) * batch))
    for name, one in trainings.items():
      one.step(at, x_BD)
      seen[name] += len(x_BD)
  for name, one in trainings.items():
    np.savez(out / f'{name}.npz', **{key: a.detach().numpy() for key, a in one.weights().items()})
  seconds, cpu_s = time.monotonic() - began, time.process_time() - cpu_s
  took = {'seconds': seconds / len(cells), 'cpu_s': cpu_s / len(cells)}
  took |= {'peak_bytes': worker.memory()['VmHWM'], 'load_of_others': worker.share_of_others(before, cpu_s)}
  for name, one in trainings.items():
    errors = {'square_error': _square_error(one.reconstruct, store, batch, tell['eval_tokens'])}
    written = out / f'{name}.json.new'
    written.write_text(json.dumps({'tokens': seen[name]} | took | errors | tell))
    written.rename(out / f'{name}.json')  # whole or not at all


def _square_error(reconstruct: Any, store: Stored, batch: int, tokens: int) -> float:
  """The sum of squared errors over held-out tokens, by the library's own forward pass."""
  total = 0.0
  with torch.no_grad():
    for start in range(0, tokens, batch):
      x_BD = torch.from_numpy(store.held_out(start, min(start + batch, tokens)))
      total += float((x_BD - reconstruct(x_BD)).double().pow(2).sum())
  return total


def main() -> None:
  parser = argparse.ArgumentParser(prog='python -m bench.sweep_peer', description=__doc__.splitlines()[0])
  parser.add_argument('--library', choices=LIBRARIES, required=True)
  parser.add_argument('--store', metavar='DIR', required=True)
  parser.add_argument('--cells', metavar='FILE', required=True, help='{name: the fields of bench.libraries.Cell}')
  parser.add_argument('--together', action='store_true')
  parser.add_argument('--eval_tokens', type=int, required=True, help='held-out tokens that the error is measured on')
  parser.add_argument('--out', metavar='DIR', required=True)
  parser.add_argument('--began', type=float, required=True, help='time.monotonic() when this process was started')
  args = parser.parse_args()
  load, package = LIBRARIES[args.library]
  build = load()
  tell = {
    'start_s': time.monotonic() - args.began,
    'start_cpu_s': time.process_time(),
    'eval_tokens': args.eval_tokens,
    'threads': torch.get_num_threads(),
    'versions': {name: importlib.metadata.version(name) for name in (package, 'torch')},
  }
  cells = {name: Cell(**fields) for name, fields in json.loads(pathlib.Path(args.cells).read_text()).items()}
  store, out = Stored(args.store), pathlib.Path(args.out)
  for group in [cells] if args.together else [{name: cell} for name, cell in cells.items()]:
    train(group, build, store, out, tell)


if __name__ == '__main__':
  main()
