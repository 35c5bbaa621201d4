"""Tokens as text that can be seen: whitespace, control characters and broken bytes included."""

import functools
import re
import unicodedata

import tokenizers

_SHOWN = {'\n': '↵', '\t': '⇥', '\r': '␍'}
# Control and format characters, half surrogates, private and unassigned ones, separators of lines and paragraphs.
_HIDDEN = ('Cc', 'Cf', 'Cs', 'Co', 'Cn', 'Zl', 'Zp')
# Of other categories, and without a form of their own: joiners, fillers of Hangul, vowels of Khmer, selectors of variants.
_UNSEEN = re.compile('[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]')


class Words:
  """The texts of a vocabulary.

  Args:
    tokenizer: None shows ids.
  """

  def __init__(self, tokenizer: tokenizers.Tokenizer | None):
    self._tokenizer = tokenizer
    drops = tokenizer is not None and tokenizer.decoder is not None  # without a decoder nothing is dropped
    self._before = list(tokenizer.encode('a', add_special_tokens=False).ids)[-1:] if drops else []
    self.plain = functools.cache(self._plain)
    self.chip = functools.cache(self._chip)

  def _plain(self, token: int) -> str:
    """As it stands in running text, where a space is a space."""
    return visible(self._text(token)) or f'⟨{token}⟩'

  def _chip(self, token: int) -> str:
    """As it stands alone, where spaces at its ends would be lost."""
    text = self.plain(token)
    left, right = len(text) - len(text.lstrip(' ')), len(text) - len(text.rstrip(' '))
    return '␣' * left + (text.strip(' ') + '␣' * right if left < len(text) else '')

  def _text(self, token: int) -> str:
    """What the token adds to a text. Some tokenizers drop a space that opens a text, so another token comes before it."""
    if self._tokenizer is None:
      return ''
    before = self._tokenizer.decode(self._before, skip_special_tokens=False) if self._before else ''
    both = self._tokenizer.decode([*self._before, token], skip_special_tokens=False)
    return both.removeprefix(before)


def visible(text: str) -> str:
  """The same with a sign in place of each character that is not seen, or that moves or joins others."""
  shown = ''.join(_seen(character) for character in text)
  # A mark that combines gets something to stand on.
  return f'◌{shown}' if shown and unicodedata.category(shown[0])[0] == 'M' else shown


def _seen(character: str) -> str:
  if character in _SHOWN:
    return _SHOWN[character]
  kind = unicodedata.category(character)
  if kind in _HIDDEN or _UNSEEN.match(character) or (kind == 'Zs' and character != ' '):
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else f'⟨U+{code:04X}⟩'
  return character
