"""The house rules that a syntax tree can show: who may know the name of a model or a family, who may import whom."""

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

from sae_jax.families.family import NAMES
from sae_jax.subjects import catalogue
from tests.test_config import imports

ROOT = pathlib.Path(__file__).parents[1]
MODELS = re.compile(
  '|'.join([*catalogue.ENTRIES, 'smollm', 'llama', 'gpt-?[0-9j]', 'neox', 'pythia', 'gemma', 'qwen', 'mistral'])
)


def decisions(code: str) -> Iterator[tuple[int, str]]:
  """Lines and texts of the strings that a program decides by.

  They stand in comparisons, in the patterns of a match, in the keys of a dict or in what a text is asked to begin or
  end with.
  """
  for node in ast.walk(ast.parse(code)):
    match node:
      case ast.Compare(left, _, others):
        parts = [left, *others]
      case ast.MatchValue(value):
        parts = [value]
      case ast.Dict(keys):
        parts = [key for key in keys if key is not None]
      case ast.Call(ast.Attribute(_, 'startswith' | 'endswith' | 'get'), parts):
        pass
      case ast.Subscript(_, part):
        parts = [part]
      case _:
        continue
    for part in parts:
      for leaf in ast.walk(part):
        if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
          yield leaf.lineno, leaf.value


def program(*outside: str) -> Iterator[pathlib.Path]:
  """The files of the library, the sweeps and the analysis, without some and those in some folders."""
  for part in ('sae_jax', 'sweeps', 'analysis'):
    for path in sorted((ROOT / part).rglob('*.py')):
      if not any(path.is_relative_to(ROOT / folder) for folder in outside):
        yield path


def test_nothing_but_subjects_decides_by_the_name_of_a_model():
  found = [
    f'{path.relative_to(ROOT)}:{line}: {text!r}'
    for path in program('sae_jax/subjects')
    for line, text in decisions(path.read_text())
    if MODELS.search(text.lower())
  ]
  assert not found, 'move what depends on the model into sae_jax/subjects: ' + ', '.join(found)


@pytest.mark.parametrize(
  'code',
  [
    "if name == 'smollm2-135m': pass",
    "if 'GPT2' != name: pass",
    "x = name in ('toy', 'gpt_neox')",
    "match name:\n  case 'toy' | 'gemma3': pass",
    "x = {'llama': 1}[name]",
    "x = table['qwen2']",
    "if name.startswith('pythia'): pass",
  ],
)
def test_a_decision_by_name_is_noticed(code):
  assert any(MODELS.search(text.lower()) for _, text in decisions(code))


def test_every_case_of_the_families_is_a_name_that_is_looked_for():
  code = (ROOT / 'sae_jax' / 'subjects' / '__init__.py').read_text()
  cases = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.MatchValue)]
  names = [case.value for case in cases if isinstance(case, ast.Constant)]
  assert names and all(MODELS.search(str(name)) for name in names)


# Where a family may be known by its name: a cell checks the knobs of each, the configuration holds the defaults, a grid
# says which to train, and the claims of the paper are of some of them.
KNOW_FAMILIES = (
  'sae_jax/families',
  'sae_jax/subjects',
  'sae_jax/cell.py',
  'sae_jax/config.py',
  'sweeps/grids',
  'analysis/activations.py',
)


def collected(code: str) -> Iterator[tuple[int, str]]:
  """Lines and texts of the strings that stand in a tuple, list or set: what a later comparison looks in."""
  for node in ast.walk(ast.parse(code)):
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
      for part in node.elts:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
          yield part.lineno, part.value


def decided_by_family(*paths: pathlib.Path) -> list[str]:
  return [
    f'{path.name}:{line}: {text!r}'
    for path in paths
    for line, text in {*decisions(path.read_text()), *collected(path.read_text())}
    if text in NAMES
  ]


def test_nothing_but_families_and_cells_decides_by_the_name_of_a_family():
  found = decided_by_family(*program(*KNOW_FAMILIES))
  assert not found, 'ask `family.Family` or the kind in sae_jax/codes.py, not the name: ' + ', '.join(found)


@pytest.mark.parametrize(
  'code',
  [
    "if size.activation == 'relu': pass",
    "x = 'gated' != name",
    "x = name not in ('topk', 'batchtopk')",
    "x = name in {'prolu_ste'}",
    "match name:\n  case 'a' | 'jumprelu_step': pass",
    "x = {'matryoshka': f}[name]()",
    "x = {}.get('cs294a')",
    "DENSE = ('relu', 'gated')",
  ],
)
def test_a_decision_by_family_is_noticed(code, tmp_path):
  (tmp_path / 'planted.py').write_text(f'import this\n{code}\n')
  assert decided_by_family(tmp_path / 'planted.py')


def test_a_family_by_name_is_no_decision(tmp_path):
  (tmp_path / 'fine.py').write_text("EARLIEST = 'topk'\nc.sae.activation = 'gated'\nprint('relu')\n")
  assert not decided_by_family(tmp_path / 'fine.py')


# A part of the library, and what it must not import: train asks data for batches, data asks sharding to place them.
ABOVE = {
  'sae_jax/sharding.py': ('data', 'subjects', 'train', 'evaluate'),
  'sae_jax/data': ('train', 'step', 'member', 'evaluate', 'checkpoint', 'artifact'),
  'sae_jax/families': ('sae', 'sharding', 'step', 'train', 'member', 'data', 'evaluate'),
  'sae_jax/subjects': ('data', 'sharding', 'config', 'cell', 'train'),
  'sae_jax/subjects/subject.py': ('subjects.llama', 'subjects.catalogue'),
}


@pytest.mark.parametrize('part', ABOVE)
def test_no_part_imports_what_stands_above_it(part):
  for path in [ROOT / part] if part.endswith('.py') else (ROOT / part).rglob('*.py'):
    for name in imports(path):
      above = [one for one in ABOVE[part] if f'{name}.'.startswith(f'sae_jax.{one}.')]
      assert not above, f'{path.relative_to(ROOT)} imports {name}'
