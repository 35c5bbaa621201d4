"""Every name in every file that a run leaves behind: its type, its meaning, whether it must be there. Plain Python.

Trainers write by these tables, and status, report and notebooks read by them. config.json is the one file with a module
of its own, `sae_jax.cell`. Records carry a `schema` number. One without a number is from before there were numbers.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable
from typing import Any

SCHEMA = 1  # of every record below; a reader refuses a higher one

# What can be said of a cell, in the order in which a person wants to see it.
RUNNING, FAILED, INVALID, CANCELLED, WAITING, IMPORTED, DONE = STATES = (
  'running',  # someone holds its lease
  'failed',  # for good: the error is permanent, or all attempts are used
  'invalid',  # a file of it cannot be believed; python -m sweeps.retry sets it aside
  'cancelled',  # python -m sweeps.cancel --undo takes it up again
  'waiting',  # to be trained, or to be trained on
  'imported',  # an autoencoder from elsewhere: it can be loaded and measured, and has no training record
  'done',  # it has a sound result.json
)
UNFINISHED = (RUNNING, WAITING)  # what a sweep still has to do something about
FINISHED = (DONE, IMPORTED)  # what has an autoencoder

# Files and folders of a cell.
CONFIG, METRICS, RESULT, FAILURE = 'config.json', 'metrics.jsonl', 'result.json', 'failure.json'
CHECKPOINTS, CLAIMS, CANCEL, CORRUPT = 'ckpt', 'claims', 'cancel.json', 'corrupt'
ARTIFACT, ARTIFACT_INFO = 'sae', 'sae.json'
MEASURES, MEASURES_INFO = 'measures', 'measures.json'
# Of a ledger, and of an activation store.
SWEEP, CELLS, STORE = 'sweep.json', 'cells', 'store.json'

DIGEST = 'digest'  # last key of a sealed record
SMALL = 2**22  # bytes of a record; more is refused unread
LARGE = 2**30  # of one that grows with a sweep, a store or a run
_DEEP = 32  # levels of nesting that no record comes near
_WHOLE = 2**63  # whole numbers of a record stay below: beyond, neither arrays nor floats hold them


class Broken(ValueError):
  """A record that cannot be believed. The message is a short line that says why."""


@dataclasses.dataclass(frozen=True)
class Field:
  """One name of a record.

  Attributes:
    name: in the file, and the column of tables.
    kind: type of its JSON value; float takes whole numbers too.
    about: meaning and unit.
    line: its name in a line of metrics.jsonl, where it has one.
    must: a record without it, or where it is not above 0, is of no use whatever its age.
    may: it may be missing or null; null alone where it is a must.
  """

  name: str
  kind: type
  about: str
  line: str = ''
  must: bool = False
  may: bool = False


# What is measured while a cell trains. Those named eval/ or train/ in a line have plain names in results and tables.
MEASURED = (
  Field('tokens', int, 'tokens seen', 'tokens', must=True),
  Field('flops_useful', float, 'training FLOPs of the sparse algorithm so far', 'flops_useful', must=True),
  Field('flops_dense', float, 'training FLOPs of a dense implementation so far', 'flops_dense', must=True),
  Field('flops_subject', float, "the subject's forward FLOPs for these tokens", 'flops_subject'),
  Field('wall_s', float, 'seconds of training, all attempts', 'wall_s'),
  Field('nmse', float, 'held-out NMSE of the better weights', 'eval/nmse', must=True),
  Field('nmse_raw', float, 'of the raw weights', 'eval/nmse_raw'),
  Field('nmse_ema', float, 'of the averaged weights', 'eval/nmse_ema'),
  Field('weights', str, "which are better: 'raw' or 'ema'", 'eval/weights'),
  Field('mse', float, 'mean squared error a component, of the better weights', 'eval/mse'),
  Field('l0', float, 'mean number of active latents a token', 'eval/l0'),
  Field(
    'topk_recall',
    float,
    'share of the exact top k that training finds; approximate selection alone',
    'eval/topk_recall',
    may=True,
  ),
  Field('dead_fraction', float, 'share of latents idle for longer than the threshold', 'sae/dead_fraction'),
)
# What only a line of metrics.jsonl has.
STEP = Field('step', int, 'training steps done', 'step')
TRAINING = (
  Field(
    'train_loss', float, 'NMSE, AuxK and penalty of the step by their weights, without further heads', 'train/loss'
  ),
  Field('train_nmse', float, 'NMSE of the batch, about the start-up mean', 'train/nmse'),
  Field('train_aux_loss', float, 'AuxK loss of the batch', 'train/aux_loss'),
  Field('train_l0', float, 'active latents a token of the batch', 'train/l0'),
  Field('train_coefficient', float, 'of the penalty; where it is steered alone', 'train/coefficient', may=True),
  Field(
    'train_penalty',
    float,
    'penalty of the batch before its coefficient; penalised families alone',
    'train/penalty',
    may=True,
  ),
)
CURVES = (STEP, *MEASURED, *TRAINING)  # the columns of a curve

_SIZES = (
  Field('n_latents', int, 'F', must=True),
  Field('k', int, 'active latents a token asked for; null where a penalty decides', must=True, may=True),
  Field('d_model', int, 'D', must=True),
  Field('activation', str, 'family of the autoencoder'),
)
RESULTS = (
  Field('id', str, 'content hash of the configuration; the folder is named by it'),
  *_SIZES,
  *MEASURED,
  Field('seed', int, 'of the initialisation'),
  Field('learning_rate', float, 'peak', must=True),
  Field('batch_tokens', int, 'tokens a step', must=True),
  Field('steps', int, 'training steps', must=True),
  Field('tokens_asked', int, 'the budget; the last partial batch is not trained on'),
  Field('aux_steps', int, 'steps in which a latent was dead'),
  Field('params_digest', str, 'SHA-256 of the raw parameters in blocks, whatever the mesh'),
  Field('bit_exact', bool, 'whether every attempt ran under the same facts as the first'),
  Field('device_kind', str, 'of the last attempt'),
  Field('n_devices', int, 'of the last attempt'),
  Field('n_cores', int, 'that the last attempt could use; cpu devices alone', may=True),
  Field('cpu', str, 'hash of its model and instruction set; cpu devices alone', may=True),
  Field('mesh', list, '[data, latent] of the last attempt'),
  Field('versions', dict, 'of what decides the bits'),
  Field('git_commit', str, "of the checkout, '+' when changed, empty outside one"),
  Field(
    'artifact_sha256',
    str,
    'of sae.json, which has those of the tensor files; early results lack it',
    may=True,
  ),
  Field('extends', dict, 'cell and step whose state this one went on from', may=True),
  Field('not_extended', str, 'why it was trained from the start, and train.extends names a cell', may=True),
  Field('artifact_bytes', dict, 'of the files in sae/, by name; early results lack it', may=True),
)
ARTIFACTS = (
  Field('id', str, 'of the cell, or a name for an imported autoencoder'),
  *_SIZES,
  Field('weights', str, 'the better on held-out tokens'),
  Field('subject', str, 'language model'),
  Field('site', str, 'where in it'),
  Field('normalize', str, 'what inputs go through before encoding'),
  Field('scale', float, "what inputs are multiplied by; normalize='scale' alone", may=True),
  Field('identity', str, 'content hash of the store, empty without one'),
  Field('sha256', dict, 'of the tensor files, by the name of the weights'),
  Field('imported_from', str, 'format it was converted from; missing in what was trained here', may=True),
  Field('activations_from', list, 'files of imported activations that it was trained on', may=True),
)
FAILURES = (
  Field('error', str, 'message, one line'),
  Field('kind', str, 'type of the exception'),
  Field('traceback', str, 'its end'),
  Field('attempts', int, 'that failed, this one included', must=True),
  Field('permanent', bool, 'whether another attempt cannot help'),
  Field('exit_code', int, 'of a process that ended without an exception', may=True),
  Field('host', str, 'where'),
  Field('time', str, 'when, ISO 8601 UTC'),
)
CLAIM = (
  Field('pid', int, 'of the holder'),
  Field('started', int, 'its start in clock ticks since boot, which tells a reused pid apart'),
  Field('pid_space', str, 'boot and namespace in which the pid means something; empty when unknown'),
  Field('host', str, 'name of its machine'),
  Field('nonce', str, 'of this lease alone'),
  Field('refreshed', int, 'times since it was taken'),
  Field('released', bool, 'whether the holder let go'),
)
# What is saved beside the arrays of a checkpoint, and in it the facts under which a cell was trained so far.
CHECKPOINT = (
  Field('cell', str, 'whose state it is'),
  Field('digests', dict, 'of the arrays, by path'),
  Field('facts', dict, 'how the steps up to here were made'),
)
FACTS = (
  Field('mesh', list, '[data, latent]'),
  Field('row_chunks', int, 'parts in which a device encodes its tokens; 1 where missing', may=True),
  Field('products', str, "path of the sparse products; 'auto' where missing", may=True),
  Field('device_kind', str, 'name of the devices', may=True),
  Field('n_cores', int, 'that the process could use; cpu devices alone', may=True),
  Field('cpu', str, 'hash of model and instruction set; cpu devices alone', may=True),
  Field('versions', dict, 'of what decides the bits'),
  Field('bit_exact', bool, 'whether all of it was the same from the first step on'),
  Field('wall_s', float, 'seconds of training so far'),
  Field('extends', dict, 'cell and step whose state this one went on from', may=True),
  Field('not_extended', str, 'why it was trained from the start, and train.extends names a cell', may=True),
  Field('curve', list, 'steps, held-out NMSE and L0 so far; where convergence ends the run', may=True),
  Field('last', dict, 'metrics of the last step; of runs that can be extended', may=True),
  Field('measure_s', float, 'seconds of measures so far, which wall_s leaves out', may=True),
)
# measures.json: {'values': {'<measure>/<value>': MEASURE_VALUE}}.
MEASURE_VALUE = (
  Field('value', float, 'what was measured'),
  Field('se', float, 'its standard error', may=True),
  Field('units', str, "of both; 'nats', '1', ..."),
  Field('key', str, 'hash of everything the value depends on'),
)
STORES = (  # store.json; `identity` covers rows, order and space, the digest everything
  Field('d_model', int, 'D', must=True),
  Field('config', dict, 'the data keys that cells are compared with'),
  Field('provenance', dict, 'where the activations come from'),
  Field('subject_flops_per_token', float, "the subject's forward FLOPs"),
  Field('tokens', int, 'of training', must=True),
  Field('held_out_tokens', int, 'of evaluation', must=True),
  Field('block_tokens', int, 'tokens written and checked at once'),
  Field('blocks', dict, 'SHA-256 of every block, by array'),
  Field('statistics', dict, 'of the stored rows, by array: mean, variance, norms, share lost in rounding'),
  Field('identity', str, 'content hash'),
  Field('scale', float, "what rows were multiplied by; normalize='scale' alone, 1 where missing", may=True),
)
STORE_CONFIG = (
  Field('subject', str, 'language model'),
  Field('site', str, 'where in it'),
  Field('text', str, 'corpus'),
  Field('normalize', str, 'what rows went through before they were stored'),
  Field('window_tokens', int, 'T'),
  Field('block_windows', int, 'windows whose tokens are shuffled together'),
  Field('store_tokens', int, 'of training, as asked'),
  Field('held_out_tokens', int, 'of evaluation, as asked'),
  Field('dtype', str, 'of numbers on disk'),
  Field('seed', int, 'of the order'),
  Field('positions', str, 'which positions of a window count', may=True),
  Field('weights', str, 'type of the weights of the subject in memory', may=True),
)
# What stores mean that say nothing of it: settings that came later.
STORE_NEUTRAL = {'positions': 'drop_first', 'weights': 'float32'}
JOURNAL = (  # a block of an unfinished store
  Field('sha256', str, 'of its bytes'),
  Field('tokens', int, 'in it', must=True),
  Field('sum', list, 'of its rows'),
  Field('sum_of_squares', float, 'of its numbers'),
  Field('sum_of_norms', float, 'that were divided out'),
  Field('zero_tokens', int, 'rows without a direction'),
  Field('sum_of_losses', float, 'squares of what rounding to the dtype lost; absent in early versions', may=True),
)
SWEEPS = (
  Field('name', str, 'of the grid'),
  Field('experiment', str, 'file that the grid varies'),
  Field('code_version', str, 'of the last launch'),
  Field('cells', dict, 'by id: the overrides, and the configuration as last registered'),
)

# Columns that only the configuration knows, by its dotted keys.
FROM_CONFIG = {
  'sae.n_latents': 'n_latents',
  'sae.k': 'k',
  'sae.d_model': 'd_model',
  'optim.learning_rate': 'learning_rate',
  'train.seed': 'seed',
  'train.batch_tokens': 'batch_tokens',
  'data.source': 'source',
  'data.subject': 'subject',
  'data.site': 'site',
  'data.text': 'text',
  'data.seed': 'data_seed',
  'data.epochs': 'epochs',
  'optim.ema_decay': 'ema_decay',
  'loss.aux_coefficient': 'aux_coefficient',
  'eval.per_decade': 'per_decade',
  # What came later stands last, so that tables of old ledgers keep the order of their columns.
  'sae.activation': 'activation',
  'loss.sparsity': 'sparsity',
}


def names(fields: Iterable[Field], kind: type | tuple[type, ...] = object) -> list[str]:
  """The names of the fields of a kind, in order."""
  return [field.name for field in fields if issubclass(field.kind, kind)]


def line_names(fields: Iterable[Field]) -> dict[str, str]:
  """Names in a line of metrics.jsonl to the names that tables and results have for the same."""
  return {field.line: field.name for field in fields if field.line}


def added(neutral: Any, *of: str) -> Any:
  """A field that came after the first version of the records.

  A record without the field means `neutral`. A record leaves the field out while it equals `neutral`. So a new field
  changes no id, and old records stay readable.

  Args:
    neutral: what code without the field did. It is a fact about the past. A template or a recipe may choose another
      default; this value must never follow it, or old records would change their meaning.
    of: a field of the same section, then the values of it that this field belongs to. A field with an owner is always
      in the records of those cells, even at `neutral`, and never in the records of others.
  """
  return dataclasses.field(default=neutral, metadata={'neutral': neutral, 'of': of})


def seal(record: dict[str, Any], owner: str = '') -> dict[str, Any]:
  """A record with its `schema` number first and a digest over everything last.

  `owner` is the cell of a record that does not name it: the digest then fits in no other cell's folder.
  """
  record = {'schema': SCHEMA} | record
  return record | {DIGEST: _digest(record, owner)}


def dump(record: dict[str, Any], owner: str = '') -> bytes:
  """A record, sealed, as its file holds it."""
  return dump_sealed(seal(record, owner))


def dump_sealed(record: dict[str, Any]) -> bytes:
  """A sealed record as its file holds it: a line for every entry. Indenting deeper is slow."""
  lines = (f' {_PLAIN.encode(key)}: {_PLAIN.encode(value)}' for key, value in record.items())
  return ('{\n' + ',\n'.join(lines) + '\n}\n').encode()


def dump_large(record: dict[str, Any]) -> bytes:
  """As `dump`, with a line for every entry of the entries: many times faster, and still read and compared by line."""
  parts = []
  for key, value in seal(record).items():
    if isinstance(value, dict) and value:
      inner = (f'  {json.dumps(k)}: {json.dumps(v, allow_nan=False)}' for k, v in value.items())
      text = '{\n' + ',\n'.join(inner) + '\n }'
    else:
      text = json.dumps(value, allow_nan=False)
    parts.append(f' {json.dumps(key)}: {text}')
  return ('{\n' + ',\n'.join(parts) + '\n}\n').encode()


def dump_line(record: dict[str, Any], owner: str) -> bytes:
  """A sealed record on one line, for files of many."""
  return json.dumps(seal(record, owner), allow_nan=False).encode() + b'\n'


def parse(data: bytes) -> dict[str, Any]:
  """The JSON object in a file, with finite numbers and text that can be written again. Raises `Broken`."""
  if len(data) > SMALL:
    raise Broken(f'it has {len(data)} bytes, more than {SMALL}')
  return parse_large(data)


def parse_large(data: bytes) -> dict[str, Any]:
  """`parse` without the limit on the size, for records that grow with a sweep or a store."""
  if not data.strip():
    raise Broken('it is empty')
  try:
    record = _DECODER.decode(data.decode())
    if data.count(b'{') + data.count(b'[') > _DEEP:
      _check_depth(record)
    if b'\\' in data or not data.isascii():
      json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair can be read but never written
  except Broken:
    raise
  except RecursionError:
    raise Broken('it is nested too deeply') from None
  except UnicodeError:
    raise Broken('its text is not UTF-8') from None
  except ValueError as error:
    raise Broken(f'it is not JSON ({str(error)[:80]})') from None
  if not isinstance(record, dict):
    raise Broken(f'it is not a JSON object but a {type(record).__name__}')
  return record


def check(record: dict[str, Any], fields: Iterable[Field], owner: str = '') -> None:
  """Raises `Broken` unless a record can be believed: known schema, right digest, and every field of its type.

  A record from before schema numbers has no digest, and only its necessary fields have to be there. What is there has
  the right type all the same: readers count and compare with it.
  """
  numbered = 'schema' in record or DIGEST in record
  if numbered:
    number = record.get('schema')
    if not (type(number) is int and 1 <= number <= SCHEMA):
      raise Broken(f'its schema is {_short(number)} and this version knows up to {SCHEMA}')
    if DIGEST not in record:
      raise Broken('it has a schema number and no digest')
    check_digest(record, owner)
  for field in fields:
    value = record.get(field.name)
    if value is None:
      absent = field.name not in record
      if (field.must and (absent or not field.may)) or (numbered and not field.may):
        raise Broken(f'{field.name} is missing')
    elif not is_kind(value, field.kind):
      raise Broken(f'{field.name}={_short(value)} is not of type {field.kind.__name__}')
    elif field.must and not value > 0:
      raise Broken(f'{field.name}={_short(value)} is not above 0')


def check_artifact(info: dict[str, Any]) -> None:
  """`check` of sae.json. Early versions listed in `imported_from` the files of imported activations, too."""
  fields = ARTIFACTS
  if isinstance(info.get('imported_from'), list):
    fields = tuple(field for field in ARTIFACTS if field.name != 'imported_from')
  check(info, fields)


def is_imported(info: dict[str, Any]) -> bool:
  """Whether a sae.json is of an autoencoder that was trained elsewhere."""
  return isinstance(info.get('imported_from'), str) and bool(info['imported_from'])


def check_fields(record: dict[str, Any], fields: Iterable[Field]) -> None:
  """Raises `Broken` unless every field is there and of its type, whatever the age of the record."""
  for field in fields:
    value = record.get(field.name)
    if value is None and not field.may:
      raise Broken(f'{field.name} is missing')
    if value is not None and not is_kind(value, field.kind):
      raise Broken(f'{field.name}={_short(value)} is not of type {field.kind.__name__}')


def check_digest(record: dict[str, Any], owner: str = '') -> None:
  """Raises `Broken` when a record has a digest that does not fit."""
  if DIGEST in record and record[DIGEST] != _digest(record, owner):
    raise Broken('it does not fit its digest: it was changed, or belongs to another cell')


def content(record: dict[str, Any]) -> dict[str, Any]:
  """A record without its schema number and digest."""
  return {key: value for key, value in record.items() if key not in ('schema', DIGEST)}


def verified(record: dict[str, Any]) -> bool:
  """Whether a checked record was covered by a digest; those from before schema numbers were not."""
  return DIGEST in record


def is_kind(value: Any, kind: type) -> bool:
  """Whether a JSON value is of a field's type: whole numbers are floats too, truth values are no numbers."""
  if kind is float:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 2**1000)
  return type(value) is kind and (kind is not int or abs(value) < _WHOLE)


