import hypothesis
import hypothesis.strategies as st
import pytest

from experiments import tiny
from sae_jax import config
from sae_jax.errors import UserError
from sweeps import grid

FORM = 'from experiments import tiny\nfrom sweeps import grid\nEXPERIMENT = tiny\n'
SWEEPS = st.lists(st.lists(st.integers(), min_size=1, max_size=4), min_size=1, max_size=3)


def write(folder, text, name='small.py'):
  path = folder / name
  path.write_text(text)
  return str(path)


@hypothesis.given(SWEEPS)
@hypothesis.settings(max_examples=30, deadline=None)
def test_product_is_every_combination_last_fastest(values):
  found = grid.product(*(grid.param(f'key{i}', v) for i, v in enumerate(values)))
  expected = [()]
  for v in values:
    expected = [(*head, x) for head in expected for x in v]
  assert [tuple(cell.values()) for cell in found] == expected
  assert all(list(cell) == [f'key{i}' for i in range(len(values))] for cell in found)


@hypothesis.given(st.lists(st.tuples(st.integers(), st.integers()), min_size=1, max_size=5))
@hypothesis.settings(max_examples=30, deadline=None)
def test_zipped_pairs_in_order(pairs):
  a, b = zip(*pairs, strict=True)
  assert grid.zipped(grid.param('a', a), grid.param('b', b)) == [{'a': x, 'b': y} for x, y in pairs]


def test_zipped_refuses_other_lengths():
  with pytest.raises(UserError, match=r'lengths \[2, 3\]'):
    grid.zipped(grid.param('a', [1, 2]), grid.param('b', [1, 2, 3]))


def test_key_set_twice_is_refused():
  with pytest.raises(UserError, match=r'sae\.k is set twice'):
    grid.product(grid.param('sae.k', [1]), grid.param('sae.k', [1]))


def test_param_without_values_is_refused():
  with pytest.raises(UserError, match='no values'):
    grid.param('sae.k', [])


def test_build_drops_a_cell_of_the_same_id_and_says_so(tmp_path):
  # The mesh is no part of a cell's identity, so these two are one.
  path = write(
    tmp_path,
    FORM + "def sweep():\n  return grid.chain(grid.param('sae.k', [2, 3]), [{'sae.k': 3, 'mesh.data': 2}])\n",
  )
  sweep = grid.build(path)
  assert [overrides for overrides, _ in sweep.cells] == [{'sae.k': 2}, {'sae.k': 3}]
  assert (sweep.name, sweep.experiment, sweep.dropped) == ('small', 'experiments/tiny.py', 1)
  assert [c.sae.k for _, c in sweep.cells] == [2, 3]


def test_tiny_is_six_different_cells():
  sweep = grid.build('sweeps/grids/tiny.py')
  assert len({c.id for _, c in sweep.cells}) == 6 and not sweep.dropped


@pytest.mark.parametrize(
  ('text', 'rule'),
  [
    ('', 'EXPERIMENT'),
    ("EXPERIMENT = 'experiments/tiny.py'\ndef sweep(): return [{}]\n", 'EXPERIMENT'),
    (FORM, r'sweep\(\)'),
    (FORM + 'def sweep(): return []\n', 'list of dicts'),
    (FORM + 'def sweep(): return [{4: 4}]\n', 'list of dicts'),
    (FORM + "def sweep(): return [{'sae.nope': 4}]\n", r"cell \{'sae.nope': 4\} .*not known"),
    (FORM + "def sweep(): return [{'sae.k': 'four'}]\n", r'wrong type'),
    (FORM + "def sweep(): return [{'sae.k': 4000}]\n", r'exceeds sae\.n_latents'),
  ],
)
def test_build_names_what_is_wrong(tmp_path, text, rule):
  with pytest.raises(UserError, match=rule):
    grid.build(write(tmp_path, text))


def test_build_refuses_what_is_no_python_file(tmp_path):
  for path in (str(tmp_path), str(tmp_path / 'missing.py'), write(tmp_path, 'x', 'grid.txt')):
    with pytest.raises(UserError, match='no grid file'):
      grid.build(path)


def test_cells_of_a_large_grid_are_those_of_each_override_alone(tmp_path):
  """Most are not made by ml_collections."""
  (tmp_path / 'many.py').write_text(
    'from experiments import tiny\nfrom sweeps import grid\nEXPERIMENT = tiny\n'
    'def sweep(): return grid.product(grid.param("sae.k", [2, 3, 5]), grid.param("optim.learning_rate", [1, 2e-3, 1e-3]),'
    ' grid.param("data.planted.noise", [0, 0.5]), grid.param("mesh.member", [1]))\n'
  )
  for overrides, made in grid.build(str(tmp_path / 'many.py')).cells:
    assert made == config.resolve(config.override(tiny.get_config(), overrides))


@pytest.mark.parametrize(
  'bad', ['{"sae.k": "3"}', '{"sae.k": 3.5}', '{"sae.n": 3}', '{"sae.k": 10**6}', '{"sae.k": None}']
)
def test_mistake_after_many_good_cells_is_still_found(bad, tmp_path):
  (tmp_path / 'many.py').write_text(
    f'from experiments import tiny\nEXPERIMENT = tiny\ndef sweep(): return [{{"sae.k": 3}}, {{"sae.k": 5}}, {bad}]\n'
  )
  with pytest.raises(UserError, match=r'cell .* of '):
    grid.build(str(tmp_path / 'many.py'))


def test_numbers_of_numpy_are_numbers(tmp_path):
  """The same ids as the plain numbers, in cells made by ml_collections and in those made without it."""
  text = (
    'import numpy as np\nfrom experiments import tiny\nfrom sweeps import grid\nEXPERIMENT = tiny\n'
    'def sweep(): return grid.product(grid.param("sae.n_latents", {n}), grid.param("optim.learning_rate", {rate}),'
    ' grid.param("sae.latent_bias", {bias}), grid.param("loss.aux_coefficient", {aux}))\n'
  )
  theirs = dict(
    n='2**np.arange(6, 9)',
    rate='[*np.logspace(-4, -3, 3), np.float32(1e-3), np.array(2e-3)]',
    bias='[np.True_, np.False_]',
    aux='[np.int64(1)]',
  )
  ours = dict(
    n='[64, 128, 256]',
    rate='[*np.logspace(-4, -3, 3).tolist(), float(np.float32(1e-3)), 2e-3]',
    bias='[True, False]',
    aux='[1]',
  )
  found, plain = (grid.build(write(tmp_path, text.format(**how), f'{i}.py')) for i, how in enumerate((theirs, ours)))
  assert [c.id for _, c in found.cells] == [c.id for _, c in plain.cells] and len(found.cells) == 30
  assert [repr(o) for o, _ in found.cells] == [repr(o) for o, _ in plain.cells]  # they are written down


@pytest.mark.parametrize(
  ('value', 'words'),
  [
    ('np.float64(256)', r'sae\.n_latents=256\.0 has the wrong type .*; write 256$'),
    ('np.array([64, 128])', 'wrong type'),
    ('np.datetime64(3, "D")', 'wrong type'),
  ],
)
def test_what_is_no_whole_number_is_refused_where_one_belongs(tmp_path, value, words):
  text = f'import numpy as np\n{FORM}def sweep(): return [{{"sae.n_latents": {value}}}]\n'
  with pytest.raises(UserError, match=words):
    grid.build(write(tmp_path, text))
