"""One autoencoder's configuration: ConfigDict at the edge, frozen dataclasses inside, a content-hash id.

`template()` is the only place that holds defaults and every one of them is written into config.json. A key left
at None is filled by `resolve`: hyperparameters by the recipe, facts about the data by the activation store.
"""

import dataclasses
import hashlib
import json
import math
from typing import Any, TypeVar

import ml_collections
from ml_collections import config_dict

from sae_jax import files
from sae_jax.errors import UserError
from sae_jax.recipe import GAO2024, ScalingRecipe

T = TypeVar('T')

SCHEMA = 1
STORE_FILE = 'store.json'  # provenance and statistics of an activation store

# Where and how a cell runs, which does not decide its result.
_NOT_IDENTITY = ('mesh', 'train.checkpoint_every', 'data.path')


@dataclasses.dataclass(frozen=True)
class SAEConfig:
  d_model: int  # D: width of the activations
  n_latents: int  # F
  k: int  # K: active latents a token
  activation: str  # 'topk'
  k_aux: int  # dead latents that may reconstruct the residual
  fired_threshold: float  # a latent fired when its value exceeds this, in the scale of the inputs
  latent_bias: bool  # b_enc: in the reference code, not in the paper's equation


@dataclasses.dataclass(frozen=True)
class LossConfig:
  aux_coefficient: float  # alpha of AuxK
  dead_tokens: int  # idle for more than this: dead


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  learning_rate: float
  beta1: float
  beta2: float
  eps: float
  clip_norm: float  # global gradient norm; 0 = off
  warmup_tokens: int
  ema_decay: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  batch_tokens: int  # B
  tokens: int  # the budget; the last partial batch is not trained on
  seed: int  # initialisation only
  checkpoint_every: int  # steps
  compute_dtype: str  # of matmul inputs: 'float32' or 'bfloat16'

  @property
  def steps(self) -> int:
    return self.tokens // self.batch_tokens


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  tokens: int  # held-out tokens, never trained on
  per_decade: int  # evaluations per decade of steps, log-spaced
  batch_tokens: int


@dataclasses.dataclass(frozen=True)
class PlantedConfig:
  n_features: int
  active: float  # mean number of active features a token
  exponent: float  # feature i fires at a rate proportional to (i+1)^-exponent
  noise: float  # standard deviation of the noise relative to the signal's
  seed: int  # of the dictionary itself


@dataclasses.dataclass(frozen=True)
class DataConfig:
  source: str  # 'planted', 'store' or 'live'
  subject: str  # language model, e.g. 'smollm2-135m'
  site: str  # where in it, e.g. 'resid_post.12'
  text: str  # corpus, e.g. 'sotu'
  path: str  # of the store
  identity: str  # content hash of the store; empty for planted and live, whose settings are their identity
  seed: int  # order only
  epochs: int
  normalize: str  # 'center_unit' (the paper's) or 'none'; the NMSE lives in that space
  window_tokens: int  # T: tokens of context, the dropped start token included
  block_windows: int  # windows that go through the subject together and whose tokens are shuffled together
  store_tokens: int  # tokens to harvest
  held_out_tokens: int  # tokens to harvest for evaluation
  dtype: str  # of activations on disk
  planted: PlantedConfig


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  data: int
  latent: int
  member: int = 1  # parts of the devices that the cells of a group are dealt out over
  # Parts that a device's tokens are encoded in, so that B x n never exists whole. Like the sizes above it changes the
  # order of sums, and so last bits, but not what is computed: it stays out of the id.
  row_chunks: int = 1
  exchange: str = 'auto'  # how shards agree on the top k: see topk.exchange; the choice changes no bit


