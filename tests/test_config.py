"""Configuration: identity, validation, the recipe, and what may import what."""

import argparse
import ast
import dataclasses
import functools
import importlib
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import demo, tiny
from sae_jax import config, flags, flops, records
from sae_jax.errors import UserError
from sae_jax.recipe import GAO2024

ROOT = pathlib.Path(__file__).parents[1]


def cell(**overrides) -> config.Cell:
  return config.resolve(config.override(tiny.get_config(), overrides))


def test_json_round_trip_keeps_the_cell():
  assert config.from_json(cell().to_json()) == cell()


@pytest.mark.parametrize(
  'key,value',
  [
    ('sae.n_latents', 256),
    ('sae.k', 5),
    ('optim.learning_rate', 1e-3),
    ('train.batch_tokens', 128),
    ('train.tokens', 9999),
    ('train.seed', 1),
    ('data.seed', 1),
    ('data.planted.noise', 0.1),
    ('loss.aux_coefficient', 0.0),
    ('recipe.learning_rate_at_16k', 1e-4),
    ('sae.selection', 'approximate'),
  ],
)
def test_id_changes_with_what_decides_the_result(key, value):
  assert cell(**{key: value}).id != cell().id


@pytest.mark.parametrize(
  'key,value',
  [
    ('mesh.data', 2),
    ('mesh.latent', 4),
    ('mesh.products', 'dense'),
    ('train.checkpoint_every', 7),
    ('data.path', '/elsewhere'),
  ],
)
def test_id_does_not_change_with_where_it_runs(key, value):
  assert cell(**{key: value}).id == cell().id


@pytest.mark.parametrize('source', ['planted', 'live'])
def test_scale_needs_a_store_that_records_it(source):
  with pytest.raises(UserError, match=f"data.source='{source}' records no scalar"):
    cell(**{'data.source': source, 'data.normalize': 'scale', 'sae.d_model': 24})


def test_recall_target_is_part_of_the_id_where_it_decides():
  assert cell(**{'sae.recall_target': 0.9}).id == cell().id
  ids = {cell(**{'sae.selection': 'approximate', 'sae.recall_target': r}).id for r in (0.9, 0.95)}
  assert len(ids) == 2


def test_record_is_silent_about_what_came_later_and_is_not_used():
  """The analysis tells settings apart by what the record says."""
  record = json.loads(cell().to_json())
  assert 'selection' not in record['sae'] and set(record['mesh']) == {'data', 'latent'}
  assert config.from_json(cell().to_json()) == cell()


def test_edited_configuration_is_noticed():
  record = json.loads(cell().to_json())
  record['sae']['k'] = 5
  with pytest.raises(UserError, match='does not fit its digest'):
    config.from_json(json.dumps(record).encode())
  del record['digest']  # as records of earlier versions
  with pytest.raises(UserError, match='it was changed'):
    config.from_json(json.dumps(record).encode())


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60) | st.from_regex(rb'\{"schema": ?[0-9a-z"]+\}', fullmatch=True))
def test_foreign_bytes_are_a_user_error(data):
  with pytest.raises(UserError):
    config.from_json(data)


