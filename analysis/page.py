"""The report's page: one HTML file without outside references. Every text from data is escaped."""

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.compare import Comparison
from analysis.fit import Fit

_COLUMNS = {
  'id': 'cell', 'n_latents': 'n', 'k': 'k', 'learning_rate': 'learning rate', 'seed': 'seed', 'nmse': 'NMSE',
  'weights': 'weights', 'l0': 'L0', 'dead_fraction': 'dead', 'tokens': 'tokens', 'flops_useful': 'useful FLOPs',
  'wall_s': 'seconds', 'best_learning_rate': 'fitted',
}  # fmt: skip
_CAPTIONS = {
  'joint': 'Loss at the end of training against n for every k, with the joint law. Dashed: extrapolation.',
  'residuals': 'What the joint law leaves over. A trend is a law that does not fit.',
  'power': 'The same points with a separate power law for every k.',
  'frontier': 'Loss against training compute: all runs, the envelope, and its power law. Dashed: extrapolation.',
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.warnings { border-left: 4px solid #b35900; padding: .3rem 1rem; background: #fff7ee; }
.warnings li { margin: .3rem 0; overflow-wrap: anywhere; } code { font-size: .92em; }
figure { margin: 1.2rem 0; } img { max-width: 100%; } figcaption, .note { color: #555; font-size: .9rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child, .text { text-align: left !important; } td.text { white-space: normal; overflow-wrap: anywhere; }
th button { font: inherit; font-weight: 600; border: 0; background: none; cursor: pointer; padding: 0; }
th[aria-sort=ascending] button::after { content: " \\25B2"; } th[aria-sort=descending] button::after { content: " \\25BC"; }
input { font: inherit; padding: .25rem .5rem; width: 20rem; max-width: 100%; margin-bottom: .5rem; }
section.law { margin: 1.2rem 0; } section.law h3 { font-size: 1rem; margin: .4rem 0; font-weight: 600; }
"""

# Sorts by the number or text in data-v, missing values last. Filters by words that must all occur in a row, and
# exactly when they name a column: k=1 is not k=16.
_SCRIPT = """
const table = document.getElementById('cells'), rows = table ? Array.from(table.tBodies[0].rows) : [];
const value = (row, i) => { const v = row.cells[i].dataset.v; return v === '' || isNaN(v) ? v : Number(v); };
const order = (a, b) => a === '' ? 1 : b === '' ? -1 : typeof a === 'number' && typeof b === 'number' ? a - b
  : String(a).localeCompare(String(b));
if (table) {
  Array.from(table.tHead.rows[0].cells).forEach((head, i) => head.querySelector('button').addEventListener('click', () => {
    const sign = head.getAttribute('aria-sort') === 'ascending' ? -1 : 1;
    for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', sign > 0 ? 'ascending' : 'descending');
    rows.sort((p, q) => { const a = value(p, i), b = value(q, i); return (a === '' || b === '' ? 1 : sign) * order(a, b); });
    table.tBodies[0].append(...rows);
  }));
  const box = document.getElementById('filter'), count = document.getElementById('count');
  const apply = () => {
    const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = ' ' + row.dataset.text + ' ';
      row.hidden = !words.every(word => text.includes(word.includes('=') ? ' ' + word + ' ' : word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = shown + ' of ' + rows.length + ' cells';
  };
  box.addEventListener('input', apply);
  apply();
}
"""


def render(
  title: str,
  cells: pd.DataFrame,
  done: pd.DataFrame,
  fits: Sequence[Fit],
  comparisons: Sequence[Comparison],
  warnings: Sequence[str],
  pictures: Mapping[str, bytes],
) -> str:
  """The page as a string. `warnings` are lines 'code: message', `pictures` PNGs by figure name."""
  parts = [f'<h1>{_text(title)}</h1>', f'<p class="note">{_text(_states(cells))}</p>']
  items = ''.join(
    f'<li><code>{_text(code)}</code>{_text(colon + rest)}</li>'
    for code, colon, rest in (s.partition(':') for s in warnings)
  )
  parts.append('<h2>Warnings</h2>')
  parts.append(f'<div class="warnings"><ul>{items}</ul></div>' if items else '<p>None.</p>')
  parts.append('<h2>Figures</h2>' if pictures else '<h2>Figures</h2><p>None: no law could be fitted.</p>')
  for name, data in pictures.items():
    source = f'data:image/png;base64,{base64.b64encode(data).decode()}'
    caption = _text(_CAPTIONS[name])
    parts.append(f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>')
  # How FLOPs are counted is a choice; the laws under the other choice stand by, folded.
  dense = [fit for fit in fits if 'flops_dense' in fit.x]
  parts.append(
    '<h2>Laws</h2>' + (''.join(_law(f) for f in fits if f not in dense) or '<p>None: see the warnings.</p>')
  )
  if dense:
    summary = '<summary>The compute laws in the FLOPs of a dense implementation</summary>'
    parts.append(f'<details>{summary}{"".join(map(_law, dense))}</details>')
  if comparisons:
    parts.append('<h2>Is there an irreducible loss?</h2>' + _comparisons(comparisons))
  parts.append('<h2>Finished cells</h2>' + _cells(done))
  missing = cells[cells['state'] != 'done']
  if len(missing):
    body = ''.join(
      f'<tr><td>{_text(r["id"])}</td><td class="text">{_text(r["state"])}</td><td class="text">{_text(r["reason"])}</td></tr>'
      for r in missing.to_dict('records')
    )
    head = '<thead><tr><th>cell</th><th class="text">state</th><th class="text">reason</th></tr></thead>'
    parts.append(f'<h2>Other cells</h2><div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>')
  policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    '<meta name="viewport" content="width=device-width">'
    f'<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n'
    + '\n'.join(parts)
    + f'\n<script>{_SCRIPT}</script>\n</body></html>\n'
  )


def _law(fit: Fit) -> str:
  rows = ''.join(
    f'<tr><td>{_text(p.name)}</td><td>{_number(fit.params[p.name]["estimate"])}</td>'
    f'<td>{_number(fit.params[p.name]["low"])}</td><td>{_number(fit.params[p.name]["high"])}</td>'
    f'<td class="text">{_text(p.meaning)}</td></tr>'
    for p in fit.law.parameters
  )
  interval = fit.diagnostics['interval']
  resampled = f'{interval["resamples"]} resamples by {interval["by"]}'
  by = interval['method'].replace('bootstrap', resampled)
  facts = (
    f'{len(fit.table)} points; rms log residual {fit.diagnostics["rms_log_residual"]:.4f}; objective {fit.objective}; '
    f'{fit.start_agreement:.0%} of starts agree; intervals from {by}.'
  )
  if fit.holdout:
    facts += f' Held out: {fit.holdout_text()}.'
  doubts = ''.join(f'<li>{_text(w["code"])}: {_text(w["message"])}</li>' for w in fit.warnings)
  return (
    f'<section class="law"><h3>{_text(fit.label)}: {_text(fit.y)} over {_text(", ".join(fit.x))}</h3><p><code>{_text(fit.law.formula)}</code></p>'
    '<div class="scroll"><table><thead><tr><th>constant</th><th>estimate</th><th>90 % from</th><th>to</th>'
    f'<th class="text">meaning</th></tr></thead><tbody>{rows}</tbody></table></div><p class="note">{_text(facts)}</p>'
    f'{doubts and f"""<ul class="note">{doubts}</ul>"""}</section>'
  )


def _comparisons(pairs: Sequence[Comparison]) -> str:
  head = (
    'law',
    'rms with',
    'without',
    'held-out error with',
    'without',
    'AICc without less with',
    'irreducible loss',
  )
  rows = []
  for pair in pairs:
    rms = [_number(fit.diagnostics['rms_log_residual']) for fit in (pair.floored, pair.plain)]
    errors = [f'{error:.2%}' if np.isfinite(error) else '' for error in pair.holdout_errors]
    cells = ''.join(f'<td>{cell}</td>' for cell in (*rms, *errors, _number(pair.aicc_gain)))
    rows.append(
      f'<tr><td>{_text(pair.floored.label)}</td>{cells}<td class="text">{_text(pair.verdict)}</td></tr>'
    )
  heads = ''.join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
  note = (
    'The same law with and without an irreducible loss. AICc above zero: the points are described better with it. '
    'The points of L(C) are not independent, so there the held-out error counts.'
  )
  return (
    f'<p class="note">{note}</p><div class="scroll"><table><thead><tr>{heads}</tr></thead>'
    f'<tbody>{"".join(rows)}</tbody></table></div>'
  )


def _cells(done: pd.DataFrame) -> str:
  if done.empty:
    return '<p>None yet.</p>'
  columns = [c for c in _COLUMNS if c in done]
  head = ''.join(f'<th scope="col"><button type="button">{_text(_COLUMNS[c])}</button></th>' for c in columns)
  rows = []
  for record in done[columns].to_dict('records'):
    data = ''.join(f'<td data-v="{_raw(record[c])}">{_number(record[c])}</td>' for c in columns)
    words = ' '.join(f'{_COLUMNS[c]}={_raw(record[c])}' for c in columns).lower()
    rows.append(f'<tr data-text="{words}">{data}</tr>')
  return (
    '<input id="filter" type="search" placeholder="filter, e.g. k=8 n=1024" aria-label="filter cells"> '
    '<span class="note" id="count"></span>'
    f'<div class="scroll"><table id="cells"><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
  )


def _states(cells: pd.DataFrame) -> str:
  counts = cells['state'].value_counts()
  return (
    f'{len(cells)} cells: ' + ', '.join(f'{count} {state}' for state, count in counts.items())
    if len(cells)
    else 'no cells'
  )


def _number(value: Any) -> str:
  """A value for people, escaped; an empty string when it is missing."""
  if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
    return _raw(value)
  if not np.isfinite(value):
    return ''
  if value == round(value) and abs(value) < 1e10:
    return f'{value:,.0f}'
  return f'{value:.4g}' if abs(value) > 1e-6 else '0'


def _raw(value: Any) -> str:
  """A value for sorting and filtering, escaped."""
  if isinstance(value, bool | np.bool_):
    return 'yes' if value else 'no'
  if isinstance(value, int | float | np.number):
    return (
      f'{value:.6g}'
      if np.isfinite(value) and abs(value) < 1e6
      else f'{value:g}'
      if np.isfinite(value)
      else ''
    )
  return _text(value)


def _text(value: Any) -> str:
  return html.escape(str(value), quote=True)
