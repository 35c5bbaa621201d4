"""The guides: every `python -m` in them parses against the real program, dry runs are run, example files are read.

A block that needs a cluster begins with `# not run here`; its `python -m` commands are parsed all the same.
"""

import argparse
import importlib
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from sae_jax import config, flags
from sae_jax.data import inputs, store
from sweeps import grid, jobs
from tests import fake_bucket

ROOT = pathlib.Path(__file__).parents[1]
GUIDES = sorted((ROOT / 'docs').glob('*.md'))
ELSEWHERE = '# not run here'
_BLOCK = re.compile(r'^```(\w+)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
# What is quoted may hold what ends a command.
_COMMAND = re.compile(r"""((?:[A-Z_]+=\S+ )*)python -m (\S+)((?:"[^"\n]*"|'[^'\n]*'|[^;|&>"'\n])*)""")
_NAMED_FILE = re.compile(r'# ([\w.]+)\n')


class Parsed(BaseException):
  """Ends a main once its arguments are understood."""


def blocks(guide):
  """(language, text) of a guide, continued lines joined."""
  return [(kind, re.sub(r'\\\n *', '', body)) for kind, body in _BLOCK.findall(guide.read_text())]


SHELL = [
  pytest.param(body, id=f'{guide.stem}-{i}')
  for guide in GUIDES
  for i, (kind, body) in enumerate(blocks(guide))
  if kind == 'sh'
]


OWN_MODEL = [body for kind, body in blocks(ROOT / 'docs' / 'your_own_model.md') if kind == 'sh']


def commands(body):
  return [(module, shlex.split(rest, comments=True)) for _, module, rest in _COMMAND.findall(body)]


@pytest.fixture(scope='session')
def own_activations(tmp_path_factory):
  """The files that the guide on one's own activations begins with, and the stores its commands make of them."""
  folder = tmp_path_factory.mktemp('own')
  rng = np.random.default_rng(0)
  np.save(folder / 'acts.npy', rng.standard_normal((40_000, 8), np.float32))
  (folder / 'texts').mkdir()
  for i in range(2):
    np.save(folder / 'texts' / f'acts{i}.npy', rng.standard_normal((600, 31, 8), np.float32))
    np.save(folder / 'texts' / f'mask{i}.npy', rng.random((600, 31)) < 0.9)
  with pytest.MonkeyPatch.context() as patched:
    patched.chdir(folder)
    for kind, body in blocks(ROOT / 'docs' / 'your_own_activations.md'):
      for module, argv in commands(body) if kind == 'sh' else ():
        if module == 'sae_jax.data.store':
          assert run(module, argv) == 0, shlex.join(argv)
  return folder


@pytest.fixture(scope='session')
def own_model(tmp_path_factory):
  """The files that the guide on one's own model begins with, tiny ones, and the store that its first command makes."""
  folder = tmp_path_factory.mktemp('model')
  shutil.copytree(ROOT / 'tests' / 'subjects' / 'llama', folder / 'models' / 'mine')
  (folder / 'texts').mkdir()
  words = np.random.default_rng(0).choice(['the', 'sea', 'wall', 'and', 'a', 'boat', 'by'], (20, 300))
  for i, row in enumerate(words):
    (folder / 'texts' / f'{i}.txt').write_text(' '.join(row))
  small = {
    '1_000_000': '2048',
    '16_384': '256',
    '8192': '256',
    '64, 256': '32, 8',
    '1024, 32': '64, 4',
    '512, ': '64, ',
  }
  small |= {'[256, 512, 1024]': '[16, 32]', '[8, 16, 32]': '[2, 4]'}
  with pytest.MonkeyPatch.context() as patched:
    patched.chdir(folder)
    for kind, body in blocks(ROOT / 'docs' / 'your_own_model.md'):
      if kind == 'python' and (named := _NAMED_FILE.match(body)):
        for large, less in small.items():
          body = body.replace(large, less)
        (folder / named[1]).write_text(body)
  run_in_a_process(folder, *commands(OWN_MODEL[0])[0])
  return folder


def run_in_a_process(folder, module, argv):
  """A command that wants a jax of its own."""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': f'{folder}:{ROOT}'}
  subprocess.run([sys.executable, '-m', module, *argv], check=True, env=env, cwd=folder)


@pytest.mark.chaos  # for its length
def test_own_model_goes_from_a_folder_to_laws(own_model, monkeypatch):
  for module, argv in [pair for body in OWN_MODEL for pair in commands(body)]:
    run_in_a_process(own_model, module, argv)
  monkeypatch.chdir(own_model)
  assert 'joint_nk' in (own_model / 'runs/model/report/laws.json').read_text()
  sites = [
    config.read_store_file(f'runs/model/sites/{site}')['config']['site'] for site in ('mlp_out.0', 'resid_post.1')
  ]
  assert sites == ['mlp_out.0', 'resid_post.1']
  found: dict = {}
  (notebook,) = [
    body
    for kind, body in blocks(ROOT / 'docs' / 'your_own_model.md')
    if kind == 'python' and not _NAMED_FILE.match(body)
  ]
  exec(notebook, found)
  assert found['kl_BT'].shape == (1, len(found['ids'])) and (found['kl_BT'] > 0).all()


@pytest.fixture
def guide_folder(tmp_path, monkeypatch, own_activations, own_model):
  """A folder as the guides have it: the repository's, with the files that they show."""
  for name in ('analysis', 'experiments', 'sweeps'):
    (tmp_path / name).symlink_to(ROOT / name)
  (tmp_path / 'runs').mkdir()
  for path in [*(own_activations / 'runs').iterdir(), own_model / 'runs' / 'model']:
    (tmp_path / 'runs' / path.name).symlink_to(path)
  for guide in GUIDES:
    for kind, body in blocks(guide):
      if kind != 'sh' and (named := _NAMED_FILE.match(body)):
        assert not (tmp_path / named[1]).exists(), f'{named[1]} is shown twice'
        (tmp_path / named[1]).write_text(body)
  for name in ('model.py', 'model_grid.py'):
    shutil.copy(own_model / name, tmp_path)
  monkeypatch.chdir(tmp_path)
  fake_bucket.use(monkeypatch)
  return tmp_path


def run(module, argv):
  """The exit code of a real run, with the signal handlers of the test put back."""
  before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    with pytest.raises(SystemExit) as ended:
      importlib.import_module(module).main(argv)
    return ended.value.code
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def parse(module, argv, monkeypatch):
  """None when the program understands the arguments, its exit code otherwise."""
  genuine, read_config = argparse.ArgumentParser.parse_args, flags.parse

  def parse_args(self, *args, **kwargs):
    genuine(self, *args, **kwargs)
    raise Parsed

  def parse_config(*args):
    with pytest.MonkeyPatch.context() as inner:
      inner.setattr(argparse.ArgumentParser, 'parse_args', genuine)
      config.resolve(read_config(*args)[1])
    raise Parsed

  monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', parse_args)
  monkeypatch.setattr(flags, 'parse', parse_config)
  try:
    return run(module, argv)
  except Parsed:
    return None
  finally:
    monkeypatch.undo()


def test_guides_are_there():
  names = {guide.name for guide in GUIDES}
  assert {'first_tpu_vm_sweep.md', 'first_pod_sweep.md', 'first_slurm_sweep.md'} < names


@pytest.mark.parametrize('body', SHELL)
def test_commands_are_ours_or_marked(body):
  if body.startswith(ELSEWHERE + '\n'):
    return
  for line in body.splitlines():
    assert _COMMAND.fullmatch(line), f'{line!r} is not a python -m command: begin its block with {ELSEWHERE!r}'


@pytest.mark.parametrize('body', SHELL)
def test_commands_parse(body, guide_folder):
  for module, argv in commands(body):
    with pytest.MonkeyPatch.context() as patched:
      code = parse(module, argv, patched)
    assert code is None, f'python -m {module} {shlex.join(argv)}: exit code {code}'


def test_a_wrong_command_is_noticed(guide_folder, capsys):
  for module, argv in commands(
    'python -m sweeps.launch --sweep=sweeps/grids/tiny.py --ledger=x --exekutor=local\n'
    'python -m sae_jax.train --config=experiments/tiny.py --workdir=x --config.sae.kk=3\n'
    'python -m sweeps.status\n'
  ):
    with pytest.MonkeyPatch.context() as patched:
      assert parse(module, argv, patched) == 2, module
  capsys.readouterr()


def test_dry_runs_run(guide_folder, monkeypatch, capsys):
  monkeypatch.setenv('PATH', '/nonexistent')  # a dry run asks no cluster
  seen = set()
  for guide in GUIDES:
    for kind, body in blocks(guide):
      for module, argv in commands(body) if kind == 'sh' and not body.startswith(ELSEWHERE) else ():
        if module == 'sweeps.launch' and '--dry_run' in argv:
          assert run(module, argv) == 0, f'{guide.name}: {shlex.join(argv)}: {capsys.readouterr().err}'
          seen.add(next((a for a in argv if a.startswith('--executor=')), 'local'))
  assert seen == {'local', '--executor=jobset', '--executor=slurm'}
  out = capsys.readouterr().out
  assert '"kind": "JobSet"' in out and '#SBATCH' in out and 'dense FLOPs' in out


def test_ledger_commands_run_on_a_ledger_that_launch_filled(guide_folder, capsys):
  ran = []
  fill = ['--sweep=slice_grid.py', '--ledger=gs://BUCKET/first', '--workers=0']
  assert fill in [argv for block in SHELL for _, argv in commands(block.values[0])]
  assert run('sweeps.launch', fill) == 0
  capsys.readouterr()
  assert run('sweeps.status', ['--ledger=gs://BUCKET/first']) == 0
  cell = capsys.readouterr().out.splitlines()[2].split()[0]
  for kind, body in blocks(ROOT / 'docs' / 'when_something_fails.md'):
    for module, argv in commands(body) if kind == 'sh' else ():
      if module in ('sweeps.status', 'sweeps.retry', 'sweeps.cancel', 'sweeps.gc'):
        argv = [a.replace('runs/nk', 'gs://BUCKET/first').replace('0a1b2c3d4e5f', cell) for a in argv]
        # Nothing has failed here, and retry says so of a cell that is named.
        assert run(module, argv) == (2 if module == 'sweeps.retry' and cell in argv else 0), (module, argv)
        ran.append(module)
  assert set(ran) == {'sweeps.status', 'sweeps.retry', 'sweeps.cancel', 'sweeps.gc'}
  assert 'cancelled' in capsys.readouterr().out


def test_fits_of_the_guide_to_tables_run(guide_folder, capsys):
  guide = ROOT / 'docs' / 'your_own_table.md'
  (lines,) = [body for kind, body in blocks(guide) if kind == 'json']
  (guide_folder / 'curves.jsonl').write_text(lines)
  for module, argv in [pair for kind, body in blocks(guide) if kind == 'sh' for pair in commands(body)]:
    assert run(module, [*argv, '--bootstrap=5']) == 0, f'{shlex.join(argv)}: {capsys.readouterr().err}'
  out = capsys.readouterr().out
  assert 'a[small]' in out and 'held out: 15 with n_latents>65536' in out
  assert not re.search('warning: (broken_count|equal_rows|pooled|equal_x)', out)
  assert run('analysis.fit', ['models.csv', '--law=power_no_floor', '--y=loss', '--bootstrap=0']) == 0
  assert 'warning: pooled: model tells apart' in capsys.readouterr().out


def test_examples_of_the_fit_help_parse(guide_folder, capsys):
  assert run('analysis.fit', ['--help']) == 0
  examples = commands(capsys.readouterr().out.split('examples:')[1])
  assert len(examples) >= 5
  for module, argv in examples:
    with pytest.MonkeyPatch.context() as patched:
      assert parse(module, argv, patched) is None, argv


def test_stores_of_the_guide_are_what_it_says(own_activations):
  read = lambda name: store.read_meta(str(own_activations / 'runs' / name))  # noqa: E731
  mine, texts, scaled = read('mine'), read('texts'), read('scaled')
  assert mine['tokens'] == 40_000 - 16_384 and mine['config']['site'] == 'layer.6' and 'scale' not in mine
  assert texts['held_out_tokens'] >= 16_384 and texts['provenance']['drop_first'] == 1
  assert len(texts['provenance']['mask_sha256']) == 2
  assert 0.3 < scaled['scale'] < 0.4  # the norm of eight standard normals is 2.7


def test_forms_in_the_guide_are_those_that_are_read():
  guide = (ROOT / 'docs' / 'your_own_activations.md').read_text()
  for name, split in (
    ('acts.safetensors:layer6', ('acts.safetensors', 'layer6')),
    ('@list.txt', ('@list.txt', '')),
  ):
    assert f'`{name}`' in guide and inputs.split(name) == split


@pytest.mark.parametrize('name, read', [('pod.toml', jobs.jobset_cluster), ('slurm.toml', jobs.slurm_cluster)])
def test_site_files_are_read(guide_folder, name, read):
  assert read(str(guide_folder / name), 'gs://BUCKET/x').limits['max_restarts'] == 100


def test_grids_are_built(guide_folder):
  sweep = grid.build('slice_grid.py')
  assert {(c.mesh.data, c.mesh.latent) for _, c in sweep.cells} == {(4, 4)}
  # The mesh stays out of the id: the ledger goes on elsewhere.
  assert [c.id for _, c in sweep.cells] == [c.id for _, c in grid.build('sweeps/grids/tiny.py').cells]


def test_links_and_names_exist():
  code = '\n'.join(path.read_text() for part in ('sae_jax', 'sweeps') for path in (ROOT / part).rglob('*.py'))
  for guide in GUIDES:
    text = guide.read_text()
    for target in re.findall(r'\]\(([^)#:]+)\)', text):
      assert (guide.parent / target).exists(), f'{guide.name} links to {target}'
    for path in re.findall(r'`((?:tests|sweeps|sae_jax|docs|experiments|analysis)/[\w/]+\.\w+)`', text):
      assert (ROOT / path).exists(), f'{guide.name} names {path}'
    for name in re.findall(r'\bSAE_JAX_[A-Z_]+', text):
      assert f"'{name}'" in code, f'{guide.name} names {name}'
