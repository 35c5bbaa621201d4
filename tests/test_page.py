"""The report's page: it stands alone, escapes what comes from data, and its table sorts and filters in a browser."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import jinja2
import numpy as np
import pandas as pd
import pytest

from analysis import fit, page
from analysis.findings import Findings, OneFamily, OneTarget
from tests import full_ledger

# Markup, quotes of both kinds, an entity, control characters, and what a template would run.
HOSTILE = '"><img src=x onerror=alert(1)><script>alert("x")</script>\'</style>&lt;\0\x1b\u2028{{ 7 * 7 }}{% raw %}'
HARMLESS = 'Lorem'
N = [1024, 1024, 64, 1024, 128, 2**20]
NMSE = [0.3, np.nan, 0.25, 9e-7, 0.1, 0.2]


def one_family(**change):
  """A family without laws."""
  empty = {'joint': None, 'targets': [], 'cost': 0.0, 'comparisons': [], 'warnings': [], 'not_attempted': []}
  return OneFamily('topk', **(empty | change))


def at_three(**laws):
  return one_family(targets=[OneTarget('k3', {'k': 3}, **laws)])


def findings(**change):
  """Findings without laws; six finished cells, one of them without a loss, and one that failed."""
  done = pd.DataFrame(
    {
      'id': [f'cell{i}' for i in range(6)],
      'n_latents': N,
      'k': [1, 16, 1, 16, 1, 1],
      'learning_rate': 1e-3,
      'nmse': NMSE,
      'weights': ['ema', 'raw'] * 3,
      'subject': ['b', '9e999', '10', 'a', '9', '10'],
      'best_learning_rate': [True, False] * 3,
    }
  )
  failed = pd.DataFrame({'id': ['bad'], 'state': ['failed'], 'reason': [HOSTILE]})
  cells = pd.concat([done.assign(state='done', reason=''), failed], ignore_index=True)
  plain = {'cells': cells, 'done': done, 'curves': pd.DataFrame(), 'families': [one_family()], 'about': []}
  return Findings(**(plain | change))


class Read(HTMLParser):
  """What a reader of HTML takes a page for: its elements with the names of their attributes, and its texts."""

  def __init__(self, page_text: str):
    super().__init__()
    self.elements: list[tuple[str, ...]] = []
    self.texts: list[str] = []
    self.feed(page_text)
    self.close()

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, *(name for name, _ in attrs)))
    self.texts += [value for _, value in attrs if value]

  def handle_data(self, data):
    self.texts.append(data)


def replaced(value, text):
  """What a template is given, which is plain data, with every text in it replaced; no text is empty, no count zero."""
  if isinstance(value, dict):
    return {key: replaced(inside, text) for key, inside in value.items()}
  if isinstance(value, list | tuple):
    return [replaced(inside, text) for inside in value]
  assert type(value) in (str, int, bool)
  return text if isinstance(value, str) else value if isinstance(value, bool) else value or 1


def test_page_escapes_every_text_that_a_template_is_given(monkeypatch):
  found = full_ledger.findings()
  (full,) = found.families
  families = [dataclasses.replace(full, name=name, not_attempted=['a']) for name in ('one', 'two')]
  some = dataclasses.replace(found, cells=findings().cells, families=families)
  seen = {}
  genuine = jinja2.Template.render
  for text in (HARMLESS, HOSTILE):
    with monkeypatch.context() as patched:
      patched.setattr(jinja2.Template, 'render', lambda self, text=text, **data: genuine(self, **replaced(data, text)))
      seen[text] = Read(
        page.render('t', some, {'one/joint': b'1', 'two/isoflop_k3': b'2', 'two/isoflop_k7': b'3'}, {'joint.png': 'a'})
      )
  harmless, hostile = seen[HARMLESS], seen[HOSTILE]
  assert hostile.elements == harmless.elements
  assert hostile.texts == [text.replace(HARMLESS, HOSTILE) for text in harmless.texts]  # and none is lost
  assert sum(HOSTILE in text for text in hostile.texts) > 1000


def test_page_escapes_everything_that_comes_from_data():
  def rendered(text):
    done = findings().done.assign(id=text, site=[text, 'b'] * 3, weights=text)
    warnings = [{'code': text, 'message': text}]
    failed = findings().cells.assign(id=text, state=['done'] * 6 + [text], reason=text)
    found = findings(cells=failed, done=done, about=warnings, families=[one_family(not_attempted=[text])])
    return page.render(text, found, {}, {text: text}, text)

  html = rendered(HOSTILE)
  assert '<img' not in html and html.count('<script>') == 1  # our own
  assert html.count('&lt;script&gt;alert(&#34;x&#34;)') >= 10
  assert 'data-v="&#34;&gt;' in html  # an attribute cannot be left either
  assert Read(html).elements == Read(rendered(HARMLESS)).elements
  assert page.figure_digests(html) == {}


def test_page_escapes_subjects_in_laws():
  (family,) = full_ledger.findings().families
  one = next(one for one in family.targets if one.subjects)
  law = one.subjects.separate.law
  terms = tuple(tuple(dataclasses.replace(p, meaning=HOSTILE) for p in term) for term in law.terms)
  separate = dataclasses.replace(one.subjects.separate, law=dataclasses.replace(law, terms=terms))
  hostile = dataclasses.replace(one, subjects=dataclasses.replace(one.subjects, separate=separate))
  text = page.render('t', findings(families=[one_family(targets=[hostile])]), {})
  assert '<img' not in text and '&lt;img' in text


def test_page_needs_nothing_from_outside_and_puts_warnings_first():
  found = full_ledger.findings()
  text = page.render('full', found, {'joint': b'png', 'isoflop_k3': b'png', 'isoflop_k7': b'png'})
  assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)[^"]*"', text) == []
  assert 'http://' not in text and 'https://' not in text
  policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
  assert re.search(r'<meta http-equiv="Content-Security-Policy"\s+content="([^"]*)">', text)[1] == policy
  assert text.index('<h2>Warnings') < text.index('<h2>Figures') < text.index('<h2>Laws') < text.index('<h2>Finished')
  assert text.count('<figure>') == 3 and text.count('The same at k = 3') == 1
  for line in found.warning_lines():
    assert line.partition(':')[0] in text


def test_page_folds_what_was_not_attempted():
  text = page.render('t', findings(families=[one_family(not_attempted=['lr(n): one rate'])]), {})
  assert re.search(r'<details><summary>Not attempted: 1 law [^<]*</summary>\s*<ul[^>]*><li>lr\(n\): one rate', text)
  assert '<p>None.</p>' in text  # and it is no warning
  assert 'Not attempted' not in page.render('t', findings(), {})


def test_page_of_laws_has_a_row_for_every_k():
  found = full_ledger.findings()
  text = page.render('full', found, {})
  laws = text[text.index('<h2>Laws') : text.index('The compute laws in the FLOPs')]
  sections = re.findall(r'<section class="law"><h3>(.*?):.*?<tbody>(.*?)</tbody>', laws, re.DOTALL)
  assert [name for name, _ in sections] == [
    'L(n, k)',
    'L(n)',
    'L(C)',
    'T(n)',
    'n(C)',
    'lr(n)',
    'L(n, T)',
    'L_s(n)',
    'L_s(n)',
  ]
  assert dict(sections)['L(n)'].count('<tr>') == len(full_ledger.KS)


def test_page_has_a_section_for_every_family():
  (full,) = full_ledger.findings().families
  families = [dataclasses.replace(full, name=name) for name in ('one', 'two')]
  text = page.render('t', findings(families=families), {'one/joint': b'1', 'two/joint': b'2', 'two/isoflop_k3': b'3'})
  heads = re.findall('<h2>(.*?)</h2>', text)
  own = [f'{what} of {name}' for name in ('one', 'two') for what in ('Figures', 'Laws', 'Is there an irreducible loss')]
  assert heads == [
    'Warnings',
    *(f'{head}?' if 'there' in head else head for head in own),
    'Finished cells',
    'Other cells',
  ]
  parts = re.split('<h2>Figures of', text)
  assert [part.count('<figure>') for part in parts] == [0, 1, 2] and 'MQ==' in parts[1] and 'Mg==' in parts[2]


def test_page_shows_the_coefficients_of_cells_that_have_no_k():
  done = findings().done.assign(activation=['one'] * 3 + ['two'] * 3, sparsity=[np.nan] * 3 + [0.05, 0.1, 0.2])
  mixed = page.render('t', findings(done=done.assign(k=[1, 16, 1] + [np.nan] * 3)), {})
  heads = re.findall('<button type="button">(.*?)</button>', mixed)
  assert heads[:5] == ['cell', 'n', 'family', 'k', 'sparsity'] and '<td data-v="0.05">0.05</td>' in mixed
  penalised = page.render('t', findings(done=done[3:].assign(k=np.nan)), {})
  heads = re.findall('<button type="button">(.*?)</button>', penalised)
  assert heads[:4] == ['cell', 'n', 'sparsity', 'learning rate'] and 'filter, e.g. sparsity=0.05' in penalised


def test_page_shows_profiles_and_seed_noise_where_there_are_any():
  n = np.repeat(2.0 ** np.arange(6, 13), 2)
  noise = 0.01 * np.random.default_rng(0).normal(size=14)
  points = pd.DataFrame({'n_latents': n, 'seed': [0, 1] * 7, 'nmse': 3 * n**-0.4 * np.exp(noise)})
  one = dataclasses.replace(fit.fit_law(points, 'power', bootstrap=5), where={'k': 3})
  text = page.render('t', findings(families=[at_three(power=one)]), {})
  assert f'<br>profile [unbounded, {one.params["e"]["profile_high"]:.4g}]' in text
  noise = one.diagnostics['seed_noise']
  assert '<th scope="col">seed noise</th>' in text
  assert f'<td>{noise["sd_log"]:.4f} (p = {noise["lack_of_fit_p"]:.2g})</td>' in text
  linear = dataclasses.replace(fit.fit_law(points, 'power_no_floor', bootstrap=0), where={'k': 3})
  assert 'rofile' not in page.render('t', findings(families=[at_three(learning_rate=linear)]), {})
  huber = fit.fit_law(points.drop(columns='seed'), 'power', objective='huber', bootstrap=5)
  text = page.render('t', findings(families=[one_family(joint=huber)]), {})
  assert 'rofile' not in text and 'seed noise' not in text


def test_page_remembers_the_figures_beside_it_and_no_other_name():
  digests = {'joint.png': 'a' * 64, 'isoflop_k3.pdf': '0' * 64}
  assert page.figure_digests(page.render('t', findings(), {}, digests)) == digests
  assert page.figure_digests(page.render('t', findings(), {})) == {}
  assert page.figure_digests('<html>') == {}
  escape = f'../joint.png={"a" * 64} /etc/a.png={"a" * 64} table.csv={"a" * 64}'
  assert page.figure_digests(f'<meta name="figures" content="{escape}">') == {}


@pytest.fixture(scope='module')
def browse(tmp_path_factory):
  """Runs JavaScript in the page of `findings`; returns what it puts into the object `seen`."""
  chromium = shutil.which('chromium') or shutil.which('chromium-browser')
  if chromium is None:
    pytest.skip('no chromium')
  folder = tmp_path_factory.mktemp('browser')

  def run(script):
    act = f"""<pre id="seen"></pre><script>
      const seen = {{}};
      const shown = () => Array.from(document.querySelectorAll('#cells tbody tr')).filter(r => r.offsetParent !== null);
      const ids = () => shown().map(r => r.cells[0].textContent);
      const head = name => Array.from(document.querySelectorAll('#cells th')).find(h => h.textContent === name);
      const click = name => head(name).querySelector('button').click();
      const type = text => {{ const box = document.getElementById('cells-filter'); box.value = text;
        box.dispatchEvent(new Event('input')); }};
      {script}
      document.getElementById('seen').textContent = JSON.stringify(seen);
    </script></body>"""
    path = folder / 'page.html'
    path.write_text(page.render('title', findings(), {}).replace('</body>', act))
    flags = (
      'headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update '
      'disable-sync virtual-time-budget=3000 dump-dom'
    ).split()
    command = [
      chromium,
      *(f'--{flag}' for flag in flags),
      f'--user-data-dir={folder / "profile"}',
      f'file://{path}',
    ]
    dom = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(re.search(r'<pre id="seen">(.*?)</pre>', dom).group(1))

  return run


def test_page_sorts_and_filters_in_a_browser(browse):
  seen = browse("""
    seen.count = document.getElementById('cells-count').textContent;
    click('NMSE'); seen.up = ids(); seen.aria = head('NMSE').getAttribute('aria-sort');
    click('NMSE'); seen.down = ids();
    click('n'); seen.n = shown().map(r => Number(r.cells[1].dataset.v)); seen.old = head('NMSE').getAttribute('aria-sort');
    click('cell'); click('cell'); seen.words = ids();
    click('subject'); seen.mixed = shown().map(r => r.cells[6].textContent);
    click('cell'); type('k=1'); seen.exact = ids();
    type('K=1 n=1024'); seen.both = ids();
    type('n=1048576'); seen.long = ids();
    type('ell3'); seen.part = ids(); seen.left = document.getElementById('cells-count').textContent;
    type('"><img src=x>'); seen.none = ids();
    type(''); seen.all = ids().length; seen.images = document.images.length;
  """)
  finite = [i for i in np.argsort(NMSE) if np.isfinite(NMSE[i])]
  assert seen['count'] == '6 of 6 cells'
  assert seen['up'] == [f'cell{i}' for i in (*finite, 1)] and seen['aria'] == 'ascending'
  assert seen['down'] == [f'cell{i}' for i in (*finite[::-1], 1)]  # what is missing stays last
  assert seen['n'] == sorted(N) and seen['old'] is None  # by number: 64 before 1024
  assert seen['words'] == [f'cell{i}' for i in range(5, -1, -1)]
  assert seen['mixed'] == ['10', '10', '9', '9e999', 'a', 'b']  # one of them is a word: all are
  assert seen['exact'] == ['cell0', 'cell2', 'cell4', 'cell5']  # k=1 is not k=16
  assert (
    seen['both'] == ['cell0']
    and seen['long'] == ['cell5']
    and seen['part'] == ['cell3']
    and seen['left'] == '1 of 6 cells'
  )
  assert seen['none'] == [] and seen['all'] == 6 and seen['images'] == 0
