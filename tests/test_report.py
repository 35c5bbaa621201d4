import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from analysis import plots, report, table
from sae_jax import files

PLOTTED = dict(
  alpha=-0.42271827, beta_k=0.2397685, beta_n=-0.02708159, gamma=-0.03828648, zeta=-1.31862432, eta=-0.0964778
)
SIZES, KS = [1024, 2048, 4096, 8192, 16384, 32768], [3, 7, 17]


def law(n, k):
  p = PLOTTED
  reducible = (
    p['alpha'] + p['beta_k'] * np.log(k) + p['beta_n'] * np.log(n) + p['gamma'] * np.log(k) * np.log(n)
  )
  return float(np.exp(reducible) + np.exp(p['zeta'] + p['eta'] * np.log(k)))


def write_cell(ledger, cell_id, *, n, k, nmse, learning_rate=1e-3, lines=(), result=True, weights='ema'):
  folder = files.join(ledger, 'cells', cell_id)
  record = {
    'id': cell_id, 'n_latents': n, 'k': k, 'd_model': 13, 'seed': 0, 'learning_rate': learning_rate, 'batch_tokens': 11,
    'steps': 100, 'tokens': 1100, 'flops_useful': 2.0 * n * 13 * 1100, 'flops_dense': 12.0 * n * 13 * 1100, 'nmse': nmse,
    'weights': weights, 'l0': float(k), 'git_commit': 'c',
  }  # fmt: skip
  config = {'sae': {'d_model': 13, 'n_latents': n, 'k': k}, 'optim': {'learning_rate': learning_rate}}
  files.replace(files.join(folder, 'config.json'), json.dumps(config).encode())
  files.replace(
    files.join(folder, 'metrics.jsonl'), ''.join(json.dumps(line) + '\n' for line in lines).encode()
  )
  if result:
    files.replace(files.join(folder, 'result.json'), json.dumps(record).encode())
  return folder


