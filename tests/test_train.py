"""A run as its user meets it: killed and resumed bit for bit, damaged checkpoints, preemption, bad input."""

import gc
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import sae_jax
from sae_jax import checkpoint, config, evaluate, files, metrics, schema, train, training
from sae_jax.data import soundness
from sae_jax.data.source import open_source
from sae_jax.errors import UserError
from tests import cells
from tests.cells import STEPS, cell

ROOT = pathlib.Path(__file__).parents[1]
# When one array of a damaged checkpoint cannot be read, orbax abandons its reads of the others, and what is left of
# them complains when it is collected.
abandoned_reads = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
BATCH = cell().train.batch_tokens


def stop_after(steps: int):
  calls = iter(range(10_000))
  return lambda: next(calls) >= steps - 1


def result(workdir) -> dict:
  return json.loads((pathlib.Path(workdir) / 'result.json').read_text())


@pytest.fixture
def straight(trained):
  """An undisturbed run."""
  return trained / 'cells' / cell().id


def test_resume_is_bit_exact(straight, tmp_path):
  assert training.train(cell(), str(tmp_path), should_stop=stop_after(7)) == 'preempted'
  assert not (tmp_path / 'result.json').exists()
  assert training.train(cell(), str(tmp_path)) == 'done'
  timing = ('wall_s', 'git_commit', 'digest')
  got, expected = ({key: value for key, value in result(d).items() if key not in timing} for d in (tmp_path, straight))
  assert got == expected and got['bit_exact'] is True

  def curve(workdir):
    return [{k: v for k, v in line.items() if k != 'wall_s'} for line in metrics.read_metrics(str(workdir), cell().id)]

  assert curve(tmp_path) == curve(straight)


def test_finished_cell_is_not_trained_again(straight):
  before = (straight / 'result.json').read_bytes()
  assert training.train(cell(), str(straight)) == 'done'
  assert (straight / 'result.json').read_bytes() == before


def test_result_says_what_was_spent(straight):
  r = result(straight)
  assert r['steps'] == STEPS and r['tokens'] == STEPS * BATCH and r['tokens_asked'] == STEPS * BATCH + 5
  assert r['nmse'] == min(r['nmse_raw'], r['nmse_ema']) == r[f'nmse_{r["weights"]}']
  assert 0 < r['flops_useful'] < r['flops_dense']
  assert {
    'params_digest',
    'device_kind',
    'n_devices',
    'mesh',
    'versions',
    'git_commit',
    'flops_subject',
  } <= set(r)


def test_loaded_autoencoder_scores_the_recorded_nmse(straight):
  loaded = sae_jax.load(str(straight))
  x_BD = open_source(cell()).held_out(0, 101)
  z_BK, idx_BK = loaded.encode(x_BD)
  assert z_BK.shape == idx_BK.shape == (101, cell().sae.k) and float(z_BK.min()) >= 0
  x_hat_BD = np.asarray(loaded.decode(z_BK, idx_BK), np.float64)
  nmse = np.sum((x_BD - x_hat_BD) ** 2) / np.sum((x_BD - x_BD.mean(0, dtype=np.float64)) ** 2)
  assert nmse == pytest.approx(result(straight)['nmse'], rel=1e-5)
  assert loaded.info['weights'] == result(straight)['weights']


def test_load_refuses_a_damaged_autoencoder(straight, tmp_path):
  import shutil

  shutil.copytree(straight / 'sae', tmp_path / 'sae')
  (tmp_path / 'sae' / 'raw.safetensors').write_bytes(b'\x80\x04pickle')
  with pytest.raises(UserError, match='damaged'):
    sae_jax.load(str(tmp_path), 'raw')
  with pytest.raises(UserError, match='no trained autoencoder'):
    sae_jax.load(str(tmp_path / 'nowhere'))


