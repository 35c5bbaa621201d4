"""From what a user writes to a cell: a ConfigDict with every default, overrides, and what fills the rest.

`template()` is the only place that holds defaults, and config.json has every value that decides a result. A key left
at None is filled by `resolve`: hyperparameters by the recipe, facts about the data by the activation store. The
dataclasses it builds are those of `sae_jax.cell`, importable from here.
"""

import dataclasses
import importlib.util
import traceback
import types
from typing import Any

import ml_collections
from ml_collections import config_dict

from sae_jax import cell, files, records, schema
from sae_jax.cell import (
  Cell,
  DataConfig,
  EvalConfig,
  LossConfig,
  MeshConfig,
  OptimConfig,
  PlantedConfig,
  SAEConfig,
  TrainConfig,
  from_json,
  from_record,
)
from sae_jax.errors import UserError
from sae_jax.families.family import family
from sae_jax.recipe import GAO2024, ScalingRecipe

__all__ = [
  'Cell',
  'DataConfig',
  'EvalConfig',
  'LossConfig',
  'MeshConfig',
  'OptimConfig',
  'PlantedConfig',
  'SAEConfig',
  'TrainConfig',
  'defaults',
  'flatten',
  'from_json',
  'from_record',
  'of_file',
  'override',
  'read_store_file',
  'resolve',
  'resolve_data',
  'resolve_flat',
  'template',
]


class _Settings(ml_collections.ConfigDict):
  """A ConfigDict in which numpy's numbers are numbers: 2**numpy.arange(8, 12)[0] is no int to ml_collections."""

  def __setitem__(self, key: str, value: Any) -> None:
    if isinstance(value, dict | ml_collections.ConfigDict) and not isinstance(value, _Settings):
      value = _Settings(value)
    super().__setitem__(key, cell.plain(value))


def template() -> ml_collections.ConfigDict:
  """The paper's constants, with None where the recipe or the store decides. Experiments start from this."""
  unset_int, unset_float, unset_str = (
    lambda: config_dict.placeholder(int),
    lambda: config_dict.placeholder(float),
    lambda: config_dict.placeholder(str),
  )
  c = _Settings()
  c.recipe = dataclasses.asdict(GAO2024)
  c.sae = dict(
    d_model=unset_int(),
    n_latents=4096,
    k=32,
    activation='topk',
    k_aux=unset_int(),
    fired_threshold=unset_float(),
    latent_bias=True,
    selection='exact',
    recall_target=0.95,
    multi_weight=0.125,
    levels=4,
    anneal_steps=200,
    bandwidth=0.02,
    rho=0.05,
    weight_decay=1e-4,
  )
  c.loss = dict(
    aux_coefficient=1 / 32,
    dead_tokens=unset_int(),
    sparsity=0.0,
    dead_share=unset_float(),
    steer_start=unset_float(),
  )
  c.optim = dict(
    learning_rate=unset_float(),
    beta1=0.9,
    beta2=0.999,
    eps=6.25e-10,
    clip_norm=0.0,
    warmup_tokens=unset_int(),
    ema_decay=unset_float(),
    ema_width=unset_float(),
  )
  c.train = dict(
    batch_tokens=131_072,
    tokens=1_000_000_000,
    seed=0,
    checkpoint_every=500,
    compute_dtype='float32',
    stop_gain=0.0,
    extends='',
  )
  c.eval = dict(tokens=16_384, per_decade=4, batch_tokens=4096, measures='', measure_windows=16)
  c.data = dict(
    source='store',
    subject=unset_str(),
    site=unset_str(),
    text=unset_str(),
    path='',
    identity=unset_str(),
    seed=0,
    epochs=1,
    normalize=unset_str(),
    window_tokens=unset_int(),
    block_windows=unset_int(),
    store_tokens=unset_int(),
    held_out_tokens=unset_int(),
    dtype=unset_str(),
    positions=unset_str(),
    weights=unset_str(),
    planted=dict(n_features=512, active=8.0, exponent=0.5, noise=0.05, seed=0),
  )
  c.mesh = dict(data=1, latent=1, row_chunks=1, exchange='auto', products='auto')
  return c


