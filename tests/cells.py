"""The cells that tests share, and the records of cells that were never trained.

Tracing and compiling a distinct step costs seconds, and a compiled program is kept for all tests. So tests that train
take `cell`, and change nothing of it that is compiled in unless that is what they are about: sizes, k, batch, mesh,
learning rate, coefficients. The number of steps, seeds, checkpoints and evaluations are free.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import tiny
from sae_jax import config, files, flops, metrics, schema
from sae_jax.families.family import family
from sweeps import grid

STEPS = 20
# Latents and batch divide over eight devices, whose 11 latents are fewer than k. No two sizes are equal, so that swapped
# axes show.
SHARED = {
  'sae.n_latents': 88,
  'sae.d_model': 24,
  'sae.k': 13,
  'train.batch_tokens': 40,
  'train.tokens': 40 * STEPS + 5,
  'train.checkpoint_every': 5,
  'eval.tokens': 101,
  'eval.batch_tokens': 40,
  'data.planted.n_features': 61,
  # By default the recipe derives these from the tokens, and a run of another length would be another program.
  'optim.ema_decay': 0.5,
  'loss.dead_tokens': 120,
}
# The same on a mesh of eight devices, for tests of several processes.
ON_MESH = SHARED | {'mesh.data': 2, 'mesh.latent': 4, 'train.tokens': 40 * 30}


class NeverTold:
  """Stands for the flag of a run that nobody asks to stop."""

  signum = None

  def __call__(self) -> bool:
    return False


def cell(**overrides: Any) -> config.Cell:
  """The shared cell with dotted keys replaced."""
  return config.resolve(config.override(tiny.get_config(), SHARED | overrides))


def family_keys(name: str) -> dict[str, Any]:
  """What makes a family of the shared cell: no AuxK, and 9 latents a token that a penalised one is steered to."""
  known = family(name)
  own = {} if not known.penalised else {'sae.k': 9} if known.steered else {'sae.k': None, 'loss.sparsity': 1e-3}
  return {'sae.activation': name, 'sae.k_aux': 0} | own


def of_family(name: str, **overrides: Any) -> config.Cell:
  """The shared cell as one of a family."""
  return cell(**family_keys(name) | overrides)


def sweep(*overrides: Mapping[str, Any], name: str = 'primes', base: Mapping[str, Any] | None = None) -> grid.Sweep:
  """A sweep of the tiny experiment; `base` changes all of its cells and stays out of the overrides."""
  cells = tuple((dict(o), config.resolve(config.override(tiny.get_config(), {**(base or {}), **o}))) for o in overrides)
  return grid.Sweep(name, 'experiments/tiny.py', cells, dropped=0)


def line(c: config.Cell, step: int, nmse: float, **changes: Any) -> dict[str, Any]:
  """What an evaluation writes, by the names in metrics.jsonl."""
  spent = flops.spent(c, step, 0)
  values = {
    'tokens': step * c.train.batch_tokens,
    'flops_useful': spent['useful'],
    'flops_dense': spent['dense'],
    'flops_subject': 0.0,
    'wall_s': 0.01 * step,
    'nmse': nmse,
    'nmse_raw': 1.01 * nmse,
    'nmse_ema': nmse,
    'weights': 'ema',
    'mse': nmse / c.sae.d_model,
    'l0': float(c.sae.k or 0),
    'dead_fraction': 0.0,
    'train_loss': nmse,
    'train_nmse': nmse,
    'train_aux_loss': 0.0,
    'train_l0': float(c.sae.k or 0),
  } | changes
  in_line = {name: key for key, name in schema.line_names(schema.CURVES).items()}
  return {'step': step} | {in_line[name]: value for name, value in values.items()}


def result(c: config.Cell, **changes: Any) -> dict[str, Any]:
  """A complete result.json of a cell."""
  last = line(c, c.train.steps, 0.25)
  measured = {name: last[key] for key, name in schema.line_names(schema.MEASURED).items() if key in last}
  return (
    measured
    | {
      'id': c.id,
      'n_latents': c.sae.n_latents,
      'k': c.sae.k,
      'd_model': c.sae.d_model,
      'activation': c.sae.activation,
      'seed': c.train.seed,
      'learning_rate': c.optim.learning_rate,
      'batch_tokens': c.train.batch_tokens,
      'steps': c.train.steps,
      'tokens_asked': c.train.tokens,
      'aux_steps': 0,
      'params_digest': 'd',
      'bit_exact': True,
      'device_kind': 'cpu',
      'n_devices': 1,
      'n_cores': 2,
      'cpu': 'c',
      'mesh': [1, 1],
      'versions': {'jax': '1'},
      'git_commit': 'c',
    }
    | changes
  )


def finish(folder: str, c: config.Cell, **changes: Any) -> str:
  """Commits a cell as its worker would; returns 'done'."""
  metrics.commit_result(folder, result(c, **changes))
  return 'done'


def write(
  ledger: str,
  c: config.Cell,
  curve: Mapping[int, float] | Sequence[Mapping[str, Any]] = (),
  *,
  finished: bool = True,
  **changes: Any,
) -> str:
  """A cell's folder as training leaves it, and its path.

  Args:
    ledger: the folder of the sweep.
    c: the cell.
    curve: NMSE by step, or whole lines of metrics.jsonl. A finished cell's line at the last step says what its result
      says.
    finished: whether it has a result.
    changes: entries of the result that differ from `result`.
  """
  folder = files.join(str(ledger), schema.CELLS, c.id)
  files.replace(files.join(folder, schema.CONFIG), c.to_json())
  lines = [line(c, *pair) for pair in curve.items()] if isinstance(curve, Mapping) else curve
  if finished:
    said = result(c, **changes)
    last = {key: said[name] for key, name in schema.line_names(schema.MEASURED).items() if name in said}
    lines = [
      {**one} | {key: value for key, value in last.items() if key in one and one['step'] == c.train.steps}
      for one in lines
    ]
  data = b''.join(schema.dump_line(dict(one), c.id) for one in lines)
  if data:
    files.replace(files.join(folder, schema.METRICS), data)
  if finished:
    files.replace(files.join(folder, schema.RESULT), schema.dump(result(c, **changes)))
  return folder


def edit(path: str, **changes: Any) -> None:
  """Changes entries of a sealed record, and seals it again: what only another writer could have done."""
  files.replace(path, schema.dump(schema.content(json.loads(files.read(path))) | changes))