def write_ledger(path, sizes=SIZES, ks=KS, noise=0.001, rates=(1e-3,)):
  rng = np.random.default_rng(0)
  for n in sizes:
    for k in ks:
      for i, rate in enumerate(rates):
        nmse = law(n, k) * float(np.exp(noise * rng.normal())) * (1 + 0.1 * abs(i - len(rates) // 2))
        lines = [
          {
            'step': int(step), 'tokens': 11 * int(step), 'flops_useful': 2.0 * n * 13 * 11 * step,
            'flops_dense': 12.0 * n * 13 * 11 * step, 'eval/nmse': nmse * (1 + (n / 1024) ** 0.6 / step),
          }
          for step in np.unique(np.geomspace(3, 100, 13).astype(int)).tolist()
        ]  # fmt: skip
        write_cell(path, f'{n:05x}{k:03x}{i}', n=n, k=k, learning_rate=rate, nmse=nmse, lines=lines)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A report from a ledger of known laws, with one failed cell whose error is markup."""
  folder = tmp_path_factory.mktemp('report')
  ledger = str(folder / 'ledger')
  write_ledger(ledger, rates=(5e-4, 1e-3, 2e-3))
  failed = write_cell(ledger, 'ffff', n=1024, k=3, nmse=1, result=False)
  files.replace(
    files.join(failed, 'failure.json'), json.dumps({'error': '<script>alert("x")</script>'}).encode()
  )
  write_cell(
    ledger,
    'eeee',
    n=1024,
    k=3,
    learning_rate=9e-3,
    nmse=0.99,
    weights='"><img src=x onerror=alert(1)>',
  )
  with pytest.raises(SystemExit) as code:
    report.main(['--ledger', ledger, '--out', str(folder / 'out'), '--bootstrap=20'])
  assert code.value.code == 0
  return folder / 'out'


def test_report_writes_everything(written):
  names = {p.name for p in written.iterdir()}
  pictures = {
    f'{name}.{kind}' for name in ('joint', 'residuals', 'power', 'frontier') for kind in ('png', 'pdf')
  }
  assert names == {'table.csv', 'laws.json', 'index.html'} | pictures
  rows = table.read_csv(str(written / 'table.csv'))
  assert len(rows) == len(SIZES) * len(KS) * 3 + 1
  assert rows['best_learning_rate'].sum() == len(SIZES) * len(KS)


def test_report_recovers_the_planted_law_from_the_best_learning_rates(written):
  entries = json.loads((written / 'laws.json').read_text(), parse_constant=pytest.fail)  # strict JSON only
  joint = next(e for e in entries if e['law'] == 'joint_nk')
  assert joint['n_points'] == len(SIZES) * len(KS)
  assert joint['holdout']['rule'] == 'n_latents>16384' and joint['holdout']['max_rel_err'] < 0.01
  for n, k in ((1024, 3), (32768, 17), (7000, 11)):
    p = {name: value['estimate'] for name, value in joint['params'].items()}
    reducible = (
      p['alpha'] + p['beta_k'] * np.log(k) + p['beta_n'] * np.log(n) + p['gamma'] * np.log(k) * np.log(n)
    )
    assert np.exp(reducible) + np.exp(p['zeta'] + p['eta'] * np.log(k)) == pytest.approx(law(n, k), rel=5e-3)
  assert [(e['x'], e['where']) for e in entries if e['law'] == 'power'] == [
    ([x], {'k': k}) for x in ('n_latents',) for k in KS
  ] + [([x], {'k': k}) for x in ('flops_useful', 'flops_dense') for k in KS]
  for e in entries:
    assert set(e) >= {
      'law',
      'formula',
      'x',
      'y',
      'params',
      'objective',
      'n_points',
      'start_agreement',
      'holdout',
      'warnings',
    }
    assert all(set(p) >= {'estimate', 'low', 'high'} for p in e['params'].values())


def test_report_page_stands_alone_and_escapes_data(written):
  page = (written / 'index.html').read_text()
  assert '<script>alert' not in page and '<img src=x' not in page
  assert '&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;' in page
  outside = re.findall(r'(?:src|href)="(?!data:image/png;base64,)[^"]*"', page)
  assert outside == [] and 'http://' not in page and 'https://' not in page
  assert page.index('Warnings') < page.index('Figures') < page.index('Laws')


@pytest.mark.skipif(shutil.which('chromium') is None, reason='no chromium')
def test_report_page_runs_in_a_browser(written, tmp_path):
  page = (written / 'index.html').read_text()
  act = """<script>
    const box = document.getElementById('filter'); box.value = 'k=7 n=1024'; box.dispatchEvent(new Event('input'));
    const nmse = Array.from(document.querySelectorAll('#cells th button')).find(b => b.textContent === 'NMSE');
    nmse.click();
    const shown = Array.from(document.querySelectorAll('#cells tbody tr')).filter(r => !r.hidden);
    document.title = document.getElementById('count').textContent + ' ' + shown.map(r => r.cells[5].dataset.v).join(' ');
  </script></body>"""
  (tmp_path / 'page.html').write_text(page.replace('</body>', act))
  flags = ('headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking disable-component-update '
    'disable-sync').split()  # fmt: skip
  command = [
    'chromium',
    *(f'--{flag}' for flag in flags),
    f'--user-data-dir={tmp_path / "profile"}',
    '--dump-dom',
  ]
  dom = subprocess.run(
    [*command, f'file://{tmp_path / "page.html"}'], capture_output=True, text=True, timeout=60, check=True
  )
  title = re.search(r'<title>(.*?)</title>', dom.stdout).group(1)
  count, losses = title.split(' cells ')
  assert count == '3 of 55'
  assert (values := [float(v) for v in losses.split()]) == sorted(values) and len(values) == 3


def test_report_names_cells_that_are_not_at_convergence(tmp_path):
  write_ledger(str(tmp_path))
  write_cell(str(tmp_path), 'stale', n=65536, k=3, nmse=law(32768, 3) * 1.01)
  found = report.analyse(str(tmp_path), bootstrap=0)
  (warning,) = (w for w in found.warnings if w['code'] == 'not_at_convergence')
  assert 'stale (k=3' in warning['message'] and 'n=32768' in warning['message']
  assert found.joint is not None and warning in found.joint.warnings


def test_report_of_a_converged_ledger_names_none(tmp_path):
  write_ledger(str(tmp_path))
  assert 'not_at_convergence' not in {w['code'] for w in report.analyse(str(tmp_path), bootstrap=0).warnings}


def test_report_of_few_cells_says_which_law_is_missing_and_why(tmp_path, capsys):
  write_ledger(str(tmp_path / 'ledger'), sizes=[1024, 2048], ks=[3, 7])
  with pytest.raises(SystemExit) as code:
    report.main(['--ledger', str(tmp_path / 'ledger'), '--out', str(tmp_path / 'out'), '--bootstrap=5'])
  assert code.value.code == 0
  page, shown = (tmp_path / 'out' / 'index.html').read_text(), capsys.readouterr().out
  for text in (page, shown):
    assert 'L(n,k): 4 different points' in text and 'L(n) at k=3: 2 sizes' in text
  assert shown.splitlines()[-1] == f'report: {tmp_path / "out" / "index.html"}'


def test_report_of_an_empty_ledger_is_written(tmp_path):
  write_cell(str(tmp_path / 'ledger'), 'a', n=1024, k=3, nmse=1, result=False)
  found = report.analyse(str(tmp_path / 'ledger'))
  path = report.write(found, str(tmp_path / 'out'), 'empty')
  assert files.exists(path) and json.loads((tmp_path / 'out' / 'laws.json').read_text()) == []


def test_report_without_a_ledger_ends_with_one_line(tmp_path, capsys):
  with pytest.raises(SystemExit) as code:
    report.main(['--ledger', str(tmp_path / 'no'), '--out', str(tmp_path)])
  assert code.value.code == 2
  assert capsys.readouterr().err.count('\n') == 1


def test_frontier_figure_of_a_joint_fit_shows_its_cells(tmp_path):
  write_ledger(str(tmp_path))
  found = report.analyse(str(tmp_path), bootstrap=0)
  (ax,) = plots.frontier(found.joint).axes
  assert sum(line.get_marker() not in ('None', None) for line in ax.lines) == len(KS)