_CHOICES = {
  'sae.activation': ('topk',),
  'mesh.exchange': ('auto', 'gather', 'count'),
  'train.compute_dtype': ('float32', 'bfloat16'),
  'data.source': ('planted', 'store', 'live'),
  'data.normalize': ('center_unit', 'none'),
  'data.dtype': ('float32', 'float16'),
}
# Keys that must be at least this.
_AT_LEAST = {
  'sae.d_model': 1, 'sae.n_latents': 1, 'sae.k': 1, 'sae.k_aux': 0, 'sae.fired_threshold': 0,
  'loss.aux_coefficient': 0, 'loss.dead_tokens': 1,
  'optim.learning_rate': 0, 'optim.clip_norm': 0, 'optim.warmup_tokens': 0, 'optim.eps': 0,
  'train.batch_tokens': 1, 'train.tokens': 1, 'train.seed': 0, 'train.checkpoint_every': 1,
  'eval.tokens': 2, 'eval.per_decade': 1, 'eval.batch_tokens': 1,
  'data.seed': 0, 'data.epochs': 1, 'data.window_tokens': 2, 'data.block_windows': 1,
  'data.store_tokens': 1, 'data.held_out_tokens': 2, 'mesh.data': 1, 'mesh.latent': 1, 'mesh.member': 1,
  'mesh.row_chunks': 1,
  'data.planted.n_features': 1, 'data.planted.noise': 0,
}  # fmt: skip
_BELOW_ONE = ('optim.beta1', 'optim.beta2', 'optim.ema_decay')


@dataclasses.dataclass(frozen=True)
class Config:
  """A cell: everything that decides one autoencoder, and where it runs.

  Raises `UserError` for a value outside its rule.
  """

  recipe: ScalingRecipe
  sae: SAEConfig
  loss: LossConfig
  optim: OptimConfig
  train: TrainConfig
  eval: EvalConfig
  data: DataConfig
  mesh: MeshConfig

  def __post_init__(self) -> None:
    flat = self.flat()
    for key, value in flat.items():
      if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{key}={value} is not finite; give a finite number')
    for key, choices in _CHOICES.items():
      if flat[key] not in choices:
        raise UserError(f'{key}={flat[key]!r} is not known; use one of {", ".join(choices)}')
    for key, least in _AT_LEAST.items():
      if flat[key] < least:
        raise UserError(f'{key}={flat[key]} is below {least}; raise it')
    for key in _BELOW_ONE:
      if not 0 <= flat[key] < 1:
        raise UserError(f'{key}={flat[key]} is not in [0, 1); choose a decay below 1')
    n, k = self.sae.n_latents, self.sae.k
    if k > n:
      raise UserError(f'sae.k={k} exceeds sae.n_latents={n}; lower k or raise n_latents')
    if self.sae.k_aux > n:
      raise UserError(f'sae.k_aux={self.sae.k_aux} exceeds sae.n_latents={n}; lower k_aux')
    if n % self.mesh.latent:
      raise UserError(
        f'sae.n_latents={n} is not divisible by mesh.latent={self.mesh.latent}; '
        f'use {n // self.mesh.latent * self.mesh.latent or self.mesh.latent} latents or another mesh'
      )
    for key in ('train.batch_tokens', 'eval.batch_tokens'):
      if flat[key] % self.mesh.data:
        down = flat[key] // self.mesh.data * self.mesh.data
        raise UserError(
          f'{key}={flat[key]} is not divisible by mesh.data={self.mesh.data}; '
          f'use {down or self.mesh.data} or {down + self.mesh.data}'
        )
    rows = self.train.batch_tokens // self.mesh.data
    if rows % self.mesh.row_chunks:
      raise UserError(
        f'mesh.row_chunks={self.mesh.row_chunks} does not divide the {rows} tokens of a device '
        '(train.batch_tokens / mesh.data); use a divisor'
      )
    if self.train.tokens < self.train.batch_tokens:
      raise UserError(
        f'train.tokens={self.train.tokens} is less than one batch of {self.train.batch_tokens}; raise it'
      )

  def flat(self) -> dict[str, Any]:
    """Dotted keys to values, in declaration order."""
    return _flatten(dataclasses.asdict(self))

  @property
  def id(self) -> str:
    """First 12 hex digits of the SHA-256 of what decides the result."""
    identity = {'schema': SCHEMA} | {
      key: value
      for key, value in self.flat().items()
      if not any(key == out or key.startswith(out + '.') for out in _NOT_IDENTITY)
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True, allow_nan=False).encode()).hexdigest()[:12]

  @property
  def state_is_split(self) -> bool:
    """Whether parameters at rest, gradients, moments and EMA are sharded over the data axis too."""
    return self.mesh.data > 1 and self.sae.n_latents % (self.mesh.data * self.mesh.latent) == 0

  @property
  def stream(self) -> str:
    """Equal for cells that can train together: same activations in the same batches, on the same devices."""
    shared = {
      key: value
      for key, value in self.flat().items()
      if key.startswith(('data.', 'mesh.')) or key in ('sae.d_model', 'train.batch_tokens', 'train.tokens')
    }
    return json.dumps(shared, sort_keys=True, allow_nan=False)

  def to_json(self) -> bytes:
    record = {'schema': SCHEMA, 'id': self.id} | dataclasses.asdict(self)
    return json.dumps(record, indent=1, allow_nan=False).encode() + b'\n'