def damage(folder: pathlib.Path, how: str) -> None:
  data = sorted(folder.rglob('d/*'), key=lambda p: p.stat().st_size)[-1]
  raw = bytearray(data.read_bytes())
  if how == 'flipped bit':
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
  elif how == 'truncated':
    data.write_bytes(raw[: len(raw) // 2])
  else:
    for path in sorted(folder.rglob('*'), reverse=True):
      path.rmdir() if path.is_dir() else path.unlink()


@abandoned_reads
@pytest.mark.parametrize('how', ['flipped bit', 'truncated', 'empty'])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(straight, tmp_path, capfd, how):
  training.train(cell(), str(tmp_path), should_stop=stop_after(12))
  assert sorted(p.name for p in (tmp_path / 'ckpt').iterdir()) == ['10', '12']
  damage(tmp_path / 'ckpt' / '12', how)
  assert training.train(cell(), str(tmp_path)) == 'done'
  gc.collect()
  assert 'checkpoint at step 12 is damaged' in capfd.readouterr().err
  assert result(tmp_path)['params_digest'] == result(straight)['params_digest']


@abandoned_reads
def test_every_checkpoint_damaged_starts_over(straight, tmp_path):
  training.train(cell(), str(tmp_path), should_stop=stop_after(12))
  for step in ('10', '12'):
    damage(tmp_path / 'ckpt' / step, 'empty')
  assert training.train(cell(), str(tmp_path)) == 'done'
  gc.collect()
  assert result(tmp_path)['params_digest'] == result(straight)['params_digest']


def test_another_mesh_resumes_and_says_bits_may_differ(straight, tmp_path):
  training.train(cell(), str(tmp_path), should_stop=stop_after(7))
  assert training.train(cell(**{'mesh.data': 2, 'mesh.latent': 4}), str(tmp_path)) == 'done'
  assert result(tmp_path)['bit_exact'] is False and result(tmp_path)['mesh'] == [2, 4]


HERE = metrics.processor()


@pytest.mark.parametrize(
  ('now', 'exact'),
  [
    ({}, True),
    ({'n_cores': HERE['n_cores'] + 1}, False),
    ({'cpu': 'another'}, False),
  ],
)
def test_another_processor_resumes_and_says_bits_may_differ(tmp_path, monkeypatch, now, exact):
  training.train(cell(), str(tmp_path), should_stop=stop_after(7))
  monkeypatch.setattr(metrics, 'processor', lambda: HERE | now)
  assert training.train(cell(), str(tmp_path)) == 'done'
  found = result(tmp_path)
  assert found['bit_exact'] is exact and {key: found[key] for key in HERE} == HERE | now


def test_checkpoint_from_before_the_processor_was_kept_counts_as_of_the_same(tmp_path):
  training.train(cell(), str(tmp_path), should_stop=stop_after(7))
  for path in (tmp_path / 'ckpt').glob('*/_CHECKPOINT_METADATA'):
    record = json.loads(path.read_text())
    saved = schema.content(record['custom_metadata'])
    record['custom_metadata'] = saved | {'facts': {k: v for k, v in saved['facts'].items() if k not in HERE}}
    path.write_text(json.dumps(record))
  assert training.train(cell(), str(tmp_path)) == 'done'
  assert result(tmp_path)['bit_exact'] is True


def test_processor_is_its_cores_and_its_instruction_set(monkeypatch):
  assert HERE == metrics.processor() and len(HERE['cpu']) == 12
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {3, 5, 7})
  assert metrics.processor() == HERE | {'n_cores': 3}
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_max_isa=SSE4_2 --xla_dump_to=x')
  assert metrics.processor()['cpu'] != HERE['cpu']


def test_next_training_ends_what_a_failed_one_left(tmp_path):
  with pytest.raises(ZeroDivisionError):
    training.train(cell(), str(tmp_path / 'a'), should_stop=lambda: bool(1 / 0))
  assert training.train(cell(), str(tmp_path / 'b'), should_stop=stop_after(2)) == 'preempted'
  assert not checkpoint._unclosed


def test_folder_of_another_cell_is_refused(straight):
  with pytest.raises(UserError, match='use another workdir'):
    training.train(cell(**{'sae.k': 5}), str(straight))


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
  training.train(cell(), str(tmp_path / 'a'), should_stop=stop_after(7))
  (tmp_path / 'b').mkdir()
  (tmp_path / 'a' / 'ckpt').rename(tmp_path / 'b' / 'ckpt')
  with pytest.raises(UserError, match='is of cell'):
    training.train(cell(**{'optim.learning_rate': 1e-3}), str(tmp_path / 'b'))


def test_divergence_stops_the_cell_with_a_reason(tmp_path):
  with pytest.raises(training.Diverged, match='not finite at step'):
    training.train(cell(**{'optim.learning_rate': 1e30}), str(tmp_path))
  assert not (tmp_path / 'result.json').exists()


def test_bad_nmse_of_rows_with_odd_norms_is_put_down_to_the_norms(tmp_path, monkeypatch, capfd):
  monkeypatch.setattr(
    evaluate.Evaluator,
    '__call__',
    lambda self, *candidates: [evaluate.Quality(nmse=179.0, mse=1.0, l0=13.0, topk_recall=None) for _ in candidates],
  )
  monkeypatch.setattr(soundness, '_NORMS', (5.0, 10.0))  # planted rows have norms of about 1
  assert training.train(cell(), str(tmp_path)) == 'done'
  first, *_, last = capfd.readouterr().err.splitlines()
  assert first.startswith('warning: the mean norm of the rows is 0.9') or 'mean norm of the rows is 1' in first
  assert 'no better than predicting the mean (1): the mean norm of the rows is' in last and '=scale' in last
  assert 'lower optim.learning_rate' not in last


@pytest.mark.parametrize('nmse', [0.999, 1.0, 2.9e25])
def test_run_that_is_no_better_than_the_mean_says_so_at_its_end(tmp_path, monkeypatch, capfd, nmse):
  one = evaluate.Quality(nmse=nmse, mse=1.0, l0=13.0, topk_recall=None)
  monkeypatch.setattr(evaluate.Evaluator, '__call__', lambda self, *candidates: [one for _ in candidates])
  assert training.train(cell(), str(tmp_path)) == 'done'
  last = capfd.readouterr().err.splitlines()[-1]
  assert ('is no better than predicting the mean (1): lower optim.learning_rate=' in last) == (nmse >= 1)
  if nmse > 1:
    assert last.startswith(f'{cell().id}: NMSE 2.9e+25 is no')
  assert result(tmp_path)['nmse'] == nmse


def test_lines_are_on_the_disk_before_the_checkpoint_that_supersedes_them(tmp_path, monkeypatch):
  """After a power cut a run goes on from its checkpoint, and no line before that is written again."""
  synced, behind = [], []
  fsync, save = os.fsync, checkpoint.Checkpoints.save

  def noted(at: int) -> None:
    fsync(at)
    if os.readlink(f'/proc/self/fd/{at}').endswith(schema.METRICS):
      synced.append(os.fstat(at).st_size)

  def saved(self, step, *args) -> None:
    behind.append((tmp_path / schema.METRICS).stat().st_size - max(synced))
    save(self, step, *args)

  monkeypatch.setattr(os, 'fsync', noted)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', saved)
  assert training.train(cell(), str(tmp_path)) == 'done'
  assert len(behind) > 1 and set(behind) == {0}


def test_torn_metrics_line_is_dropped_on_resume(straight, tmp_path):
  training.train(cell(), str(tmp_path), should_stop=stop_after(7))
  with open(tmp_path / 'metrics.jsonl', 'a') as f:
    f.write('{"step": 7, "eval/nm')
  training.train(cell(), str(tmp_path))
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert all(json.loads(line) for line in lines)


def command(workdir, **overrides) -> list[str]:
  flags = [f'--config.{key}={value}' for key, value in (cells.SHARED | overrides).items()]
  return [
    sys.executable,
    '-m',
    'sae_jax.train',
    '--config=experiments/tiny.py',
    f'--workdir={workdir}',
    *flags,
  ]


@pytest.mark.parametrize(('number', 'code'), [(signal.SIGTERM, 42), (signal.SIGINT, 130)])
def test_signal_saves_and_says_which_it_was(number, code, tmp_path):
  process = subprocess.Popen(
    command(tmp_path, **{'train.tokens': 4_000_000, 'train.checkpoint_every': 400}),
    cwd=ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  while not (tmp_path / 'metrics.jsonl').exists() and process.poll() is None:
    time.sleep(0.05)
  process.send_signal(number)
  _, err = process.communicate()
  assert process.returncode == code, err
  assert [p.name for p in (tmp_path / 'ckpt').iterdir()] and 'preempted' in err


@pytest.mark.parametrize(
  'flag,message',
  [
    ('sae.latents=3', 'latents'),
    ('sae.k=129', 'sae.k=129 exceeds sae.n_latents=128'),
    ('sae.k=many', 'sae.k'),
    ('mesh.data=3', 'not divisible by mesh.data=3; use 255 or 258'),
    ('mesh.latent=3', 'not divisible by mesh.latent=3'),
    ('optim.learning_rate=nan', 'not finite'),
    ('data.source=web', "'web' is not known; use one of planted, store, live"),
    ('data.source=store', 'no finished activation store'),
  ],
)
def test_bad_flag_is_one_line(tmp_path, capsys, flag, message):
  with pytest.raises(SystemExit) as stopped:
    train.main(['--config=experiments/tiny.py', f'--workdir={tmp_path}', f'--config.{flag}'])
  err = capsys.readouterr().err
  assert stopped.value.code == 2 and message in err and err.count('\n') == 1


def test_full_disk_is_one_line(tmp_path):
  """A filesystem where the checkpoint does not fit."""
  mount = tmp_path / 'small'
  mount.mkdir()
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=48k', 'tmpfs', mount], capture_output=True)
  if mounted.returncode:
    pytest.skip('needs the right to mount')
  try:
    ended = subprocess.run(command(mount), cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and 'Traceback' not in ended.stderr
    assert 'no space left' in ended.stderr.lower().splitlines()[-1]
    assert not (mount / 'result.json').exists()
  finally:
    subprocess.run(['umount', '-l', mount], check=True)


def test_planted_dictionary_is_recovered(tmp_path):
  overrides = {
    'sae.n_latents': 64,
    'sae.d_model': 32,
    'sae.k': 4,
    'data.planted.n_features': 48,
    'data.planted.active': 2.5,
  }
  config_ = cell(
    **overrides, **{'train.batch_tokens': 512, 'train.tokens': 512 * 600, 'train.checkpoint_every': 10_000}
  )
  assert training.train(config_, str(tmp_path)) == 'done'
  w_dec_FD = np.asarray(sae_jax.load(str(tmp_path)).sae.w_dec_FD[...])
  truth_GD = open_source(config_).dictionary_GD
  unit_FD = w_dec_FD / np.linalg.norm(w_dec_FD, axis=1, keepdims=True)
  best_G = (truth_GD @ unit_FD.T).max(axis=1)
  print(f'mean max cosine similarity {best_G.mean():.3f}, least {best_G.min():.3f}')
  assert best_G.mean() > 0.95


def test_digest_does_not_depend_on_the_mesh():
  import jax

  from sae_jax import sharding

  w_FD = np.random.default_rng(0).standard_normal((2 * checkpoint._BLOCK * 4, 3)).astype(np.float32)
  digests = set()
  for shape in ((1, 1), (8, 1), (1, 8), (2, 4)):
    mesh = sharding.make_mesh(config.MeshConfig(*shape))
    digests.add(
      checkpoint.array_digest(jax.device_put(w_FD, jax.NamedSharding(mesh, sharding.layout('w_enc_FD', w_FD.shape))))
    )
  w_FD[-1, -1] += 1e-6
  assert len(digests) == 1 and checkpoint.array_digest(jax.numpy.asarray(w_FD)) not in digests


@pytest.mark.parametrize('rows', [8, 8 * checkpoint._BLOCK])
@pytest.mark.parametrize(
  ('width', 'spec'),
  [
    (8, (None, 'latent')),
    (8, ('data', 'latent')),
    (8, ('latent', 'data')),
    (8, (None, ('data', 'latent'))),
    (8, (('latent', 'data'), None)),
    (8, ('latent', None)),
    (None, ('latent',)),
    (None, (('latent', 'data'),)),
  ],
)
def test_digest_does_not_depend_on_how_an_array_is_split(rows, width, spec):
  import jax

  from sae_jax import sharding

  shape = (rows,) if width is None else (rows, width)
  x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
  split = jax.device_put(x, jax.NamedSharding(sharding.make_mesh(config.MeshConfig(2, 4)), jax.P(*spec)))
  assert checkpoint.array_digest(split) == checkpoint.array_digest(jax.numpy.asarray(x))


def test_create_lets_exactly_one_writer_win(tmp_path):
  path = str(tmp_path / 'a' / 'result.json')
  files.create(path, b'first')
  with pytest.raises(FileExistsError):
    files.create(path, b'second')
  assert files.read(path) == b'first' and os.listdir(tmp_path / 'a') == ['result.json']


def test_ledger_without_exclusive_create_is_refused():
  with pytest.raises(UserError, match='no exclusive create'):
    files.check_exclusive_create('s3://bucket/ledger')


def test_cells_that_differ_in_their_seed_or_data_share_one_compiled_step():
  from sae_jax import sharding, step

  mesh = sharding.make_mesh(cell().mesh)

  def compiled(**overrides):
    return step.make_step(cell(**overrides), mesh)[1]

  assert compiled() is compiled(**{'train.seed': 3, 'data.seed': 5, 'train.tokens': 9 * cell().train.batch_tokens})
  for key, value in {'optim.learning_rate': 0.5, 'sae.k': 3, 'train.compute_dtype': 'bfloat16'}.items():
    assert compiled() is not compiled(**{key: value})
