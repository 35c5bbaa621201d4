"""The settings of a model as its config.json states them. The file is somebody else's: every value is checked."""

from typing import Any, NoReturn

from sae_jax.errors import UserError

_MISSING: Any = object()
_MOST = 2**31 - 1
_MOST_LAYERS = 1000
_SMALLEST, _LARGEST = 1e-18, 1e18
# They say nothing about what a model computes in use.
_WITHOUT_EFFECT = frozenset(
  'architectures attention_dropout attention_probs_dropout_prob _attn_implementation _attn_implementation_autoset '
  'attn_pdrop boi_token_index bos_token_id cache_implementation chunk_size_feed_forward classifier_dropout dtype '
  'embd_pdrop eoi_token_index eos_token_id gradient_checkpointing hidden_dropout hidden_dropout_prob id2label '
  'image_token_index initializer_range is_decoder is_llama_config label2id mm_tokens_per_image model_type n_ctx '
  'n_special _name_or_path _num_labels output_past pad_token_id predict_special_tokens pretraining_tp reorder_and_upcast_attn '
  'resid_pdrop return_dict sliding_window_size summary_activation summary_first_dropout summary_proj_to_labels '
  'summary_type summary_use_proj task_specific_params tokenizer_class torch_dtype transformers.js_config '
  'transformers_version unsloth_fixed unsloth_version use_cache vision_config'.split()
)


def _says_nothing(value: Any) -> bool:
  """Not 0, which may be a factor."""
  return value is None or value is False or (isinstance(value, str | list | dict) and not value)


class Settings:
  """Values by name. Reading one marks it as understood; `refuse_others` refuses what nobody read.

  Every method raises `UserError` that names the file, the key and the rule.
  """

  def __init__(self, values: dict[str, Any], where: str, inside: str = ''):
    self.where = where
    self._values, self._inside = values, inside
    self._read: set[str] = set()

  @property
  def kind(self) -> str:
    """The kind of model, `model_type`."""
    value = self._value('model_type', _MISSING)
    if not isinstance(value, str):
      self._refuse('model_type', value, 'is not a name')
    return value

  def has(self, key: str) -> bool:
    """Whether it is set to something."""
    return self._values.get(key) is not None

  def states(self, key: str) -> bool:
    """Whether the file has it, be it as null: that may say 'none' where a missing key means the default."""
    return key in self._values

  def whole(self, key: str, default: Any = _MISSING, least: int = 1, most: int = _MOST) -> int:
    """A whole number."""
    value = self._value(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
      self._refuse(key, value, f'is not a whole number from {least} to {most}')
    return value

  def layers(self, key: str) -> int:
    """How many blocks there are, few enough to be listed."""
    return self.whole(key, most=_MOST_LAYERS)

  def first_whole(self, key: str) -> int:
    """A whole number from 0, or the first of a list of them."""
    value = self._values.get(key)
    if isinstance(value, list) and value:
      self._values[key] = value[0]
    return self.whole(key, least=0)

  def number(self, key: str, default: Any = _MISSING) -> float:
    """A number above 0 that float32 can compute with."""
    value = self._value(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not _SMALLEST <= value <= _LARGEST:
      self._refuse(key, value, f'is not a number from {_SMALLEST:g} to {_LARGEST:g}')
    return float(value)

  def flag(self, key: str, default: bool) -> bool:
    """True or false."""
    value = self._value(key, default)
    if not isinstance(value, bool):
      self._refuse(key, value, 'is not true or false')
    return value

  def choice(self, key: str, allowed: tuple[str, ...], default: Any = _MISSING) -> str:
    """One of a few words."""
    value = self._value(key, default)
    if value not in allowed:
      self._refuse(key, value, f'is not known here; the model needs code, or one of {", ".join(allowed)}')
    return value

  def words(self, key: str, allowed: tuple[str, ...], count: int) -> tuple[str, ...]:
    """A list of `count` words."""
    value = self._value(key, _MISSING)
    if not isinstance(value, list) or len(value) != count or not all(word in allowed for word in value):
      self._refuse(key, value, f'is not a list of {count} of {", ".join(allowed)}')
    return tuple(value)

  def section(self, key: str) -> 'Settings':
    """Settings inside settings."""
    value = self._value(key, _MISSING)
    if not isinstance(value, dict):
      self._refuse(key, value, 'is not a section')
    return Settings(value, self.where, f'{self._inside}{key}.')

  def lifted(self, key: str) -> 'Settings':
    """These settings with those of a section among them, where there is one."""
    if not self.has(key):
      return self
    inner = self.section(key)._values
    return Settings({name: value for name, value in self._values.items() if name != key} | inner, self.where)

  def table(self, key: str) -> dict[str, str]:
    """Words by words."""
    value = self._value(key, _MISSING)
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
      self._refuse(key, value, 'is not a table of names')
    return value

  def neutral(self, key: str, *values: Any) -> None:
    """Refuses any but these values, with which the key changes nothing."""
    value = self._value(key, values[0])
    if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in values):
      self._refuse(key, value, 'changes what the model computes in a way that is not known here; the model needs code')

  def refuse_others(self) -> None:
    """Refuses the first key that was not read and is set to something."""
    for key, value in self._values.items():
      if key not in self._read and key not in _WITHOUT_EFFECT and not _says_nothing(value):
        self._refuse(
          repr(key[:60]), value, 'is not understood; if it does not change what the model computes, take it out'
        )

  def _value(self, key: str, default: Any) -> Any:
    self._read.add(key)
    value = self._values.get(key)
    if value is None:
      if default is _MISSING:
        raise UserError(f'{self.where} has no {self._inside}{key}; take a complete file')
      return default
    return value

  def refuse(self, key: str, why: str) -> NoReturn:
    """Raises `UserError` for a value that contradicts another."""
    self._refuse(key, self._values.get(key), why)

  def _refuse(self, key: str, value: Any, why: str) -> NoReturn:
    raise UserError(f'{self.where}: {self._inside}{key}={str(value)[:60]!r} {why}')