def from_json(data: bytes) -> Config:
  """Inverse of `Config.to_json`. Raises `UserError` when the record is broken, foreign or was edited."""
  try:
    record = json.loads(data)
    schema, recorded_id = record.pop('schema'), record.pop('id')
    record['mesh'] = template().mesh.to_dict() | record['mesh']  # where it ran may predate a key
    config = _build(Config, record)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(
      f'not a cell configuration ({type(error).__name__}: {error}); was it edited by hand?'
    ) from None
  if schema != SCHEMA:
    raise UserError(
      f'configuration schema {schema} is not {SCHEMA}; use the version of sae_jax that wrote it'
    )
  if config.id != recorded_id:
    raise UserError(
      f'configuration hashes to {config.id} but says {recorded_id}; it was changed: make a new cell'
    )
  return config


def template() -> ml_collections.ConfigDict:
  """The paper's constants, with None where the recipe or the store decides. Experiments start from this."""
  unset_int, unset_float, unset_str = (
    lambda: config_dict.placeholder(int),
    lambda: config_dict.placeholder(float),
    lambda: config_dict.placeholder(str),
  )
  c = ml_collections.ConfigDict()
  c.recipe = dataclasses.asdict(GAO2024)
  c.sae = dict(
    d_model=unset_int(), n_latents=4096, k=32, activation='topk', k_aux=unset_int(),
    fired_threshold=unset_float(), latent_bias=True,
  )  # fmt: skip
  c.loss = dict(aux_coefficient=1 / 32, dead_tokens=unset_int())
  c.optim = dict(
    learning_rate=unset_float(), beta1=0.9, beta2=0.999, eps=6.25e-10, clip_norm=0.0,
    warmup_tokens=unset_int(), ema_decay=unset_float(),
  )  # fmt: skip
  c.train = dict(
    batch_tokens=131_072, tokens=1_000_000_000, seed=0, checkpoint_every=500, compute_dtype='float32'
  )
  c.eval = dict(tokens=16_384, per_decade=4, batch_tokens=4096)
  c.data = dict(
    source='store', subject=unset_str(), site=unset_str(), text=unset_str(), path='', identity=unset_str(),
    seed=0, epochs=1, normalize=unset_str(), window_tokens=unset_int(), block_windows=unset_int(),
    store_tokens=unset_int(), held_out_tokens=unset_int(), dtype=unset_str(),
    planted=dict(n_features=512, active=8.0, exponent=0.5, noise=0.05, seed=0),
  )  # fmt: skip
  c.mesh = dict(data=1, latent=1, member=1, row_chunks=1, exchange='auto')
  return c


def override(config: ml_collections.ConfigDict, flat: dict[str, Any]) -> ml_collections.ConfigDict:
  """A copy with dotted keys replaced. Raises `UserError` for an unknown key or a value of the wrong type."""
  # A plain copy shares placeholders with the original: setting k on the copy would change both.
  config = config.copy_and_resolve_references().lock()
  for key, value in flat.items():
    try:
      config.update_from_flattened_dict({key: value})
    except (KeyError, AttributeError):
      known = ', '.join(sorted(k for k in _flatten(config.to_dict()) if k.split('.')[0] == key.split('.')[0]))
      raise UserError(f'config key {key!r} is not known; {known and f"known keys there: {known}"}') from None
    except (TypeError, ValueError) as error:
      raise UserError(
        f'{key}={value!r} has the wrong type ({error}); see `template` in sae_jax/config.py'
      ) from None
  return config


