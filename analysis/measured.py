"""What the measures of a ledger's finished cells say, as columns of its table.

A row is of one autoencoder, and a column is of one measurement. So what is of another autoencoder than the row's, or was
measured otherwise than most cells were, is left out, and a warning names it.
"""

from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from analysis.table import warning
from sae_jax import cell_state, files, schema
from sae_jax.measures import results
from sae_jax.measures.results import Key, Result

UNITS = 'units'  # attrs of a table: the units of a measure's columns
SE = '_se'  # ends the name of a column of standard errors
_STREAM = ('subject', 'site', 'text')  # what is measured on other inputs by its nature
_NAMED = 6  # cells named in a warning
_WORDS = {
  'measures_broken': 'cells have measures that cannot be believed, and are shown without them',
  'measures_stale': 'measures of cells are left out',
  'measures_mixed': 'measures of cells are left out, for most cells were measured otherwise',
}


def read(path: str, table: pd.DataFrame) -> tuple[dict[str, dict[str, Result]], list[dict[str, str]]]:
  """The results by measure and cell that belong beside each other, and a warning for each kind of those left out.

  Args:
    path: of the ledger.
    table: its finished cells.
  """
  found: dict[str, dict[str, Result]] = {}
  doubts: dict[str, list[str]] = {}
  rows = {row['id']: row for row in table.to_dict('records')}
  for name, row in rows.items():
    try:
      for measure, result in _sound(files.join(path, schema.CELLS, name), row, doubts).items():
        found.setdefault(measure, {})[name] = result
    except (schema.Broken, OSError) as error:
      doubts.setdefault('measures_broken', []).append(f'{name}: {cell_state.printable(str(error))[:120]}')
  for measure, of in found.items():
    streams = {name: tuple(str(rows[name].get(key)) for key in _STREAM) for name in of}
    ways = {name: _way(result.key) for name, result in of.items()}
    counts = Counter((streams[name], way) for name, way in ways.items())
    usual = {stream: min((-counts[pair], pair[1]) for pair in counts if pair[0] == stream)[1] for stream, _ in counts}
    for name, way in ways.items():
      if way != usual[streams[name]]:
        del of[name]
        doubts.setdefault('measures_mixed', []).append(cell_state.printable(f'{name} {measure}: {way}'))
  warnings = []
  for code, said in doubts.items():
    more = f' and {len(said) - _NAMED} more' if len(said) > _NAMED else ''
    warnings.append(warning(code, f'{len(said)} {_WORDS[code]}: {"; ".join(said[:_NAMED])}{more}'))
  return found, warnings


def joined(path: str, table: pd.DataFrame) -> tuple[pd.DataFrame, list[dict[str, str]]]:
  """The table with columns `<measure>/<value>` and `<measure>/<value>_se` where there are any, and warnings."""
  found, warnings = read(path, table)
  columns: dict[str, dict[str, float]] = {}
  units: dict[str, str] = {}
  for measure in sorted(found):
    for name, result in found[measure].items():
      for value, entry in result.values.items():
        column = f'{measure}/{value}'
        columns.setdefault(column, {})[name] = entry['value']
        columns.setdefault(column + SE, {})[name] = np.nan if entry['se'] is None else entry['se']
        units[column] = entry['units']
  added = {column: table['id'].map(of).astype(float) for column, of in columns.items()}
  out = pd.concat([table, pd.DataFrame(added, index=table.index)], axis=1)
  out.attrs = table.attrs | ({UNITS: units} if units else {})
  return out, warnings


def _sound(cell: str, row: dict[str, Any], doubts: dict[str, list[str]]) -> dict[str, Result]:
  """The results that are of the autoencoder of a row; the others are named in `doubts`."""
  found = results.read(cell, row['id'])
  if not found:
    return {}
  try:
    tensors = schema.parse(files.read(files.join(cell, schema.ARTIFACT, schema.ARTIFACT_INFO))).get('sha256') or {}
  except FileNotFoundError:  # a copy for an analysis: nothing can have taken the autoencoder's place
    tensors = None
  sound = {}
  for measure, result in found.items():
    key = result.key
    why = result.stale(key.tensors if tensors is None else tensors.get(key.weights, ''))
    if key.weights != row['weights']:
      why = f'of the {key.weights} weights, and its NMSE is of the {row["weights"]} ones'
    if why:
      doubts.setdefault('measures_stale', []).append(f'{row["id"]} {measure}: {why}')
    else:
      sound[measure] = result
  return sound


def _way(key: Key) -> str:
  """How a measure was made, in words: what differs in two of them differs here."""
  return f'inputs {key.inputs[:16]}' + ''.join(f', {name}={value!r}' for name, value in sorted(key.settings.items()))
