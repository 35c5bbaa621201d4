"""The report's page: one HTML file without outside references.

Here findings become plain data; `templates/` has the words and the markup, and escapes every text that it is given.
"""

import base64
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis import family_tables, sparsity
from analysis.compare import Comparison
from analysis.figures import style
from analysis.findings import Findings, OneFamily
from analysis.fit_result import Fit, nothing_is_zero, warning_lines
from analysis.laws import SYMBOLS
from analysis.measure_laws import MEASURE, OneMeasure
from sae_jax import templates

TEMPLATES = templates.environment(pathlib.Path(__file__).parent / 'templates')

_COLUMNS = {
  'id': 'cell',
  'n_latents': 'n',
  'activation': 'family',
  'k': 'k',
  'sparsity': 'sparsity',
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
_SAME = ('activation', 'sparsity', 'subject', 'site', 'seed', 'weights')  # shown only where they differ
_FLAG, _NUMBER = (bool, np.bool_), (int, float, np.number)
_FORMATS = {'flops_useful': '.2e'}  # spans many powers of ten, which line up so
_CAPTIONS = {
  'joint': 'Loss at the end of training against {x} for every {other}, with the joint law. Dashed: extrapolation.',
  'residuals': 'What the joint law leaves over. A trend is a law that does not fit.',
  'power': 'The same points with a separate power law for every {target}.',
  'frontier': 'Loss against training compute: all runs, the envelope, and its power law. Dashed: extrapolation.',
  'converged': 'Tokens until a doubling of them improves the loss by less than 1 %.',
  'isoflop': 'Loss of every size at equal compute. Hollow: no best size there, and why.',
  'best_size': 'The best size for a budget, through the minima of the profiles.',
  'learning_rates': 'Loss against learning rate for every size, and the best rate. '
  'Hollow: no best rate there, and why.',
  'allocation': 'Loss over latents and tokens, and the best split of a budget. Dashed: extrapolation.',
  'family': 'Loss against n, one line a subject; grey: with one exponent for all.',
  'frontiers': 'Loss against measured L0 at every size, a line a family.',
  'scaling': 'Families at equal L0: loss against n, and what it is over that of one of them.',
}
_TOGETHER = ('frontiers', 'scaling')  # of all families


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
  states = found.cells['state'].value_counts()
  others = found.cells[found.cells['state'] != 'done']
  return TEMPLATES.get_template('report.html').render(
    title=title,
    facts=facts,
    digests=' '.join(f'{name}={digest}' for name, digest in (digests or {}).items()),
    total=len(found.cells),
    states=[f'{count} {state}' for state, count in states.items()],
    warnings=[line.partition(':') for line in found.warning_lines()],
    not_attempted=found.not_attempted,
    together=[{'source': _source(pictures[key]), 'caption': _CAPTIONS[key]} for key in _TOGETHER if key in pictures],
    tables=family_tables.tables(found.compared, [one.joint for one in found.families if one.joint])
    if found.compared
    else [],
    families=[_family(one, pictures, several=len(found.families) > 1) for one in found.families],
    measures=[_measure(one, pictures) for one in found.measures],
    cells=_cells(found.done),
    others=[[str(row[key]) for key in ('id', 'state', 'reason')] for row in others.to_dict('records')],
  )


def figure_digests(text: str) -> dict[str, str]:
  """The digests that a page was rendered with, by file name; none of a page of another kind."""
  found = re.search(r'<meta name="figures" content="([^"]*)">', text)
  name = r'(?:\w+/)?[\w.-]+\.(?:png|pdf)'
  return dict(re.findall(rf'(?:^| )({name})=([0-9a-f]{{64}})(?= |$)', found[1] if found else '', re.ASCII))


def _family(one: OneFamily, pictures: Mapping[str, bytes], *, several: bool) -> dict[str, Any]:
  """The figures and laws of one family; the headings of an only one do without its name."""
  own = {
    name.rpartition('/')[2]: data
    for name, data in pictures.items()
    if (name.startswith(f'{one.folder}/') if several else not name.startswith(MEASURE))
  }
  return {
    'of': f' of {one.name}' if several else '',
    'figures': _figures(own, one),
    # How FLOPs are counted is a choice; the laws under the other choice stand by, folded.
    'laws': _laws([fit for fit in one.fits if 'flops_dense' not in fit.x]),
    'dense_laws': _laws([fit for fit in one.fits if 'flops_dense' in fit.x]),
    'comparisons': [_comparison(pair) for pair in one.comparisons],
  }


def _measure(one: OneMeasure, pictures: Mapping[str, bytes]) -> dict[str, Any]:
  """The section of a measure."""
  drawn = [value for value in one.values if value.picture in pictures]
  return {
    'name': one.name,
    'said': [value.sentence for value in one.values],
    'figures': [
      {'source': _source(pictures[value.picture]), 'caption': f'{value.column} against n, active latents and NMSE.'}
      for value in drawn
    ],
    'tables': one.tables(),
    'laws': _laws(one.fits),
  }


def _source(picture: bytes) -> str:
  return f'data:image/png;base64,{base64.b64encode(picture).decode()}'


def _figures(pictures: Mapping[str, bytes], family: OneFamily) -> list[list[dict[str, str]]]:
  """Kind by kind; of those drawn once a target, one a target."""
  targets = {one.name: sparsity.gathered([sparsity.target(one.where)]) for one in family.targets}
  asked = dict.fromkeys('k' if key == 'k' else 'coefficient' for target in targets.values() for key in target)
  x, other = style.sides(family.joint) if family.joint else ('', '')
  words = {'x': SYMBOLS.get(x), 'other': SYMBOLS.get(other or ''), 'target': ' and '.join(asked)}
  kinds: dict[tuple[str, str], list[dict[str, str]]] = {}
  for name, data in pictures.items():
    end = next((end for end in targets if name.endswith(f'_{end}')), '')
    kind = name.removesuffix(f'_{end}')
    ((key, value),) = targets[end].items() if end else [('', '')]
    caption = _CAPTIONS[kind].format(**words) + (f' {key} = {value}.' if end else '')
    kinds.setdefault((kind, key), []).append({'key': key, 'value': value, 'caption': caption, 'source': _source(data)})
  return list(kinds.values())


def _laws(fits: Sequence[Fit]) -> list[dict[str, Any]]:
  """Law by law; fits that differ only in their target belong to one."""
  groups: dict[tuple[Any, ...], list[Fit]] = {}
  for fit in fits:
    groups.setdefault((fit.law.formula, fit.x, fit.y, *sparsity.target(fit.where)), []).append(fit)
  return [_law(group) for group in groups.values()]


def _law(fits: Sequence[Fit]) -> dict[str, Any]:
  fit, intervals = fits[0], [one.diagnostics['interval'] for one in fits]
  drawn = [interval['resamples'] for interval in intervals]
  return {
    'name': fit.quantity,
    'y': fit.y,
    'x': [x for x in fit.variables if not x.startswith('is_')],  # those only tell subjects apart
    'formula': fit.words(fit.law.formula),
    'where': list(sparsity.target(fit.where)),
    'fits': [_fit(one) for one in fits],
    'methods': [method for method in dict.fromkeys(i['method'] for i in intervals) if method != 'none'],
    'resamples': [min(drawn), max(drawn)],
    'by': intervals[0]['by'],
    'objective': fit.objective,
    'rules': list(dict.fromkeys(one.holdout['rule'] for one in fits if one.holdout)),
    'doubts': warning_lines(fits),
  }


def _fit(fit: Fit) -> dict[str, Any]:
  # Not of a law of one term: it is linear inside the fit, where the profile only repeats the standard errors.
  profiled = bool(fit.diagnostics['profile']) and len(fit.law.terms) > 1
  return {
    'where': [_shown(value) for value in sparsity.target(fit.where).values()],
    'constants': [
      {
        'name': p.name,
        'meaning': fit.words(p.meaning),
        'estimate': _shown(nothing_is_zero(p.name, fit.params[p.name]['estimate'])),
        'interval': [_shown(nothing_is_zero(p.name, fit.params[p.name][key])) for key in ('low', 'high')],
        'profile': [_shown(fit.params[p.name][key]) for key in ('profile_low', 'profile_high')] if profiled else [],
      }
      for p in fit.law.parameters
    ],
    'profiled': profiled,
    'points': len(fit.table),
    'rms': f'{fit.diagnostics["rms_log_residual"]:.4f}',
    'seed_noise': _seed_noise(fit),
    'held_out': f'{fit.holdout["mean_rel_err"]:.2%}' if fit.holdout else '',
    'starts': f'{fit.start_agreement:.0%}',
  }


def _seed_noise(fit: Fit) -> str:
  noise = fit.diagnostics['seed_noise']
  if not noise:
    return ''
  p = noise['lack_of_fit_p']
  return f'{noise["sd_log"]:.4f}' + (f' (p = {p:.2g})' if math.isfinite(p) else '')


def _comparison(pair: Comparison) -> dict[str, Any]:
  return {
    'law': pair.floored.label,
    'rms': [_shown(fit.diagnostics['rms_log_residual']) for fit in (pair.floored, pair.plain)],
    'errors': [f'{error:.2%}' if math.isfinite(error) else '' for error in pair.holdout_errors],
    'aicc_gain': _shown(pair.aicc_gain),
    'verdict': pair.verdict,
  }


def _cells(done: pd.DataFrame) -> dict[str, Any]:
  """The heads of the table of cells and, of every cell, each value twice: to sort and filter by, and to show."""
  asked = [name for name in sparsity.TARGETS if name in done and done[name].notna().any()]
  differ = [name for name in _SAME if name in done and done[name].nunique(dropna=False) > 1]
  left_out = {*_SAME, *sparsity.TARGETS} - {*asked, *differ}
  names = [name for name in _COLUMNS if name in done and name not in left_out]
  columns = [[(_exact(value), _shown(value, _FORMATS.get(name, ''))) for value in done[name]] for name in names]
  example = 'k=8 n=1024' if 'k' in names else 'sparsity=0.05 n=1024'
  return {'heads': [_COLUMNS[name] for name in names], 'rows': list(zip(*columns, strict=True)), 'example': example}


def _shown(value: Any, form: str = '') -> str:
  """A value for people, a number in the format `form` if there is one; an empty string when it is missing."""
  if isinstance(value, _FLAG) or not isinstance(value, _NUMBER):
    return _exact(value)
  if not math.isfinite(value):
    return ''
  if form:
    return format(value, form)
  return f'{value:,.0f}' if value == round(value) and abs(value) < 1e10 else f'{value:.4g}'


def _exact(value: Any) -> str:
  """A value for sorting and filtering; an empty string when it is missing."""
  if isinstance(value, _FLAG):
    return 'yes' if value else 'no'
  if not isinstance(value, _NUMBER):
    return '' if value is None else str(value)
  if not math.isfinite(value):
    return ''
  return f'{value:.0f}' if value == round(value) and abs(value) < 1e15 else f'{value:g}'
