"""The report's page: one HTML file without outside references. Every text from data is escaped."""

import base64
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.compare import Comparison
from analysis.findings import Findings
from analysis.fitted import Fit, nothing_is_zero, warning_lines

_COLUMNS = {
  'id': 'cell',
  'n_latents': 'n',
  'k': 'k',
  'learning_rate': 'learning rate',
  'seed': 'seed',
  'nmse': 'NMSE',
  'weights': 'weights',
  'l0': 'L0',
  'dead_fraction': 'dead',
  'tokens': 'tokens',
  'flops_useful': 'useful FLOPs',
  'wall_s': 'seconds',
  'subject': 'subject',
  'site': 'site',
  'best_learning_rate': 'best rate',
}
_SAME = ('subject', 'site', 'seed', 'weights')  # shown only where they differ
_CAPTIONS = {
  'joint': 'Loss at the end of training against n for every k, with the joint law. Dashed: extrapolation.',
  'residuals': 'What the joint law leaves over. A trend is a law that does not fit.',
  'power': 'The same points with a separate power law for every k.',
  'frontier': 'Loss against training compute: all runs, the envelope, and its power law. Dashed: extrapolation.',
  'converged': 'Tokens until a doubling of them improves the loss by less than 1 %.',
  'isoflop': 'Loss of every size at equal compute. Hollow: no best size there, and why.',
  'best_size': 'The best size for a budget, through the minima of the profiles.',
  'learning_rates': 'Loss against learning rate for every size, and the best rate. Hollow: no best rate there, and why.',
  'allocation': 'Loss over latents and tokens, and the best split of a budget. Dashed: extrapolation.',
  'family': 'Loss against n, one line a subject; grey: with one exponent for all.',
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
summary { cursor: pointer; color: #555; margin: .4rem 0; } section.law { margin: 1.2rem 0; } section.law h3 { font-size: 1rem; margin: .4rem 0; font-weight: 600; }
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
  found: Findings,
  pictures: Mapping[str, bytes],
  digests: Mapping[str, str] | None = None,
  facts: str = '',
) -> str:
  """The page as a string.

  Args:
    title: of the page.
    found: what it is about.
    pictures: PNGs by the names of `report.figures`.
    facts: a line below the title.
    digests: of the files of figures beside the page, by name: kept in it for `figure_digests`.
  """
  parts = [
    f'<h1>{_text(title)}</h1>',
    f'<p class="note">{_text(" ".join([_states(found.cells) + ".", facts]).strip())}</p>',
    '<h2>Warnings</h2>',
  ]
  items = [line.partition(':') for line in found.warning_lines()]
  listed = ''.join(f'<li><code>{_text(code)}</code>{_text(colon + rest)}</li>' for code, colon, rest in items)
  parts.append(f'<div class="warnings"><ul>{listed}</ul></div>' if items else '<p>None.</p>')
  if found.not_attempted:
    rest = ''.join(f'<li>{_text(text)}</li>' for text in found.not_attempted)
    summary = f'<summary>Not attempted: {len(found.not_attempted)} laws that this sweep was not made for</summary>'
    parts.append(f'<details>{summary}<ul class="note">{rest}</ul></details>')
  parts.append('<h2>Figures</h2>' + (_figures(pictures) or '<p>None: no law could be fitted.</p>'))
  # How FLOPs are counted is a choice; the laws under the other choice stand by, folded.
  dense = [fit for fit in found.fits if 'flops_dense' in fit.x]
  rest = [fit for fit in found.fits if fit not in dense]
  parts.append('<h2>Laws</h2>' + (_laws(rest) or '<p>None: see the warnings.</p>'))
  if dense:
    summary = '<summary>The compute laws in the FLOPs of a dense implementation</summary>'
    parts.append(f'<details>{summary}{_laws(dense)}</details>')
  if found.comparisons:
    parts.append('<h2>Is there an irreducible loss?</h2>' + _comparisons(found.comparisons))
  parts.append('<h2>Finished cells</h2>' + _cells(found.done))
  missing = found.cells[found.cells['state'] != 'done']
  if len(missing):
    rows = [[_text(row[key]) for key in ('id', 'state', 'reason')] for row in missing.to_dict('records')]
    parts.append(f'<h2>Other cells</h2>{_table(["cell", "state", "reason"], rows)}')
  policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
  return (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    '<meta name="viewport" content="width=device-width">'
    f'<meta name="figures" content="{" ".join(f"{name}={value}" for name, value in (digests or {}).items())}">'
    f'<title>{_text(title)}</title><style>{_STYLE}</style></head>\n<body>\n'
    + '\n'.join(parts)
    + f'\n<script>{_SCRIPT}</script>\n</body></html>\n'
  )


def figure_digests(text: str) -> dict[str, str]:
  """The digests that a page was rendered with, by file name; none of a page of another kind."""
  found = re.search(r'<meta name="figures" content="([^"]*)">', text)
  return dict(re.findall(r'(?:^| )([a-z_]+[0-9]*\.(?:png|pdf))=([0-9a-f]{64})(?= |$)', found[1] if found else ''))


def _figures(pictures: Mapping[str, bytes]) -> str:
  """All figures; of those drawn once a k, the largest k open and the others folded."""
  kinds: dict[str, list[str]] = {}
  for name in pictures:
    kinds.setdefault(re.sub(r'_k\d+$', '', name), []).append(name)
  parts = []
  for kind, (*folded, shown) in kinds.items():
    parts.append(_figure(kind, shown, pictures[shown]))
    if folded:
      ks = ', '.join(name.rpartition('_k')[2] for name in folded)
      inside = ''.join(_figure(kind, name, pictures[name]) for name in folded)
      parts.append(f'<details><summary>The same at k = {_text(ks)}</summary>{inside}</details>')
  return ''.join(parts)


def _figure(kind: str, name: str, data: bytes) -> str:
  k = name.removeprefix(kind).removeprefix('_k')
  caption = _text(_CAPTIONS[kind] + (f' k = {k}.' if k else ''))
  source = f'data:image/png;base64,{base64.b64encode(data).decode()}'
  return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _laws(fits: Sequence[Fit]) -> str:
  """One section a law; fits that differ only in k are rows of one table."""
  groups: dict[tuple[Any, ...], list[Fit]] = {}
  for fit in fits:
    groups.setdefault((fit.law.formula, fit.x, fit.y, not fit.where), []).append(fit)
  return ''.join(_law(group) for group in groups.values())


def _law(fits: Sequence[Fit]) -> str:
  fit = fits[0]
  if fit.where:  # a row a fit
    noisy = any(one.diagnostics['seed_noise'] for one in fits)
    heads = [*fit.where, *fit.law.names, 'points', 'rms', *['seed noise'] * noisy, 'held out', 'starts']
    rows = [
      [
        *map(_number, one.where.values()),
        *(_estimate(name, one.params[name]) + _profile(one, name, '<br>profile ') for name in fit.law.names),
        *_checks(one, noisy),
      ]
      for one in fits
    ]
    meaning = '; '.join(f'{p.name}: {p.meaning}' for p in fit.law.parameters)
    meaning += '. rms: of the log residuals; held out: mean error; starts: share that agree. '
    meaning += 'seed noise: standard deviation between seeds, and p of a lack of fit beyond it. ' if noisy else ''
  else:  # a row a constant
    profiled = _has_profile(fit)
    heads = ['constant', 'estimate and 90 % interval', *['profile'] * profiled, 'meaning']
    rows = [
      [
        _text(p.name),
        _estimate(p.name, fit.params[p.name]),
        *[_profile(fit, p.name)] * profiled,
        _text(p.meaning),
      ]
      for p in fit.law.parameters
    ]
    count, rms, seeds, held, agree = _checks(fit, True)
    meaning = f'{count} points; rms log residual {rms}'
    meaning += f', seed noise {seeds}' if seeds else ''
    meaning += f'; held-out error {held or "unknown"}; {agree} of starts agree. '
  intervals = [one.diagnostics['interval'] for one in fits]
  methods = dict.fromkeys(i['method'] for i in intervals)
  drawn = [i['resamples'] for i in intervals]
  count = f'{min(drawn)} to {max(drawn)}' if min(drawn) < max(drawn) else str(drawn[0])
  rules = dict.fromkeys(one.holdout['rule'] for one in fits if one.holdout)
  resamples = f'; {count} resamples by {intervals[0]["by"]}' if max(drawn) else ''
  known = [method for method in methods if method != 'none']
  facts = f'{meaning}In brackets 90 % intervals from {" and ".join(known)}{resamples}. ' if known else meaning
  if any(_has_profile(one) for one in fits):
    facts += (
      'Profile: how far the constant can move at 90 % while the others make up for it, were residuals independent. '
    )
  facts += f'Objective {fit.objective}.' + (f' Held out: {", ".join(rules)}.' if rules else '')
  doubts = ''.join(f'<li>{_text(line)}</li>' for line in warning_lines(fits))
  name = fit.label.partition(', k')[0] if fit.where else fit.label
  over = ', '.join(x for x in fit.x if not x.startswith('is_'))  # those only tell subjects apart
  return (
    f'<section class="law"><h3>{_text(name)}: {_text(fit.y)} over {_text(over)}</h3>'
    f'<p><code>{_text(fit.law.formula)}</code></p>{_table(heads, rows)}'
    f'<p class="note">{_text(facts)}</p>{doubts and f"""<ul class="note">{doubts}</ul>"""}</section>'
  )


def _checks(fit: Fit, seeds: bool) -> list[str]:
  """Points, rms, seed noise where it is asked for, held-out error, agreement of starts."""
  held = f'{fit.holdout["mean_rel_err"]:.2%}' if fit.holdout else ''
  rms = f'{fit.diagnostics["rms_log_residual"]:.4f}'
  return [str(len(fit.table)), rms, *[_seed_noise(fit)] * seeds, held, f'{fit.start_agreement:.0%}']


def _seed_noise(fit: Fit) -> str:
  noise = fit.diagnostics['seed_noise']
  if not noise:
    return ''
  p = noise['lack_of_fit_p']
  return f'{noise["sd_log"]:.4f}' + (f' (p = {p:.2g})' if np.isfinite(p) else '')


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Heads are escaped here, cells by the caller; a column of words stands left."""
  css = [' class="text"' if head in ('meaning', 'irreducible loss', 'state', 'reason') else '' for head in heads]
  head = ''.join(f'<th scope="col"{c}>{_text(h)}</th>' for h, c in zip(heads, css, strict=True))
  body = ''.join(f'<tr>{"".join(f"<td{c}>{cell}</td>" for cell, c in zip(row, css, strict=True))}</tr>' for row in rows)
  return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _comparisons(pairs: Sequence[Comparison]) -> str:
  heads = [
    'law',
    'rms with',
    'without',
    'held-out error with',
    'without',
    'AICc without less with',
    'irreducible loss',
  ]
  rows = []
  for pair in pairs:
    rms = [_number(fit.diagnostics['rms_log_residual']) for fit in (pair.floored, pair.plain)]
    errors = [f'{error:.2%}' if np.isfinite(error) else '' for error in pair.holdout_errors]
    rows.append([_text(pair.floored.label), *rms, *errors, _number(pair.aicc_gain), _text(pair.verdict)])
  note = (
    'The same law with and without an irreducible loss. AICc above zero: the points are described better with it. '
    'The points of L(C) are not independent, so there the held-out error counts.'
  )
  return f'<p class="note">{note}</p>{_table(heads, rows)}'


def _cells(done: pd.DataFrame) -> str:
  if done.empty:
    return '<p>None yet.</p>'
  columns = [c for c in _COLUMNS if c in done and (c not in _SAME or done[c].nunique(dropna=False) > 1)]
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


def _estimate(name: str, param: Mapping[str, float]) -> str:
  ends = ('estimate', 'low', 'high')
  value, low, high = (_number(nothing_is_zero(name, param[key])) for key in ends)
  return f'{value} <span class="note">[{low or "?"}, {high or "?"}]</span>'


def _has_profile(fit: Fit) -> bool:
  """Not of a law of one term: it is linear inside the fit, where the profile only repeats the standard errors."""
  return bool(fit.diagnostics['profile']) and len(fit.law.terms) > 1


def _profile(fit: Fit, name: str, lead: str = '') -> str:
  """The profile interval after `lead`, which is not escaped; empty without one."""
  if not _has_profile(fit):
    return ''
  low, high = (_number(fit.params[name][key]) for key in ('profile_low', 'profile_high'))
  return f'<span class="note">{lead}[{low or "unbounded"}, {high or "unbounded"}]</span>'


def _number(value: Any) -> str:
  """A value for people, escaped; an empty string when it is missing."""
  if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.number):
    return _raw(value)
  if not np.isfinite(value):
    return ''
  if value == round(value) and abs(value) < 1e10:
    return f'{value:,.0f}'
  return f'{value:.4g}'


def _raw(value: Any) -> str:
  """A value for sorting and filtering, escaped."""
  if isinstance(value, bool | np.bool_):
    return 'yes' if value else 'no'
  if isinstance(value, int | float | np.number):
    return f'{value:.6g}' if np.isfinite(value) and abs(value) < 1e6 else f'{value:g}' if np.isfinite(value) else ''
  return _text(value)


def _text(value: Any) -> str:
  return html.escape(str(value), quote=True)