@pytest.mark.parametrize(
  'overrides,message',
  [
    ({'sae.k': 129}, 'sae.k=129 exceeds sae.n_latents=128'),
    ({'mesh.data': 3}, 'train.batch_tokens=256 is not divisible by mesh.data=3; use 255 or 258'),
    ({'mesh.latent': 3}, 'not divisible by mesh.latent=3'),
    ({'train.tokens': 100}, 'less than one batch'),
    ({'optim.learning_rate': float('inf')}, 'not finite'),
    ({'optim.ema_decay': 1.0}, 'not in'),
    ({'sae.activation': 'rlu'}, "sae.activation='rlu' is not known; use one of topk, multitopk"),
    (
      {'sae.activation': 'relu', 'loss.sparsity': 0.1},
      'the first steers the coefficient and the second fixes it; drop one',
    ),
    ({'sae.activation': 'cs294a'}, 'sae.k=4 but all latents of cs294a are active; set sae.k=None and loss.sparsity'),
    ({'sae.activation': 'relu', 'sae.k': 0}, 'sae.k=0 is below 1'),
    ({'sae.activation': 'relu', 'sae.k': 129}, 'sae.k=129 exceeds sae.n_latents=128'),
    ({'sae.bandwidth': 0.1}, "sae.bandwidth=0.1 is of jumprelu_step and jumprelu_tanh, and sae.activation='topk'"),
    ({'sae.activation': 'jumprelu_step', 'sae.bandwidth': 0.0}, 'sae.bandwidth=0.0 is not between 0 and 1'),
    ({'sae.activation': 'matryoshka', 'sae.n_latents': 12}, 'sae.n_latents=12 is not divisible by 8, as sae.levels=4'),
    ({'sae.activation': 'ksparse', 'sae.k_aux': 4}, 'sae.k_aux=4 but ksparse has no AuxK; set it to 0'),
    ({'sae.activation': 'relu', 'sae.selection': 'approximate'}, "but relu selects nothing; use 'exact'"),
    ({'recipe.horizon': 'so far', 'recipe.warmup_fraction': 0.1}, 'wants none of it; set it to 0'),
    ({'recipe.horizon': 'ever'}, "recipe.horizon='ever' is not known; use 'budget' or 'so far'"),
    ({'loss.sparsity': 0.1}, 'loss.sparsity=0.1 but topk has no penalty; drop it and set sae.k'),
    ({'loss.sparsity': -0.1}, 'loss.sparsity=-0.1 is below 0'),
    ({'loss.steer_start': 0.1}, 'loss.steer_start=0.1 but topk has no penalty; drop it'),
    ({'train.stop_gain': 2.0}, r'train.stop_gain=2.0 is not in \[0, 1\); choose a smaller one'),
    ({'sae.activation': 'matryoshka', 'sae.levels': 20_000}, 'is not divisible by .* as sae.levels=20000 want'),
    ({'sae.activation': 'cs294a', 'sae.k': None}, 'cs294a needs loss.sparsity, and it is not set'),
    ({'sae.n_latents': None}, 'sae.n_latents=None is no whole number'),
    ({'train.tokens': None}, 'train.tokens=None is no whole number'),
    ({'recipe.learning_rate_exponent': 1e6}, 'recipe.learning_rate_exponent=1000000.0 is not between -4 and 4'),
    ({'sae.activation': 'relu', 'loss.steer_start': 0.0}, 'loss.steer_start=0.0 is not between 0 and 1'),
    ({'sae.selection': 'random'}, "'random' is not known; use one of exact, approximate"),
    ({'sae.recall_target': 1.0}, "not in .*for 1 use sae.selection='exact'"),
    ({'nonsense': 1}, "config key 'nonsense' is not known"),
    ({'sae.k': 'four'}, 'wrong type'),
  ],
)
def test_impossible_values_are_refused(overrides, message):
  with pytest.raises(UserError, match=message):
    cell(**overrides)


def test_a_recipe_starts_the_steering_of_those_that_are_steered():
  starts = {
    name: cell(**{'recipe.steer_start': 0.005, 'sae.activation': name}).loss.steer_start for name in ('topk', 'relu')
  }
  assert starts == {'topk': 0.05, 'relu': 0.005}


def test_override_does_not_touch_the_original():
  original = tiny.get_config()
  config.override(original, {'sae.k_aux': 3})
  assert original.sae.k_aux is None


@pytest.mark.parametrize(
  ('key', 'value', 'plain'),
  [
    ('sae.n_latents', np.int64(256), 256),
    ('sae.d_model', np.uint8(16), 16),  # was None
    ('optim.learning_rate', np.float64(1e-3), 1e-3),
    ('optim.learning_rate', np.float32(1e-3), float(np.float32(1e-3))),
    ('loss.aux_coefficient', np.array(0.25), 0.25),
    ('loss.aux_coefficient', np.int32(1), 1.0),
    ('sae.latent_bias', np.False_, False),
    ('data.planted.noise', np.float16(0.5), 0.5),
  ],
)
def test_numbers_of_numpy_make_the_cell_of_the_plain_ones(key, value, plain):
  assigned, section = tiny.get_config(), key.rpartition('.')
  functools.reduce(getattr, section[0].split('.'), assigned)[section[2]] = value
  replaced = tiny.get_config()
  replaced.data = replaced.data.to_dict() | {
    'planted': {
      'n_features': np.int64(64),
      'active': np.float32(3),
      'exponent': np.array(0.5),
      'noise': 0.05,
      'seed': np.int8(0),
    }
  }
  assert config.resolve(assigned) == cell(**{key: value}) == cell(**{key: plain})
  assert config.resolve(assigned).id == cell(**{key: plain}).id != cell().id
  assert config.resolve(replaced).id == cell().id


