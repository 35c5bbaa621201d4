"""A cell: the frozen dataclasses that decide one autoencoder, their rules, and a content-hash id.

`sae_jax.config` makes them from what a user writes; the library takes nothing else.
"""

import dataclasses
import functools
import hashlib
import json
import math
import sys
from typing import Any

from sae_jax import records, schema
from sae_jax.errors import UserError
from sae_jax.families.family import family
from sae_jax.measures import names
from sae_jax.recipe import ScalingRecipe
from sae_jax.schema import added

SCHEMA = 1  # of a cell's identity: another number would give every cell another id
# At most so many of the first tokens decide where training starts, see sae_jax.startup. As in the reference code.
SAMPLE_TOKENS = 32_768

# Where and how a cell runs, which does not decide its result.
_NOT_IDENTITY = ('mesh', 'train.checkpoint_every', 'train.extends', 'data.path')
_OUTSIDE_ID = frozenset(('schema', 'id', schema.DIGEST, *_NOT_IDENTITY))
_BELOW_OUTSIDE_ID = tuple(f'{key}.' for key in _NOT_IDENTITY)
# Keys that are gone: the one value that still means what it did, and what to do instead of another.
RETIRED: dict[str, tuple[Any, str]] = {
  'mesh.member': (1, 'start one worker for each part of the devices, as sweeps.launch --workers=N does'),
}


@dataclasses.dataclass(frozen=True)
class SAEConfig:
  d_model: int  # D: width of the activations
  n_latents: int  # F
  # K: active latents a token. None where a penalty decides how many there are, see LossConfig.sparsity.
  k: int | None
  activation: str  # a family, see sae_jax.families.family
  k_aux: int  # dead latents that may reconstruct the residual
  fired_threshold: float  # a latent fired when its value exceeds this, in the scale of the inputs
  latent_bias: bool  # b_enc: in the reference code, not in the paper's equation
  # 'exact' or 'approximate': how training finds each shard's candidates, see topk.approximate.
  selection: str = added('exact')
  # Expected recall of the approximate selection. The exact one ignores it.
  recall_target: float = added(0.95, 'selection', 'approximate')
  # Weight of the reconstruction from 4k latents.
  multi_weight: float = added(0.125, 'activation', 'multitopk')
  # Reconstructions from ever more latents, each from twice as many as the one before.
  levels: int = added(4, 'activation', 'matryoshka')
  # Steps until k latents a token are left of the 4k at the start.
  anneal_steps: int = added(200, 'activation', 'ksparse')
  # Width of the window around a threshold in which pre-activations move it, in the scale of the inputs.
  bandwidth: float = added(0.02, 'activation', 'jumprelu_step', 'jumprelu_tanh')
  # Mean activation that the penalty asks of every latent, and the weight of the squares of the weights.
  rho: float = added(0.05, 'activation', 'cs294a')
  weight_decay: float = added(1e-4, 'activation', 'cs294a')