def override(config: ml_collections.ConfigDict, flat: dict[str, Any]) -> ml_collections.ConfigDict:
  """A copy with dotted keys replaced. Raises `UserError` for an unknown key or a value of the wrong type."""
  # A plain copy shares placeholders with the original: setting k on the copy would change both.
  config = config.copy_and_resolve_references().lock()
  for key, value in cell.without_retired(flat).items():
    value = cell.plain(value)
    try:
      config.update_from_flattened_dict({key: value})
    except (KeyError, AttributeError):
      section = key.split('.')[0]
      known = ', '.join(sorted(k for k in flatten(config) if k.split('.')[0] == section))
      raise UserError(f'config key {key!r} is not known; {known and f"known keys there: {known}"}') from None
    except (TypeError, ValueError) as error:
      whole = isinstance(value, float) and value.is_integer()
      remedy = f'write {int(value)}' if whole else 'see `template` in sae_jax/config.py'
      raise UserError(f'{key}={value!r} has the wrong type ({error}); {remedy}') from None
  return config


def load_file(path: str, name: str) -> types.ModuleType:
  """The module in a file that the user named, the one dynamic import. Raises `UserError` when it is not Python's."""
  spec = importlib.util.spec_from_file_location(name, path)
  if spec is None or spec.loader is None:
    raise UserError(f'{path} is not a Python file; see experiments/ and sweeps/grids/')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def of_file(module: types.ModuleType) -> ml_collections.ConfigDict:
  """What `get_config()` of an experiment gives. Raises `UserError` with the line that sets what `template` refuses."""
  path = str(module.__file__)
  try:
    made = module.get_config()
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    why = str(error) or type(error).__name__
    raise UserError(
      f'get_config() of {path} fails in line {lines[-1] if lines else "?"}: {why}; '
      'the keys and their types are those of `template` in sae_jax/config.py'
    ) from error
  if not isinstance(made, ml_collections.ConfigDict):
    raise UserError(
      f'get_config() of {path} gives a {type(made).__name__}; return the ConfigDict of config.template() with your changes'
    )
  return made


def defaults(source: str) -> dict[str, Any]:
  """Dotted keys to the values they have when nobody sets them; None where recipe or store decide."""
  return flatten(template()) | (_source_defaults(source) if source != 'store' else {})