def test_references_of_an_experiment_still_follow():
  c = tiny.get_config()
  c.data.planted = dict(n_features=c.sae.get_ref('d_model') * np.int64(2), active=3.0, exponent=0.5, noise=0.05, seed=0)
  c.sae.d_model = np.int64(16)
  assert c.data.planted.n_features == 32
  assert config.resolve(c).id == cell(**{'sae.d_model': 16, 'data.planted.n_features': 32}).id


@pytest.mark.parametrize(
  ('body', 'words'),
  [
    ("  c.sae.k = 'four'\n  return c", r"get_config\(\) of .*mine\.py fails in line 5: .*'k'.*template"),
    ("  c.sae.k = __import__('numpy').arange(3)\n  return c", 'fails in line 5'),
    ('  c.sea.k = 4\n  return c', 'fails in line 5: .*sea'),
    ('  c.sae.k = 4', 'gives a NoneType; return the ConfigDict'),
    ('  return c.to_dict()', 'gives a dict; return the ConfigDict'),
  ],
)
def test_mistake_in_an_experiment_file_is_named_with_its_line(tmp_path, body, words):
  path = tmp_path / 'mine.py'
  path.write_text(f'from experiments import tiny\n\ndef get_config():\n  c = tiny.get_config()\n{body}\n')
  with pytest.raises(UserError, match=words) as caught:
    flags.parse(argparse.ArgumentParser(), [f'--config={path}'])
  assert '\n' not in str(caught.value)


def test_recipe_follows_a_changed_size():
  small, large = cell(), cell(**{'sae.n_latents': 512})
  assert small.optim.learning_rate == pytest.approx(2 * large.optim.learning_rate)


def test_recipe_has_the_paper_values_at_the_paper_size():
  values = GAO2024.hyperparameters(n_latents=2**15, d_model=768, tokens=51_200_000_000, batch_tokens=131_072)
  assert values['optim.learning_rate'] == pytest.approx(1.4e-4, rel=0.02)
  assert values['optim.ema_decay'] == pytest.approx(0.999)
  assert values['loss.dead_tokens'] == 10_000_000 and values['sae.k_aux'] == 512
  assert values['sae.fired_threshold'] == pytest.approx(3.6e-5, rel=0.01)


def test_flops_follow_the_sparse_and_the_dense_algorithm():
  n, k, d, batch = 32_768, 32, 768, 2048
  step = flops.step_flops(n, k, d, batch)
  assert step['dense'] == pytest.approx(12 * n * d * batch)
  assert step['useful'] == pytest.approx(2 * n * d * batch, rel=0.01)  # in the sparse limit only the encoder
  assert flops.step_flops(n, n, d, batch)['useful'] >= 10 * n * d * batch
  with_aux = flops.step_flops(n, k, d, batch, k_aux=512)
  assert with_aux['useful'] - step['useful'] == 8 * batch * 512 * d


def test_flops_spent_count_auxk_only_where_it_ran():
  c = cell()
  assert flops.spent(c, 10, 0)['useful'] < flops.spent(c, 10, 3)['useful'] < flops.spent(c, 10, 10)['useful']
  assert flops.cell_flops(c) == flops.spent(c, c.train.steps, 0)


def test_every_grid_and_experiment_builds():
  for path in sorted((ROOT / 'sweeps' / 'grids').glob('*.py')) + sorted((ROOT / 'experiments').glob('*.py')):
    if path.stem == '__init__':
      continue
    module = importlib.import_module('.'.join(path.relative_to(ROOT).with_suffix('').parts))
    if hasattr(module, 'sweep'):
      base = module.EXPERIMENT.get_config()
      cells = [config.override(base, overrides) for overrides in module.sweep()]
      assert len(cells) == len({json.dumps(c.to_dict(), sort_keys=True) for c in cells}) > 1, path
    else:
      assert module.get_config().sae.k >= 1 and 'python -m' in module.__doc__, path


def test_demo_tokens_are_whole_batches_and_blocks():
  c = demo.get_config()
  assert c.train.tokens % c.train.batch_tokens == 0
  assert c.data.store_tokens % (c.data.block_windows * (c.data.window_tokens - 1)) == 0


# Imports go one way. Each folder or module, and what it must never import.
FORBIDDEN = {
  'sae_jax': ('sweeps', 'analysis', 'experiments', 'bench'),
  'analysis': ('jax', 'flax', 'optax', 'orbax', 'sweeps', 'experiments'),
  'experiments': ('jax', 'sweeps', 'analysis'),
  'sweeps/grids': ('jax', 'analysis'),
}