@dataclasses.dataclass(frozen=True)
class LossConfig:
  aux_coefficient: float  # alpha of AuxK
  dead_tokens: int  # idle for more than this: dead
  # Coefficient of the penalty, in units of the NMSE: what is asked for instead of `sae.k`. 0 where there is none.
  sparsity: float = added(0.0)
  # Idle for more than this share of the steps so far: dead. 0: `dead_tokens` says.
  dead_share: float = added(0.0)
  # Coefficient at the first step, in units of the NMSE, where `sae.k` steers it.
  steer_start: float = added(0.05)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  learning_rate: float
  beta1: float
  beta2: float
  eps: float
  clip_norm: float  # global gradient norm; 0 = off
  warmup_tokens: int
  ema_decay: float
  # Relative width of an average over the last steps so far, see optim.ema_update. 0: `ema_decay` says.
  ema_width: float = added(0.0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  batch_tokens: int  # B
  tokens: int  # the budget; the last partial batch is not trained on
  seed: int  # initialisation only
  checkpoint_every: int  # steps
  compute_dtype: str  # of matmul inputs: 'float32' or 'bfloat16'
  # Ends when a doubling of the tokens lowers the held-out NMSE by less than this share. 0: trains on all tokens.
  stop_gain: float = added(0.0)
  # A finished cell with fewer tokens whose last state is where this one goes on, see sae_jax.extend.
  extends: str = added('')

  @property
  def steps(self) -> int:
    return self.tokens // self.batch_tokens


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  tokens: int  # held-out tokens, never trained on
  per_decade: int  # evaluations per decade of steps, log-spaced
  batch_tokens: int
  measures: str = added('')  # names joined by commas, of what is measured at each evaluation
  measure_windows: int = added(16)  # held-out windows that these look at


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
  identity: (
    str  # content hash of the store; of live, that of a subject's own files; else empty: settings are the identity
  )
  seed: int  # order only
  epochs: int
  # 'center_unit' (the paper's), 'scale' (one scalar, recorded with the store) or 'none'; the NMSE lives in that space.
  normalize: str
  window_tokens: int  # T: tokens of context, the dropped start token included
  block_windows: int  # windows that go through the subject together and whose tokens are shuffled together
  store_tokens: int  # tokens to harvest
  held_out_tokens: int  # tokens to harvest for evaluation
  dtype: str  # of activations on disk
  planted: PlantedConfig
  positions: str = added('drop_first')  # which positions of a window count, see windows.counting
  weights: str = added('float32')  # type of the subject's weights in memory


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  data: int
  latent: int
  # Parts that a device's tokens are encoded in, so that B x n never exists whole. Like the sizes above it changes the
  # order of sums, and so last bits, but not what is computed: it stays out of the id.
  row_chunks: int = added(1)
  exchange: str = added('auto')  # how shards agree on the top k: see topk.exchange; the choice changes no bit
  # Path of the sparse products: the platform's own, or one of sparse.PATHS. 'dense' multiplies in bfloat16, as a TPU
  # does by default wherever it multiplies.
  products: str = added('auto')


_CHOICES = {
  'sae.selection': ('exact', 'approximate'),
  'mesh.exchange': ('auto', 'gather', 'count'),
  'mesh.products': ('auto', 'loops', 'kernels', 'dense'),
  'train.compute_dtype': ('float32', 'bfloat16'),
  'data.source': ('planted', 'store', 'live'),
  'data.normalize': ('center_unit', 'scale', 'none'),
  'data.dtype': ('float32', 'float16'),
  'data.positions': ('drop_first', 'from_3', 'by_norm'),
  'data.weights': ('float32', 'bfloat16'),
}
# Keys that must be at least this.
_AT_LEAST = {
  'sae.d_model': 1,
  'sae.n_latents': 1,
  'sae.k': 1,
  'sae.k_aux': 0,
  'sae.multi_weight': 0,
  'sae.bandwidth': 0,
  'sae.rho': 0,
  'sae.levels': 1,
  'sae.anneal_steps': 1,
  'sae.weight_decay': 0,
  'optim.ema_width': 0,
  'sae.fired_threshold': 0,
  'loss.aux_coefficient': 0,
  'loss.dead_tokens': 1,
  'loss.sparsity': 0,
  'loss.steer_start': 0,
  'optim.learning_rate': 0,
  'optim.clip_norm': 0,
  'optim.warmup_tokens': 0,
  'optim.eps': 0,
  'train.batch_tokens': 1,
  'train.tokens': 1,
  'train.seed': 0,
  'train.checkpoint_every': 1,
  'eval.tokens': 2,
  'eval.per_decade': 1,
  'eval.measure_windows': 2,
  'eval.batch_tokens': 1,
  'data.seed': 0,
  'data.epochs': 1,
  'data.window_tokens': 2,
  'data.block_windows': 1,
  'data.store_tokens': 1,
  'data.held_out_tokens': 2,
  'mesh.data': 1,
  'mesh.latent': 1,
  'mesh.row_chunks': 1,
  'data.planted.n_features': 1,
  'data.planted.noise': 0,
}
_BELOW_ONE = ('train.stop_gain', 'optim.beta1', 'optim.beta2', 'optim.ema_decay', 'loss.dead_share')


@dataclasses.dataclass(frozen=True)
class Cell:
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
    check_values(flat)
    for key, below in (('sae.bandwidth', 1), ('sae.rho', 1), ('loss.steer_start', 1), ('optim.ema_width', 0.28)):
      if flat[key] >= below or (flat[key] == 0 and key != 'optim.ema_width'):
        raise UserError(f'{key}={flat[key]} is not between 0 and {below}; choose one in between')
    if not 0 < self.sae.recall_target < 1:
      raise UserError(f"sae.recall_target={self.sae.recall_target} is not in (0, 1); for 1 use sae.selection='exact'")
    self._check_family()
    self._check_measures()
    if self.train.stop_gain and not self.one_curve:
      raise UserError(
        f'train.stop_gain={self.train.stop_gain} but averages follow the budget and feign convergence; set recipe.horizon='
        "'so far'"
      )
    n, k = self.sae.n_latents, self.sae.k
    if k is not None and k > n:
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
      raise UserError(f'train.tokens={self.train.tokens} is less than one batch of {self.train.batch_tokens}; raise it')

  def _check_measures(self) -> None:
    asked = self.eval.measures
    if asked and (unknown := [name for name in asked.split(',') if name not in names.VERSIONS]):
      raise UserError(f'eval.measures={asked!r}: no measure {unknown[0]!r}; use some of {", ".join(names.VERSIONS)}')
    if asked and not self.data.subject:
      raise UserError(f'eval.measures={asked!r} but activations of no language model are trained on; drop it')

  def _check_family(self) -> None:
    name, k, sparsity = self.sae.activation, self.sae.k, self.loss.sparsity
    known = family(name)
    if sparsity and not known.penalised:
      raise UserError(f'loss.sparsity={sparsity} but {name} has no penalty; drop it and set sae.k')
    if self.loss.steer_start != LossConfig.steer_start and not known.penalised:
      raise UserError(f'loss.steer_start={self.loss.steer_start} but {name} has no penalty; drop it')
    if k is not None and not known.steered:
      raise UserError(f'sae.k={k} but all latents of {name} are active; set sae.k=None and loss.sparsity')
    if k is not None and sparsity:
      raise UserError(
        f'sae.k={k} and loss.sparsity={sparsity}: the first steers the coefficient and the second fixes it; drop one (sae.k=None)'
      )
    if k is None and not sparsity:
      needed = ' or '.join(['sae.k'] * known.steered + ['loss.sparsity'] * known.penalised)
      raise UserError(f'{name} needs {needed}, and it is not set; set it')
    if self.sae.k_aux and not known.auxk:
      raise UserError(f'sae.k_aux={self.sae.k_aux} but {name} has no AuxK; set it to 0')
    if self.sae.selection != 'exact' and known.penalised:
      raise UserError(f"sae.selection={self.sae.selection!r} but {name} selects nothing; use 'exact'")
    for field in dataclasses.fields(self.sae):
      owner, *of = field.metadata.get('of') or ('',)
      value = getattr(self.sae, field.name)
      if owner == 'activation' and name not in of and value != field.default:
        raise UserError(f'sae.{field.name}={value} is of {" and ".join(of)}, and sae.activation={name!r}; drop it')
      n = self.sae.n_latents
      # The power of a number that is far too large would be a number of thousands of digits.
      parts = 2 ** (min(value, n.bit_length() + 1) - 1) if field.name == 'levels' and name in of else 1
      if n % parts:
        raise UserError(
          f'sae.n_latents={n} is not divisible by {parts}, as sae.levels={value} want; use fewer levels or another number '
          'of latents'
        )

  def flat(self) -> dict[str, Any]:
    """Dotted keys to values, in declaration order."""
    flat: dict[str, Any] = {}
    records.flat_into(flat, self, '')
    return flat

  def identity(self) -> dict[str, Any]:
    """Dotted keys and values of what decides the result."""
    return identity_of(records.record_of(self))

  @property
  def one_curve(self) -> bool:
    """Whether no horizon depends on the budget.

    The curve of a long run then passes through the ends of shorter ones of at least `SAMPLE_TOKENS`. Under
    `recipe.horizon='so far'` no horizon does: what a user sets instead is a number of steps or tokens.
    """
    return self.recipe.horizon == 'so far' or (self.optim.ema_width > 0 and self.loss.dead_share > 0)

  @functools.cached_property
  def id(self) -> str:
    """First 12 hex digits of the SHA-256 of what decides the result."""
    return id_of(records.record_of(self))

  @property
  def state_is_split(self) -> bool:
    """Whether parameters at rest, gradients, moments and EMA are sharded over the data axis too."""
    return self.mesh.data > 1 and self.sae.n_latents % (self.mesh.data * self.mesh.latent) == 0

  @functools.cached_property
  def group_key(self) -> str:
    """Equal for cells that can train together: same activations in the same batches, on the same devices."""
    shared = {
      key: value
      for key, value in self.flat().items()
      if key.startswith(('data.', 'mesh.')) or key in ('sae.d_model', 'train.batch_tokens', 'train.tokens')
    }
    return json.dumps(shared, sort_keys=True, allow_nan=False)

  def to_record(self) -> dict[str, Any]:
    """What config.json holds."""
    return schema.seal({'schema': SCHEMA, 'id': self.id} | records.record_of(self))

  def to_json(self) -> bytes:
    return schema.dump_sealed(self.to_record())


def check_values(flat: dict[str, Any]) -> None:
  """Raises `UserError` for a value outside its own rule. Of sections that are not there nothing is asked."""
  for key, value in flat.items():
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f'{key}={value} is not finite; give a finite number')
    if key in _CHOICES and value not in _CHOICES[key]:
      raise UserError(f'{key}={value!r} is not known; use one of {", ".join(_CHOICES[key])}')
    if key in _AT_LEAST and value is not None and value < _AT_LEAST[key]:
      raise UserError(f'{key}={value} is below {_AT_LEAST[key]}; raise it')
    if key in _BELOW_ONE and not 0 <= value < 1:
      raise UserError(f'{key}={value} is not in [0, 1); choose a smaller one of at least 0')
  if flat['data.normalize'] == 'scale' and flat['data.source'] != 'store':
    raise UserError(
      f"data.normalize='scale' but data.source={flat['data.source']!r} records no scalar; use center_unit or none, or "
      'import a store with --normalize=scale'
    )


