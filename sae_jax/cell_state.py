"""What the files of one cell's folder say of it: its state, the reason, its result. The same for every reader."""

import dataclasses
from collections.abc import Callable
from typing import Any

from sae_jax import cell, files, lease, metrics, product, schema

MAX_FAILURES = 3  # attempts of a cell before it has failed for good
_REASON = 200  # characters of a reason shown to people

# What a result repeats of the configuration it belongs to.
_REPEATED = {
  ('sae', 'n_latents'): 'n_latents',
  ('sae', 'k'): 'k',
  ('sae', 'd_model'): 'd_model',
  ('optim', 'learning_rate'): 'learning_rate',
  ('train', 'seed'): 'seed',
  ('train', 'batch_tokens'): 'batch_tokens',
  ('train', 'tokens'): 'tokens_asked',
}
# What a result repeats of the evaluation at the last step; not the time, which another attempt spends again.
_MEASURED = {line: name for line, name in schema.line_names(schema.MEASURED).items() if name != 'wall_s'}


@dataclasses.dataclass(frozen=True)
class CellState:
  """A cell as its files have it.

  Attributes:
    state: one of `schema.STATES`.
    reason: one line: the last error, who holds the lease, which file cannot be believed; empty where all is well.
    attempts: that failed.
    result: result.json of a cell that is done.
    verified: whether the result was covered by a digest; those of earlier versions were not.
    config: config.json as a dict, where it could be read.
    broken: name in the folder of what makes the cell invalid.
  """

  state: str
  reason: str = ''
  attempts: int = 0
  result: dict[str, Any] | None = None
  verified: bool = True
  config: dict[str, Any] | None = None
  broken: str = ''


Holder = Callable[[], dict[str, Any] | None]


def read(
  folder: str,
  cell_id: str,
  *,
  max_failures: int = MAX_FAILURES,
  holder: Holder | None = None,
  known: dict[str, Any] | None = None,
  registered: dict[str, Any] | None = None,
  copied: bool = False,
) -> CellState:
  """The state of the cell in `folder`.

  Args:
    folder: of the cell; it need not exist.
    cell_id: what the folder is for. A file that belongs to another cell makes it invalid.
    max_failures: attempts after which a cell has failed for good.
    holder: who holds its lease, for an observer that has looked before; by default whoever claimed it last and is not
      known to be dead.
    known: config.json, from a former look that found it sound: it is written once, and so not read again.
    registered: what config.json should be, already checked; an equal one needs no check of its own.
    copied: whether the folder may be a copy without `sae/`, as one makes for an analysis.
  """
  names = set(files.listdir(folder))
  if not names and files.is_file(folder):
    return _invalid('', 'the cell is a file and not a folder')
  config, wrong = known, ''
  if config is None and schema.CONFIG in names:
    try:
      config = schema.parse(files.read(files.join(folder, schema.CONFIG)))
      wrong = '' if config == registered else _wrong_config(config, cell_id)
    except (schema.Broken, OSError) as error:
      wrong = _why(error)
    if wrong:
      return _invalid(schema.CONFIG, wrong)
  if schema.RESULT in names:
    try:
      result = _result(folder, cell_id, config)
    except (schema.Broken, OSError) as error:
      return _invalid(schema.RESULT, _why(error), config)
    if schema.ARTIFACT in names or not copied:
      try:
        product.glance(folder, result)
      except (schema.Broken, OSError) as error:
        return product_is_broken(error, config)
    return CellState(schema.DONE, result=schema.content(result), verified=schema.verified(result), config=config)
  if _is_imported(folder, names):
    return CellState(schema.IMPORTED, config=config)
  return dataclasses.replace(_unfinished(folder, names, max_failures, holder), config=config)


def printable(text: str) -> str:
  """One line of at most 200 characters without control characters: what comes from files is shown in a terminal."""
  line = ''.join(c if c.isprintable() else '?' for c in ' '.join(text.split()))
  return line if len(line) <= _REASON else line[: _REASON - 3] + '...'


def product_is_broken(error: Exception, config: dict[str, Any] | None = None) -> CellState:
  """The state of a finished cell whose autoencoder cannot be believed, by what `sae_jax.product` raised."""
  return CellState(schema.INVALID, printable(product.why(error)), config=config, broken=schema.ARTIFACT)


def _invalid(name: str, why: str, config: dict[str, Any] | None = None) -> CellState:
  said = printable(f'{name}: {why}' if name else why)
  return CellState(schema.INVALID, said, config=config, broken=name)