def resolve(config: ml_collections.ConfigDict) -> Cell:
  """Fills what was left None, then builds and validates the typed configuration.

  Facts about a store (width, identity, normalisation, subject, …) come from its store.json and must agree with
  whatever the config states. Raises `UserError`.
  """
  return resolve_flat(flatten(config))


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Dotted keys of a configuration to their values."""
  flat = records.flatten(config, ml_collections.ConfigDict)
  return {key: cell.plain(value) for key, value in flat.items()}  # also of a ConfigDict that is not from `template`


def resolve_flat(flat: dict[str, Any]) -> Cell:
  """`resolve` for dotted keys and their values, every key of the template among them."""
  flat = cell.without_retired(flat)
  facts = _store_facts(flat) if flat['data.source'] == 'store' else _source_defaults(flat['data.source'])
  for key, value in facts.items():
    if flat[key] is None:
      flat[key] = value
    elif flat['data.source'] == 'store' and flat[key] != value:
      raise UserError(
        f'{key}={flat[key]!r} but the store at {flat["data.path"]} has {value!r}, and what is in the store is what counts; '
        'drop the key to take the store as it is, or name another store in data.path'
      )
  if flat['sae.d_model'] is None:
    raise UserError('sae.d_model is not set and no store gives it; set it to the width of the activations')
  for key in ('sae.n_latents', 'train.tokens', 'train.batch_tokens'):  # a recipe reckons with them
    if flat[key] is None or isinstance(flat[key], str):
      raise UserError(f'{key}={flat[key]!r} is no whole number; set one')
  recipe = records.build(
    ScalingRecipe, {k.removeprefix('recipe.'): v for k, v in flat.items() if k.startswith('recipe.')}
  )
  derived = recipe.hyperparameters(
    n_latents=max(1, flat['sae.n_latents']),
    d_model=flat['sae.d_model'],
    tokens=flat['train.tokens'],
    batch_tokens=flat['train.batch_tokens'],
  )
  known = family(flat['sae.activation'])
  if not known.auxk:
    derived['sae.k_aux'] = 0
  if not known.penalised:  # a recipe for several families may have one
    derived['loss.steer_start'] = ScalingRecipe.steer_start
  for key, value in derived.items():
    if flat[key] is None:
      flat[key] = value
  return records.build(Cell, records.unflatten(flat))


def resolve_data(config: ml_collections.ConfigDict) -> DataConfig:
  """The data section alone, for a subject that is read. What a harvest needs: there is no autoencoder yet.

  Raises `UserError`.
  """
  given = {key: value for key, value in flatten(config).items() if key.startswith('data.') and value is not None}
  flat = _source_defaults('live') | given | {'data.source': 'live', 'data.identity': ''}
  data = records.build(DataConfig, records.unflatten(flat)['data'])
  cell.check_values(flat)
  return data


def read_store_file(path: str) -> dict[str, Any]:
  """store.json of a finished store. Raises `UserError` when it is missing, broken or was changed.

  Those of early versions have no digest, and only types are checked.
  """
  try:
    meta = schema.parse_large(files.read(files.join(path, schema.STORE), schema.LARGE))
    schema.check_digest(meta)
    fields = schema.STORES if schema.verified(meta) else [f for f in schema.STORES if f.name in meta or f.must]
    settings = {f.name: f for f in schema.STORE_CONFIG}
    if not isinstance(meta.get('identity'), str) or not isinstance(meta.get('config'), dict):
      raise schema.Broken('identity or config is missing')
    stated = schema.STORE_NEUTRAL | meta['config']
    if wrong := sorted(stated.keys() ^ settings.keys()):
      raise schema.Broken(f'config.{wrong[0]} is {"missing" if wrong[0] in settings else "not known"}')
    for field, value in [(f, meta.get(f.name)) for f in fields] + [(f, stated[name]) for name, f in settings.items()]:
      if value is None and field.may and field.name not in settings:
        continue
      if not schema.is_kind(value, field.kind) or (field.must and value < 1):
        raise schema.Broken(f'{field.name}={str(value)[:40]} is not {field.about}')
  except (FileNotFoundError, NotADirectoryError):
    raise UserError(
      f'no finished activation store at {path!r}; set data.path, or run python -m sae_jax.data.harvest'
    ) from None
  except (schema.Broken, IsADirectoryError) as error:
    why = getattr(error, 'strerror', None) or str(error)
    raise UserError(
      f'{path}/{schema.STORE} is not a store description ({why}); copy or harvest the store again'
    ) from None
  return meta


def _store_facts(flat: dict[str, Any]) -> dict[str, Any]:
  meta = read_store_file(flat['data.path'])
  asked, held = flat['train.tokens'], meta['tokens'] * flat['data.epochs']
  if asked > held:
    raise UserError(
      f'train.tokens={asked} but the store holds {meta["tokens"]} tokens x data.epochs={flat["data.epochs"]}; '
      f'lower train.tokens to {held}, raise data.epochs, or harvest more'
    )
  if flat['eval.tokens'] > meta['held_out_tokens']:
    raise UserError(
      f'eval.tokens={flat["eval.tokens"]} but the store holds {meta["held_out_tokens"]} held-out tokens; '
      f'set eval.tokens={meta["held_out_tokens"]}'
    )
  if flat['data.seed'] != meta['config']['seed']:
    raise UserError(
      f'data.seed={flat["data.seed"]} but the store was written in order {meta["config"]["seed"]}; '
      'use that seed or harvest another order'
    )
  facts = {f'data.{key}': value for key, value in (schema.STORE_NEUTRAL | meta['config']).items() if key != 'seed'}
  return facts | {'sae.d_model': meta['d_model'], 'data.identity': meta['identity']}


def _source_defaults(source: str) -> dict[str, Any]:
  common = {
    'data.identity': '',
    'data.subject': '',
    'data.site': '',
    'data.text': '',
    'data.dtype': 'float32',
  } | {f'data.{key}': value for key, value in schema.STORE_NEUTRAL.items()}
  if source == 'planted':
    # Planted inputs have mean norm 1 by construction; centring would bend the planted directions.
    return common | {
      'data.normalize': 'none',
      'data.window_tokens': 2,
      'data.block_windows': 1,
      'data.store_tokens': 1,
      'data.held_out_tokens': 2,
    }
  return common | {
    'data.normalize': 'center_unit',
    'data.window_tokens': 128,
    'data.block_windows': 256,
    'data.store_tokens': 1_000_000,
    'data.held_out_tokens': 16_384,
    'data.dtype': 'float16',
  }