def _digest(record: dict[str, Any], owner: str) -> str:
  """32 hex digits over everything in a record but the digest itself, in an order that does not depend on the writer."""
  rest = {key: value for key, value in record.items() if key != DIGEST}
  text = _CANONICAL.encode(rest)
  return hashlib.sha256(f'{owner}\n{text}'.encode()).hexdigest()[:32]


def _check_depth(record: Any) -> None:
  """Raises `Broken` for nesting that the parser still follows and recursive readers would not."""
  level = [record]
  for _ in range(_DEEP):
    inner = (one.values() if type(one) is dict else one for one in level)
    level = [value for values in inner for value in values if type(value) in _NESTED]
    if not level:
      return
  raise Broken('it is nested too deeply')


def _not_finite(text: str) -> Any:
  raise Broken(f'{text} is not a finite number')


def _finite(text: str) -> float:
  value = float(text)
  if not math.isfinite(value):
    raise Broken(f'{text[:20]} is not a finite number')
  return value


def _short(value: Any) -> str:
  return repr(value)[:40]


# Made once: each costs as much as a small record takes.
_NESTED = (dict, list)
_DECODER = json.JSONDecoder(parse_constant=_not_finite, parse_float=_finite)
_PLAIN = json.JSONEncoder(allow_nan=False)
_CANONICAL = json.JSONEncoder(sort_keys=True, allow_nan=False)