def _why(error: Exception) -> str:
  return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _wrong_config(config: dict[str, Any], cell_id: str) -> str:
  """Why a config.json cannot be believed; empty when it can."""
  schema.check_digest(config)
  if config.get('id') != cell_id:
    return f'it is of cell {config.get("id")!r}'
  try:
    own = cell.id_of(config)
  except (TypeError, ValueError) as error:
    return str(error)
  return '' if own == cell_id else f'it was changed: it hashes to {own}'


def _result(folder: str, cell_id: str, config: dict[str, Any] | None) -> dict[str, Any]:
  """result.json of a cell. Raises `schema.Broken` when it cannot be believed."""
  result = schema.parse(files.read(files.join(folder, schema.RESULT)))
  schema.check(result, schema.RESULTS)
  if result.get('id') != cell_id:
    raise schema.Broken(f'it is of cell {result.get("id")!r}')
  for (section, key), name in _REPEATED.items():
    said = (config or {}).get(section)
    if isinstance(said, dict) and key in said and name in result and said[key] != result[name]:
      raise schema.Broken(f'{name}={result[name]!r}, and {said[key]!r} in {schema.CONFIG}')
  # A digest says all there is to say. Results of earlier versions have none, and their metrics are the only witness.
  if not schema.verified(result):
    _compare_with_metrics(folder, cell_id, result)
  return result


def _compare_with_metrics(folder: str, cell_id: str, result: dict[str, Any]) -> None:
  """Raises `schema.Broken` when metrics have the last step and none of its lines says what the result says.

  One that agrees is enough: whoever lost the cell in its last step may have added its own line.
  """
  differences = ''
  for line in metrics.newest_lines(folder, cell_id):
    if line['step'] != result['steps']:
      continue
    differs = [
      f'{name}={result[name]!r}, and {line[key]!r} in the last line of {schema.METRICS}'
      for key, name in _MEASURED.items()
      if name in result and key in line and line[key] != result[name]
    ]
    if not differs:
      return
    differences = differences or differs[0]
  if differences:
    raise schema.Broken(differences)


def _is_imported(folder: str, names: set[str]) -> bool:
  if schema.ARTIFACT not in names:
    return False
  try:
    info = schema.parse(files.read(files.join(folder, schema.ARTIFACT, schema.ARTIFACT_INFO)))
  except (schema.Broken, OSError):
    return False
  return schema.is_imported(info)


def _unfinished(folder: str, names: set[str], max_failures: int, holder: Holder | None) -> CellState:
  failure: dict[str, Any] | None = None
  if schema.FAILURE in names:
    try:
      failure = schema.parse(files.read(files.join(folder, schema.FAILURE)))
      schema.check(failure, schema.FAILURES)
    except FileNotFoundError:  # cleared since the folder was listed
      failure = None
    except (schema.Broken, OSError) as error:
      return _invalid(schema.FAILURE, _why(error))
  for name in (schema.CHECKPOINTS, schema.CLAIMS, schema.ARTIFACT):
    if name in names and files.is_file(files.join(folder, name)):
      return _invalid(name, 'it is a file and not a folder')
  if schema.METRICS in names and files.is_folder(files.join(folder, schema.METRICS)):
    return _invalid(schema.METRICS, 'it is a folder and not a file')
  attempts = failure['attempts'] if failure else 0
  try:
    found = (holder or (lambda: lease.last_holder(folder)))() if schema.CLAIMS in names else None
  except (IsADirectoryError, PermissionError) as error:
    return _invalid(schema.CLAIMS, f'a claim cannot be read ({_why(error)})')
  cancelled = schema.CANCEL in names
  if found is not None:
    leaving = ', asked by sweeps.cancel to save and stop' if cancelled else ''
    where = f'process {found["pid"]} on {found["host"]}{leaving}'
    return CellState(schema.RUNNING, printable(where), attempts)
  if cancelled:
    return CellState(schema.CANCELLED, 'sweeps.cancel --undo takes it up again', attempts)
  if failure is None:
    return CellState(schema.WAITING)
  said = printable(f'{failure.get("kind", "")}: {failure.get("error", "")}')
  if failure.get('permanent') or attempts >= max_failures:
    return CellState(schema.FAILED, printable(f'{said[:170]} ({attempts} attempts)'), attempts)
  return CellState(schema.WAITING, printable(f'attempt {attempts} of {max_failures} failed: {said}'), attempts)