def resolve(config: ml_collections.ConfigDict) -> Config:
  """Fills what was left None, then builds and validates the typed configuration.

  Facts about a store (width, identity, normalisation, subject, …) come from its store.json and must agree with
  whatever the config states. Raises `UserError`.
  """
  flat = _flatten(config.to_dict())
  facts = _store_facts(flat) if flat['data.source'] == 'store' else _source_defaults(flat['data.source'])
  for key, value in facts.items():
    if flat[key] is None:
      flat[key] = value
    elif flat['data.source'] == 'store' and flat[key] != value:
      raise UserError(
        f'{key}={flat[key]!r} but the store at {flat["data.path"]} has {value!r}; '
        'drop the key to take the store as it is, or name another store'
      )
  if flat['sae.d_model'] is None:
    raise UserError('sae.d_model is not set and no store gives it; set it to the width of the activations')
  recipe = _build(
    ScalingRecipe, {k.removeprefix('recipe.'): v for k, v in flat.items() if k.startswith('recipe.')}
  )
  derived = recipe.hyperparameters(
    n_latents=max(1, flat['sae.n_latents']),
    k=flat['sae.k'],
    d_model=flat['sae.d_model'],
    tokens=flat['train.tokens'],
    batch_tokens=flat['train.batch_tokens'],
  )
  for key, value in derived.items():
    if flat[key] is None:
      flat[key] = value
  return _build(Config, _unflatten(flat))


def read_store_file(path: str) -> dict[str, Any]:
  """store.json of a finished store. Raises `UserError` when it is missing or broken."""
  try:
    meta = json.loads(files.read(files.join(path, STORE_FILE)))
    meta['identity'], meta['d_model'], meta['tokens'], meta['config']
  except FileNotFoundError:
    raise UserError(
      f'no finished activation store at {path!r}; set data.path, or run python -m sae_jax.data.harvest'
    ) from None
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path}/{STORE_FILE} is not a store description ({error}); harvest it again') from None
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
  facts = {f'data.{key}': value for key, value in meta['config'].items() if key != 'seed'}
  return facts | {'sae.d_model': meta['d_model'], 'data.identity': meta['identity']}


def _source_defaults(source: str) -> dict[str, Any]:
  common = {
    'data.identity': '',
    'data.subject': '',
    'data.site': '',
    'data.text': '',
    'data.dtype': 'float32',
  }
  if source == 'planted':
    # Planted inputs have mean norm 1 by construction; centring would bend the planted directions.
    return common | {
      'data.normalize': 'none', 'data.window_tokens': 2, 'data.block_windows': 1,
      'data.store_tokens': 1, 'data.held_out_tokens': 2,
    }  # fmt: skip
  return common | {
    'data.normalize': 'center_unit', 'data.window_tokens': 128, 'data.block_windows': 256,
    'data.store_tokens': 1_000_000, 'data.held_out_tokens': 16_384, 'data.dtype': 'float16',
  }  # fmt: skip


def _flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    flat |= _flatten(value, f'{prefix}{key}.') if isinstance(value, dict) else {prefix + key: value}
  return flat


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for key, value in flat.items():
    *parents, leaf = key.split('.')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = value
  return tree


def _build(cls: type[T], record: dict[str, Any]) -> T:
  fields = {f.name: f for f in dataclasses.fields(cls)}
  if set(record) != set(fields):
    wrong = ', '.join(sorted(set(record) ^ set(fields)))
    raise UserError(f'{cls.__name__} and the configuration differ in: {wrong}; start from config.template()')
  values = {}
  for name, value in record.items():
    kind = fields[name].type
    if dataclasses.is_dataclass(kind):
      value = _build(kind, value)
    elif kind is float and type(value) is int:
      value = float(value)
    elif type(value) is not kind:
      raise UserError(f'{cls.__name__}.{name}={value!r} is not of type {kind.__name__}; correct it')
    values[name] = value
  return cls(**values)
