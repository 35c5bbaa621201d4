"""How a text file writes its fields and numbers: stated by the user, never guessed."""

import codecs
import dataclasses
import functools
import re
from typing import Any

from sae_jax.checks import shown
from sae_jax.errors import UserError

_INFINITE = re.compile(r'[+-]?inf(inity)?', re.IGNORECASE)
_TABS = ('tab', '\\t')


@dataclasses.dataclass(frozen=True)
class Notation:
  """How a text file writes its fields and numbers. Raises `UserError` for what contradicts itself."""

  sep: str = ','  # 'tab' for a tab
  decimal: str = '.'
  thousands: str = ''  # what stands between groups of three digits; nothing does by default
  encoding: str = 'utf-8'

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      if not isinstance(value := getattr(self, field.name), str):
        raise UserError(f'{field.name}={shown(value)} is not a text; give {field.default!r} or what the file has')
    if self.sep in _TABS:
      object.__setattr__(self, 'sep', '\t')
    if len(self.sep) != 1 or self.sep.isalnum() or self.sep in '"\r\n\0.+-#':
      raise UserError(f'--sep={self.sep!r} cannot separate fields; give one character such as ";" or the word tab')
    if self.decimal not in ('.', ','):
      raise UserError(f'--decimal={self.decimal!r} is not a decimal sign; give "." or ","')
    if len(self.thousands) > 1 or self.thousands.isalnum() or self.thousands in ('"', '\n', '\r', '\0', '+', '-'):
      raise UserError(f"--thousands={self.thousands!r} cannot group digits; give one of , . ' or a space")
    if self.thousands == self.decimal:
      other = ',' if self.decimal == '.' else '.'
      raise UserError(
        f'--thousands={self.thousands} is the decimal sign too; add --decimal={other}, or group by something else'
      )
    try:
      codecs.lookup(self.encoding)
    except (LookupError, ValueError):
      raise UserError(
        f'--encoding={self.encoding!r} is not known; give utf-8, utf-16, latin-1 or another name that Python knows'
      ) from None

  @functools.cached_property
  def _pattern(self) -> re.Pattern[str]:
    whole, point = '[0-9]+', re.escape(self.decimal)
    if self.thousands:
      # No group is shorter than three digits and no number begins with 0: 0.626 has no groups, and 1,5 is no number.
      whole = f'(?:[1-9][0-9]{{0,2}}(?:{re.escape(self.thousands)}[0-9]{{3}})+|[0-9]+)'
    return re.compile(rf'[+-]?(?:{whole}(?:{point}[0-9]*)?|{point}[0-9]+)(?:[eE][+-]?[0-9]+)?')

  def number(self, text: str) -> int | float | None:
    """The number that a text is; None where it is none in this notation."""
    if _INFINITE.fullmatch(text):
      return float(text)
    if not self._pattern.fullmatch(text):
      return None
    plain = (text.replace(self.thousands, '') if self.thousands else text).replace(self.decimal, '.')
    # int64 holds whole numbers of 18 digits.
    return int(plain) if plain.lstrip('+-').isdecimal() and len(plain) <= 18 else float(plain)


def remedy(value: Any) -> str:
  """What to do about a value that is not a number."""
  text = str(value).strip()
  if re.fullmatch(r'[+-]?[1-9][0-9]{0,2},[0-9]{3}', text):
    return 'a comma between groups of three digits is --thousands=, and a decimal comma --decimal=,'
  if re.fullmatch(r'[+-]?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]*)?', text):
    return 'a comma between groups of three digits is --thousands=,'
  if re.fullmatch(r'[+-]?[0-9]*,[0-9]+', text):
    return 'a decimal comma is --decimal=,'
  if re.fullmatch(r'[+-]?[0-9]{1,3}(\.[0-9]{3})+(,[0-9]*)?', text):
    return 'points between groups of three digits are --thousands=. --decimal=,'
  if found := re.fullmatch(r"[+-]?[0-9]{1,3}(?:(['_ \u2019\u00a0\u202f])[0-9]{3})+", text):
    return f'{found[1]!r} between groups of three digits is --thousands="{found[1]}"'
  if re.fullmatch(r'[+-]?[0-9]+\.[0-9]+', text):
    return 'with --decimal=, no number has a point: correct that row, or leave the flag out'
  if re.fullmatch(r'[+-]?[0-9.,]+ *%', text):
    return 'write a fraction without the percent sign in all rows'
  return 'remove or correct that row; a row of units begins with # or goes'
