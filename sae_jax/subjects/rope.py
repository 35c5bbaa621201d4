"""The rotary positions that settings ask for, in both of the dialects in which they are written."""

from sae_jax.subjects.layers import Rope
from sae_jax.subjects.settings import Settings


def of(settings: Settings, d_head: int, base: float, kind: str = '', partial: float = 1.0, scaled: bool = True) -> Rope:
  """Rotary positions of a model, or of its layers of one kind.

  Today's files have `rope_parameters`, with a section a kind where kinds differ. Files of before 2026 have `rope_theta`
  and `rope_scaling`.

  Args:
    settings: of the model.
    d_head: channels of a head.
    base: theta where the section does not state it.
    kind: 'full_attention' or 'sliding_attention', where the model has both.
    partial: the share of the channels that turn, where the section does not state it.
    scaled: whether the older `rope_scaling` is meant for these layers.

  Raises `UserError` for a kind of scaling that is not known here.
  """
  if settings.has('rope_parameters'):
    found = settings.section('rope_parameters')
    if kind and found.has(kind):
      found = found.section(kind)
    elif settings.has('rope_theta') and found.has('rope_theta') and found.number('rope_theta') != base:
      settings.refuse('rope_theta', 'contradicts rope_parameters.rope_theta; take a sound file')
    base = found.number('rope_theta', base)
  else:
    found = settings.section('rope_scaling') if scaled and settings.has('rope_scaling') else None
  if found is None:
    return Rope(base, int(d_head * partial))
  rule = found.choice('rope_type' if found.has('rope_type') else 'type', ('default', 'linear', 'llama3'), 'default')
  found.neutral('type', rule)
  width = int(d_head * found.number('partial_rotary_factor', partial))
  if rule == 'default':
    rope = Rope(base, width)
  elif rule == 'linear':
    rope = Rope(base, width, found.number('factor'))
  else:
    low, high = found.number('low_freq_factor'), found.number('high_freq_factor')
    if high <= low:
      found.refuse('high_freq_factor', f'is not more than low_freq_factor={low}')
    rope = Rope(base, width, found.number('factor'), low, high, found.whole('original_max_position_embeddings'))
  found.neutral('attention_factor', 1.0)
  found.refuse_others()
  return rope