def log_spaced(steps: int, per_decade: int) -> set[int]:
  """Steps to evaluate at: about `per_decade` a decade, and the last, so that one run is a whole loss curve."""
  count = math.ceil(math.log10(steps) * per_decade) if steps > 1 else 0
  return {round(10 ** (i / per_decade)) for i in range(count)} | {steps}


def plain(value: Any) -> Any:
  """A number or truth value of numpy, or an array that holds one, as Python's own; anything else as it is."""
  numpy = sys.modules.get('numpy')  # where nothing has loaded it no value is of it, and commands start sooner
  if numpy is None or not isinstance(value, numpy.generic | numpy.ndarray) or value.ndim:
    return value
  kind = value.dtype.kind
  return bool(value) if kind == 'b' else int(value) if kind in 'iu' else float(value) if kind == 'f' else value.item()


def id_of(record: dict[str, Any]) -> str:
  """The id of a configuration by its record alone: what config.json should say of itself."""
  text = json.dumps({'schema': SCHEMA} | identity_of(record), sort_keys=True, allow_nan=False)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def identity_of(record: dict[str, Any]) -> dict[str, Any]:
  """Dotted keys and values of a record that decide the result."""
  return {
    key: value
    for key, value in records.flatten(record).items()
    if key not in _OUTSIDE_ID and not key.startswith(_BELOW_OUTSIDE_ID)
  }