def imports(path: pathlib.Path) -> set[str]:
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {node.module or ''} | {f'{node.module}.{alias.name}' for alias in node.names}
  return found


@pytest.mark.parametrize('folder', FORBIDDEN)
def test_imports_go_one_way(folder):
  for path in (ROOT / folder).rglob('*.py'):
    for name in imports(path):
      assert name.split('.')[0] not in FORBIDDEN[folder], f'{path.relative_to(ROOT)} imports {name}'


INNER = {'cell', 'config', 'recipe', 'flops', 'errors', 'faults', 'files', 'schema'}
MATHEMATICS = {'sae', 'losses', 'topk', 'sparse'}
RUN = {'train', 'evaluate', 'optim', 'checkpoint', 'metrics', 'sharding', 'artifact'}


def test_mathematics_imports_nothing_of_the_run():
  for name in MATHEMATICS | INNER:
    for imported in imports(ROOT / 'sae_jax' / f'{name}.py'):
      below = RUN | (MATHEMATICS if name in INNER else set())
      assert imported.removeprefix('sae_jax.') not in below, f'sae_jax/{name}.py imports {imported}'


@pytest.mark.parametrize(
  'module',
  [
    'sae_jax',
    'sae_jax.flops',
    'sae_jax.measures.downstream, sae_jax.measures.paired, sae_jax.measures.results',
    'analysis.report',
    'sweeps.launch',
    'sweeps.status',
    'experiments.demo',
  ],
)
def test_light_modules_do_not_load_jax(module):
  code = f'import sys, {module}; sys.exit("jax" in sys.modules)'
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


HEAVY = {'jax', 'flax', 'optax', 'orbax', 'pandas', 'scipy', 'matplotlib'}
# Commands whose work is done in the file that starts them; the analysis is made of pandas.
LOADED = ('sae_jax/bench', 'analysis/', 'bench/')
HELPED = """
import contextlib, io, runpy, sys
for module in sys.argv[1:]:
  sys.argv = [module, '--help']
  said = io.StringIO()
  try:
    with contextlib.redirect_stdout(said):
      runpy.run_module(module, run_name='__main__')
  except SystemExit as ended:
    assert not ended.code and said.getvalue().startswith('usage:'), module
  loaded = HEAVY & set(sys.modules)
  assert not loaded, f'{module} --help loads {sorted(loaded)}: import in main what loads it'
"""


def commands() -> list[str]:
  """The modules that are started as commands and say what they do before they load what they do it with."""
  found = [path for part in ('sae_jax', 'sweeps', 'analysis', 'bench') for path in (ROOT / part).rglob('*.py')]
  started = [str(path.relative_to(ROOT)) for path in sorted(found) if "if __name__ == '__main__'" in path.read_text()]
  return [path.removesuffix('.py').replace('/', '.') for path in started if not path.startswith(LOADED)]


def test_help_of_a_command_loads_nothing_heavy():
  assert {'sae_jax.train', 'sae_jax.measure', 'sae_jax.data.harvest', 'sweeps.launch', 'sweeps.measure'} <= set(
    commands()
  )
  ran = subprocess.run([sys.executable, '-c', f'HEAVY = {HEAVY}{HELPED}', *commands()], cwd=ROOT, capture_output=True)
  assert not ran.returncode, ran.stderr.decode()


def test_the_loop_has_its_old_name_in_the_command():
  from sae_jax import train, training

  assert (train.train, train.train_group) == (training.train, training.train_group)
  with pytest.raises(AttributeError, match='trian'):
    _ = train.trian


def test_training_loads_no_flax():
  """It would slow every start down: a module is made where an autoencoder is loaded."""
  code = 'import sys, sae_jax.training; sys.exit("flax" in sys.modules)'
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_template_has_no_key_the_dataclasses_lack():
  flat = records.flatten(config.template().to_dict())
  assert set(flat) == set(cell().flat())
  assert {f.name for f in dataclasses.fields(config.Cell)} == {key.split('.')[0] for key in flat}


def test_a_flag_can_unset_a_key():
  asked = ['--config=experiments/tiny.py', '--config.sae.k=None', '--config.sae.activation=relu']
  _, made = flags.parse(argparse.ArgumentParser(), [*asked, '--config.loss.sparsity=0.1'])
  assert config.resolve(made).sae.k is None and made.sae.n_latents == 128
  with pytest.raises(UserError, match=r'relu needs sae\.k or loss\.sparsity, and it is not set'):
    config.resolve(flags.parse(argparse.ArgumentParser(), asked)[1])
