"""What a report is of: the sweep's name, its subject, site and text, the code that trained it, and the day."""

import datetime

import pandas as pd

from sae_jax import __version__, files, schema

_SHOWN = 3  # values of one kind; of more, the count is said


def heading(ledger: str, done: pd.DataFrame, day: datetime.date) -> tuple[str, str]:
  """The title and the line below it.

  Args:
    ledger: the folder a sweep wrote. Its own name stands in for that of a sweep which cannot be read.
    done: the finished cells.
    day: when the report is written.
  """
  of = _values(done, 'subject') or ('planted dictionary' if _values(done, 'source') == 'planted' else '')
  about = ', '.join(part for part in (of, _values(done, 'site')) if part)
  facts = []
  if text := _values(done, 'text'):
    facts.append(f'Text: {text}.')
  if commits := _values(done, 'git_commit'):
    facts.append(f'Trained by the code of {commits}.')
  facts.append(f'Report of {day.isoformat()} by sae_jax {__version__}.')
  return _name(ledger) + (f': {about}' if about else ''), ' '.join(facts)


def _name(ledger: str) -> str:
  try:
    record = schema.parse_large(files.read(files.join(ledger, schema.SWEEP)))
    schema.check(record, schema.SWEEPS)
    return record['name']
  except (OSError, ValueError):  # what is wrong with it, status says
    return files.join(ledger).rstrip('/').rsplit('/', 1)[-1]


def _values(done: pd.DataFrame, column: str) -> str:
  """The values of a column in one line, the most frequent first."""
  if column not in done:
    return ''
  found = [str(value) for value in done[column].dropna().value_counts().index if str(value)]
  more = f' and {len(found) - _SHOWN} more' if len(found) > _SHOWN else ''
  return ', '.join(found[:_SHOWN]) + more