def from_json(data: bytes) -> Cell:
  """Inverse of `Cell.to_json`. Raises `UserError` when the record is broken, foreign or was edited."""
  try:
    return from_record(schema.parse(data))
  except schema.Broken as error:
    raise UserError(f'not a cell configuration: {error}; was it edited by hand?') from None


def from_record(record: dict[str, Any], *, verified: bool = False) -> Cell:
  """The configuration of a parsed config.json. Raises `UserError` when it is foreign or was edited.

  `verified` says that the digest of a larger record covers it, so that its own is not computed too.
  """
  try:
    if not verified:
      schema.check_digest(record)
    own = {key: value for key, value in record.items() if key not in ('schema', 'id', schema.DIGEST)}
    number, recorded_id = record['schema'], record['id']
    flat = records.flatten(own)
    config = records.build(Cell, own if RETIRED.keys().isdisjoint(flat) else records.unflatten(without_retired(flat)))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'not a cell configuration ({type(error).__name__}: {error}); was it edited by hand?') from None
  if number != SCHEMA:
    raise UserError(f'configuration schema {number} is not {SCHEMA}; use the version of sae_jax that wrote it')
  if config.id != recorded_id:
    raise UserError(f'configuration hashes to {config.id} but says {recorded_id}; it was changed: make a new cell')
  return config


def without_retired(flat: dict[str, Any]) -> dict[str, Any]:
  """The keys that are left of a configuration of any version. Raises `UserError` for a retired key in use."""
  for key, value in flat.items():
    if key in RETIRED and value != RETIRED[key][0]:
      neutral, instead = RETIRED[key]
      raise UserError(f'{key}={value!r}: this key is gone and only {neutral!r} is accepted; {instead}')
  return {key: value for key, value in flat.items() if key not in RETIRED}
