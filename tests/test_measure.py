"""The machine of the measures: killed anywhere it ends with the same bytes, shared by workers, never mixing what differs."""

import dataclasses
import itertools
import json
import pathlib
import re
import shutil
import sys
import types
from typing import ClassVar

import numpy as np
import pytest

from sae_jax import files, measure, schema
from sae_jax.errors import UserError
from sae_jax.measures import Scope, estimate, inputs, names, paired, results, run, some
from sae_jax.measures.downstream import Downstream
from sae_jax.measures.measure import Judged, Unit, Value
from sweeps import gc, grid, ledger, status, work
from sweeps import measuring as sweep_measure
from tests import cells, measured
from tests.test_harvest import toy  # noqa: F401  the toy subject's fixture

ROOT = pathlib.Path(__file__).parents[1]


class Killed(BaseException):
  """Ends a process wherever it is."""


def tree(folder) -> dict[str, bytes]:
  """Every file of a folder but the leases."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in sorted(pathlib.Path(folder).rglob('*'))
    if path.is_file() and schema.CLAIMS not in path.parts
  }


@pytest.fixture
def shared(toy, tmp_path):  # noqa: F811
  return measured.inputs(tmp_path / 'inputs')


def measure_all(folder: str, shared: inputs.Inputs, **keywords) -> bool:
  return run.run(run.target(folder), some([]), shared, None, **keywords)


@pytest.mark.parametrize('name', list(names.VERSIONS))
def test_killed_at_every_write_a_measure_ends_with_the_same_bytes(shared, tmp_path, monkeypatch, name):
  cell, wanted = measured.cell(), some([name])
  whole, broken = (measured.finished(tmp_path / where, cell) for where in ('whole', 'broken'))
  assert run.run(run.target(whole), wanted, shared, None)
  writes = {'left': 0}

  def counted(genuine):
    def write(path, data, **keywords):
      if writes['left'] == 0:
        if genuine is files_append:
          genuine(path, data[: len(data) // 2])  # a line cut short
        raise Killed
      writes['left'] -= 1
      return genuine(path, data, **keywords)

    return write

  files_append, files_replace = files.append, files.replace
  with monkeypatch.context() as patched:
    patched.setattr(files, 'append', counted(files_append))
    patched.setattr(files, 'replace', counted(files_replace))
    kills = 0
    while True:
      writes['left'] = kills % 8
      try:
        assert run.run(run.target(broken), wanted, shared, None)
        break
      except Killed:
        kills += 1
        assert kills < 300
  assert kills >= 1 and tree(whole) == tree(broken)


def test_stopped_between_units_it_goes_on_with_the_next(shared, tmp_path):
  folder = measured.finished(tmp_path / 'c', measured.cell())
  asked = iter([False, True])
  assert not run.run(run.target(folder), [Downstream()], shared, None, stop=lambda: next(asked))
  seen = []
  assert run.run(
    run.target(folder), [Downstream()], shared, None, update=lambda one, at, n: seen.append((one.NAME, at, n))
  )
  assert seen == [('downstream', 1, 2), ('downstream', 2, 2)]
  assert run.missing(run.target(folder), [Downstream()], shared) == []


def test_values_of_a_replaced_autoencoder_are_stale_and_measured_again(shared, tmp_path):
  cell = measured.cell()
  folder = measured.finished(tmp_path / 'c', cell)
  measure_all(folder, shared)
  before = results.read(folder, cell.id)
  measured.finished(tmp_path / 'c', cell, seed=5)
  target = run.target(folder)
  assert all(result.stale(target.tensors) for result in before.values())
  assert [one.NAME for one in run.missing(target, some([]), shared)] == list(names.USUAL)
  measure_all(folder, shared)
  after = results.read(folder, cell.id)
  assert not any(result.stale(target.tensors) for result in after.values())
  assert after['downstream'].values['kl'] != before['downstream'].values['kl']
  fresh = measured.finished(tmp_path / 'fresh', cell, seed=5)
  measure_all(fresh, shared)
  assert tree(folder) == tree(fresh)


def test_an_older_version_is_stale(shared, tmp_path, monkeypatch):
  folder = measured.finished(tmp_path / 'c', measured.cell())
  measure_all(folder, shared)
  (result, *_) = results.read(folder, measured.cell().id).values()
  monkeypatch.setitem(names.VERSIONS, result.key.name, 99)
  assert 'of version 1' in result.stale(result.key.tensors)


def test_a_changed_digit_of_a_value_is_noticed(shared, tmp_path):
  cell = measured.cell()
  folder = measured.finished(tmp_path / 'c', cell)
  run.run(run.target(folder), [Downstream()], shared, None)
  path = pathlib.Path(results.path(folder, schema.MEASURES_INFO))
  record = json.loads(path.read_bytes())
  record['measures']['downstream']['values']['kl']['value'] *= 1.01
  path.write_text(json.dumps(record))
  with pytest.raises(schema.Broken, match='digest'):
    results.read(folder, cell.id)
  with pytest.raises(UserError, match='delete it: lines are kept'):
    run.missing(run.target(folder), [Downstream()], shared)
  with pytest.raises(schema.Broken, match='another cell'):
    results.read(folder, '0' * 12)


def test_a_changed_line_and_all_after_it_are_done_again(shared, tmp_path):
  folder = measured.finished(tmp_path / 'c', measured.cell())
  run.run(run.target(folder), [Downstream()], shared, None)
  whole = tree(folder)
  path = pathlib.Path(results.path(folder, 'downstream.jsonl'))
  pathlib.Path(results.path(folder, schema.MEASURES_INFO)).unlink()
  path.write_bytes(path.read_bytes().replace(b'"kl": [', b'"kl": [7', 1))
  key = run.key(Downstream(), run.target(folder), shared)
  assert results.Lines(folder, key).records == []
  run.run(run.target(folder), [Downstream()], shared, None)
  assert tree(folder) == whole


def test_inputs_are_made_once_and_checked(toy, tmp_path, monkeypatch):  # noqa: F811
  first = measured.inputs(tmp_path)
  block = first.block('held_out', 1)
  monkeypatch.setattr(inputs.Inputs, '_run', lambda *args, **keywords: pytest.fail('made twice'))
  second = measured.inputs(tmp_path)
  np.testing.assert_array_equal(second.block('held_out', 1).x_WTD, block.x_WTD)
  assert second.identity == first.identity
  assert measured.inputs(tmp_path, Scope(held_out=10, train=9)).identity != first.identity
  (path,) = tmp_path.rglob('held_out.0001/arrays.safetensors')
  path.write_bytes(path.read_bytes()[:-1] + b'?')
  with pytest.raises(UserError, match=r'cannot be believed .* delete the folder'):
    measured.inputs(tmp_path).block('held_out', 1)


def test_inputs_are_those_of_the_model(shared):
  subject = shared.subject
  for i in range(shared.blocks('held_out')):
    block = shared.block('held_out', i)
    ids_WT = block.windows.ids_WT
    x_WTD = np.asarray(subject.residual(ids_WT, shared.site))
    np.testing.assert_allclose(block.x_WTD, x_WTD, rtol=1e-5, atol=1e-5)
    log_p_WTV = np.asarray(subject.logits(ids_WT), np.float64)
    log_p_WTV = log_p_WTV - np.log(np.exp(log_p_WTV).sum(axis=-1, keepdims=True))
    ce_WT = -np.take_along_axis(log_p_WTV[:, :-1], ids_WT[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(block.ce_WT, ce_WT, rtol=1e-4, atol=1e-5)
    assert block.counted_BD.shape == (len(ids_WT) * 7, 6)
  assert sum(len(shared.block('held_out', i).windows) for i in range(shared.blocks('held_out'))) == 11


def test_devices_do_not_matter(shared, tmp_path, monkeypatch):
  """The tests run on eight devices; one must give the same."""
  import jax

  many = [Downstream().run(unit, measured.judged(measured.cell()), shared).record for unit in range(2)]
  one_device = [jax.devices()[0]]
  monkeypatch.setattr(jax, 'local_device_count', lambda: 1)
  monkeypatch.setattr(jax, 'local_devices', lambda: one_device)
  alone = measured.inputs(tmp_path / 'alone')
  for unit, record in enumerate(many):
    for name, values in Downstream().run(unit, measured.judged(measured.cell()), alone).record.items():
      np.testing.assert_allclose(values, record[name], rtol=2e-5, atol=1e-5)


def identity(numbers, x_WTD):
  del numbers
  return x_WTD


def test_what_is_put_back_unchanged_costs_nothing(shared):
  ce_WT, kl_WT = shared.spliced(0, 'identity', identity, ())
  np.testing.assert_array_equal(kl_WT, 0)
  np.testing.assert_allclose(ce_WT, shared.block('held_out', 0).ce_WT, rtol=1e-6, atol=1e-6)


def test_an_edit_reaches_no_earlier_position_and_none_that_does_not_count(shared):
  clean = shared.block('held_out', 0)
  _, kl_WT = shared.spliced(0, 'late', lambda at, x_WTD: x_WTD.at[:, 4:].multiply(at), np.float32(-2.0))
  np.testing.assert_array_equal(kl_WT[:, :4], 0)
  assert (kl_WT[:, 4:].max(axis=1) > 1e-4).all()
  first, _ = shared.spliced(0, 'first', lambda _, x_WTD: x_WTD.at[:, :1].set(0), ())
  np.testing.assert_allclose(first, clean.ce_WT, rtol=1e-6, atol=1e-6)  # the start token does not count


class Given:
  """Stands for the form of an autoencoder that gives back what it is told to."""

  def __init__(self, name, reconstruct):
    self.name, self.reconstruct, self.size = name, reconstruct, measured.cell().sae


def values_of(shared, form, params=()):
  of = measured.replaced(measured.judged(measured.cell()), form=form, params=params)
  one = Downstream()
  return one.values([one.run(unit, of, shared) for unit in range(one.units(shared))])


def test_identity_recovers_all_and_the_mean_nothing(shared):
  exact = values_of(shared, Given('exact', identity))
  assert exact['kl'].value == 0 and abs(exact['delta_ce'].value) < 1e-6
  assert exact['recovered_zero'].value == pytest.approx(1, abs=1e-5)
  mean = values_of(shared, Given('mean', lambda mean_D, x: mean_D[None, None] + 0 * x), shared.mean_D)
  assert mean['recovered_mean'].value == pytest.approx(0, abs=1e-5)
  assert mean['kl'].value == pytest.approx(mean['mean_kl'].value)
  zero = values_of(shared, Given('zero', lambda _, x: 0 * x))
  assert zero['recovered_zero'].value == pytest.approx(0, abs=1e-5) and zero['kl'].value > 0


def test_reconstructions_go_back_in_the_space_of_the_model(shared):
  """A reconstruction whose norm was not put back costs nats: the edit itself is pinned."""
  of, block = measured.judged(measured.cell()), shared.block('held_out', 0)
  flat_BD = block.x_WTD.reshape(-1, 6)
  found = np.asarray(of.form.reconstruct(of.params, flat_BD))
  np.testing.assert_allclose(found, measured.rebuilt(of, flat_BD), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  'name',
  ['relu', 'jumprelu_step', *(pytest.param(n, marks=pytest.mark.chaos) for n in ('gated', 'batchtopk', 'cs294a'))],
)
def test_every_measure_runs_on_other_families(shared, tmp_path, name):
  cell = measured.of_family(name)
  folder = measured.finished(tmp_path / name, cell)
  assert run.run(run.target(folder), some(list(names.VERSIONS)), shared, None)
  found = results.read(folder, cell.id)
  assert list(found) == sorted(names.VERSIONS)
  assert all(found[one].values for one in ('downstream',))


def test_the_measure_of_the_guide_runs(shared, tmp_path, monkeypatch):
  guide = (ROOT / 'docs' / 'add_a_measure.md').read_text()
  (body,) = re.findall(r'```python\n(.*?)```', guide, re.DOTALL)
  found: dict = {'__name__': 'sparing'}
  monkeypatch.setitem(sys.modules, 'sparing', types.ModuleType('sparing'))  # dataclasses look it up
  exec(body, found)
  monkeypatch.setitem(names.VERSIONS, 'sparing', 1)
  cell = measured.cell()
  folder = measured.finished(tmp_path / 'c', cell)
  assert run.run(run.target(folder), [found['Sparing']()], shared, None)
  values = results.read(folder, cell.id)['sparing'].values
  assert 0 < values['early']['value'] <= 3 and values['late']['se'] >= 0
  assert len(run.missing(run.target(folder), [found['Sparing'](early=2)], shared)) == 1  # other settings


@dataclasses.dataclass(frozen=True)
class Fake:
  """A measure of three units whose numbers are its setting, the later two with arrays."""

  NAME: ClassVar[str] = 'fake'

  level: int = 1
  refused: ClassVar[int] = 9  # the unit that is
  ran: ClassVar[list[tuple[int, int]]] = []  # settings and units

  def units(self, inputs: inputs.Inputs) -> int:
    del inputs
    return 3

  def run(self, unit: int, judged: Judged, inputs: inputs.Inputs) -> Unit:
    del judged, inputs
    if unit == self.refused:
      raise UserError('refused')
    self.ran.append((self.level, unit))
    return Unit({'level': self.level}, {'a_N': np.full(unit, self.level)} if unit else {})

  def values(self, units: list[Unit]) -> dict[str, Value]:
    assert all((unit.arrays['a_N'] == self.level).all() for unit in units[1:])
    return {'level': Value(float(np.mean([unit.record['level'] for unit in units])), None, '1')}

  def flops(self, judged: Judged, inputs: inputs.Inputs) -> float:
    del judged, inputs
    return 0.0


@pytest.fixture
def fake(shared, tmp_path, monkeypatch):
  """Takes `Fake` with some setting of a cell; and the folder of a cell where it has setting 1."""
  monkeypatch.setitem(names.VERSIONS, 'fake', 1)
  monkeypatch.setattr(Fake, 'ran', [])
  first = measured.finished(tmp_path / 'first', measured.cell())

  def take(folder: str, level: int = 1) -> None:
    assert run.run(run.target(folder), [Fake(level)], shared, None)
    assert run.missing(run.target(folder), [Fake(level)], shared) == []

  take(first)
  return take, first


def level(folder: str, shared: inputs.Inputs) -> float:
  """The setting of the finished `Fake` of a cell, which its value, lines and arrays all have."""
  of = run.target(folder)
  found, value = run.finished(of, 'fake', shared), results.read(folder, of.id)['fake'].values['level']['value']
  assert found is not None and [unit.record['level'] for unit in found.units] == [value] * 3
  assert [unit.arrays['a_N'].tolist() for unit in found.units[1:]] == [[value], [value, value]]
  return value


def test_a_refused_measure_changes_nothing(fake, shared, tmp_path, monkeypatch):
  take, folder = fake
  before = tree(folder)
  monkeypatch.setattr(Fake, 'refused', 0)
  for _ in range(2):
    with pytest.raises(UserError, match='refused'):
      take(folder, 2)
    assert tree(folder) == before and run.missing(run.target(folder), [Fake()], shared) == []
  fresh = measured.finished(tmp_path / 'fresh', measured.cell())
  with pytest.raises(UserError, match='refused'):
    take(fresh)
  assert not (tmp_path / 'fresh' / schema.MEASURES).exists()
  monkeypatch.setattr(Fake, 'refused', 2)
  with pytest.raises(UserError, match='refused'):
    take(folder, 2)
  assert before.items() <= tree(folder).items() and level(folder, shared) == 1


def test_killed_anywhere_with_other_settings_a_whole_measure_stands(fake, shared, tmp_path, monkeypatch):
  """Then the new settings end with the bytes of a run that nobody disturbed, and so do the old ones."""
  take, folder = fake
  whole = {1: tree(folder)}
  shutil.copytree(folder, tmp_path / 'second')
  take(str(tmp_path / 'second'), 2)
  whole[2] = tree(tmp_path / 'second')
  fresh = measured.finished(tmp_path / 'fresh', measured.cell())
  take(fresh, 2)
  assert whole[2] == tree(fresh) != whole[1]
  genuine = {name: getattr(files, name) for name in ('append', 'replace', 'move', 'remove')}
  left = 0

  def killing(name):
    def call(*args):
      nonlocal left
      left -= 1
      if left < 0:
        if name == 'append':
          genuine[name](args[0], args[1][: len(args[1]) // 2])  # a line cut short
        raise Killed
      return genuine[name](*args)

    return call

  stood = []
  for at in itertools.count():
    broken = tmp_path / f'{at}'
    shutil.copytree(folder, broken)
    with monkeypatch.context() as patched:
      for name in genuine:
        patched.setattr(files, name, killing(name))
      left = at
      try:
        take(str(broken), 2)
        break
      except Killed:
        pass
    stood.append(level(str(broken), shared))
    done = sum(path.read_bytes().count(b'\n') - 1 for path in broken.glob('measures/fake.*.jsonl'))
    for goes_on in (2, 1):
      other = tmp_path / f'{at}.{goes_on}'
      shutil.copytree(broken, other)
      Fake.ran.clear()
      take(str(other), goes_on)
      todo = {(1, 2): range(done, 3), (2, 1): range(3)}.get((stood[-1], goes_on), range(0))
      assert Fake.ran == [(goes_on, unit) for unit in todo] and level(str(other), shared) == goes_on
      if (stood[-1], goes_on) != (1, 1):  # which has nothing to do
        assert tree(other) == whole[goes_on]
  assert at >= 9 and set(stood) == {1, 2}


def test_lines_of_an_older_version_that_took_the_names_of_others_are_gone_on_with(fake, shared, tmp_path):
  """It wrote over the lines of a finished measure at once."""
  take, folder = fake
  second = str(tmp_path / 'second')
  shutil.copytree(folder, second)
  take(second, 2)
  lines = pathlib.Path(results.path(second, 'fake.jsonl')).read_bytes().splitlines(keepends=True)
  for goes_on, ran in ((2, [(2, 1), (2, 2)]), (1, [(1, 0), (1, 1), (1, 2)])):
    broken = str(tmp_path / f'{goes_on}')
    shutil.copytree(folder, broken)
    pathlib.Path(results.path(broken, 'fake.jsonl')).write_bytes(b''.join(lines[:2]))
    Fake.ran.clear()
    take(broken, goes_on)
    assert Fake.ran == ran and tree(broken) == tree({1: folder, 2: second}[goes_on])


@pytest.mark.parametrize(
  'name, change, units',
  [
    ('fake.jsonl', lambda data: None, 3),
    ('fake.jsonl', lambda data: b'', 3),
    ('fake.jsonl', lambda data: data.replace(b'"level": 1', b'"level": 7', 1), 3),
    ('fake.jsonl', lambda data: data.replace(b'"unit": 1', b'"unit": 2'), 2),
    ('fake.jsonl', lambda data: data[:-20], 1),
    ('fake.jsonl', lambda data: data + data.splitlines(keepends=True)[-1], 0),
    ('fake.1.safetensors', lambda data: None, 2),
  ],
)
def test_a_finished_measure_without_its_lines_or_arrays_is_taken_again(fake, shared, name, change, units):
  take, folder = fake
  before, path = tree(folder), pathlib.Path(results.path(folder, name))
  data = change(path.read_bytes())
  path.unlink() if data is None else path.write_bytes(data)
  assert [one.NAME for one in run.missing(run.target(folder), [Fake()], shared)] == ['fake']
  with pytest.raises(UserError, match=r'cannot be believed .* take it again: python -m sae_jax.measure --cell='):
    run.finished(run.target(folder), 'fake', shared)
  Fake.ran.clear()
  take(folder)
  assert Fake.ran == [(1, unit) for unit in range(3 - units, 3)] and tree(folder) == before


def test_arrays_that_were_changed_are_made_again_as_the_message_says(fake, shared):
  take, folder = fake
  before, path = tree(folder), pathlib.Path(results.path(folder, 'fake.2.safetensors'))
  path.write_bytes(path.read_bytes()[:-1] + b'?')
  with pytest.raises(UserError, match=r'does not fit its digest\); delete its fake.jsonl and take it again: '):
    run.finished(run.target(folder), 'fake', shared)
  pathlib.Path(results.path(folder, 'fake.jsonl')).unlink()
  take(folder)
  assert tree(folder) == before


def test_a_ratio_and_its_error_are_those_of_resampling():
  rng = np.random.default_rng(0)
  under_U = rng.uniform(3, 5, 400)
  over_U = 0.7 * under_U + rng.normal(0, 0.3, 400)
  found = estimate.ratio(over_U, under_U, '')
  draws = rng.integers(0, 400, (2000, 400))
  resampled = (over_U[draws].sum(axis=1) / under_U[draws].sum(axis=1)).std()
  assert found.value == pytest.approx(over_U.sum() / under_U.sum()) and found.se == pytest.approx(resampled, rel=0.1)
  assert estimate.ratio([1.0], [2.0], '').se is None


def test_paired_errors_leave_out_what_both_share(shared, tmp_path):
  """The windows differ far more than the autoencoders do."""
  rng = np.random.default_rng(1)
  window = rng.normal(3, 1, 40)

  def records(gap):
    ce = window + gap + rng.normal(0, 0.02, 40)
    sums = {'ce': ce, 'kl': ce - 2, 'clean_ce': window - 0.1, 'zero_ce': window + 9, 'zero_kl': window}
    sums |= {'mean_ce': window + 5, 'mean_kl': window, 'tokens': np.ones(40)}
    return [{name: a[i : i + 8].tolist() for name, a in sums.items()} for i in range(0, 40, 8)]

  a, b = records(0.3), records(0.1)
  found = paired.differences(Downstream(), a, b)['kl']
  alone = [Downstream().values([Unit(record) for record in one])['kl'].se for one in (a, b)]
  assert found['value'] == pytest.approx(0.2, abs=0.02)
  assert found['se'] < 0.1 * np.hypot(*alone) and 0.5 < found['se'] / (0.02 * np.sqrt(2 / 40)) < 2


@pytest.mark.parametrize(
  'change, said',
  [
    (
      {'subject_sha256': 'a' * 64},
      'was trained on the subject toy with sha256 aaaaaaaaaaaa and the one found has none',
    ),
    ({'text_sha256': 'b' * 64, 'text': 'toy'}, 'was trained on the text toy with sha256 bbbbbbbbbbbb'),
  ],
)
def test_another_subject_or_text_than_the_cells_is_refused(toy, tmp_path, change, said):  # noqa: F811
  with pytest.raises(UserError, match=said):
    inputs.Inputs(measured.cell().data, measured.SCOPE, str(tmp_path), {'subject': 'toy'} | change, 'abc')


def test_cells_that_cannot_be_measured_say_why(toy, tmp_path):  # noqa: F811
  planted = cells.cell()
  with pytest.raises(UserError, match=f'cell {planted.id} was trained on activations of no language model'):
    inputs.Inputs(planted.data, measured.SCOPE, str(tmp_path), {}, planted.id)
  with pytest.raises(UserError, match=r'has no config\.json; measures need a finished cell'):
    run.target(str(tmp_path / 'nothing'))
  folder = measured.finished(tmp_path / 'c', measured.cell())
  (tmp_path / 'c' / schema.RESULT).unlink()
  with pytest.raises(UserError, match=r'is waiting.*measures need a finished cell'):
    run.target(folder)
  measured.finished(tmp_path / 'd', measured.cell())
  path = tmp_path / 'd' / schema.ARTIFACT / 'ema.safetensors'
  path.write_bytes(path.read_bytes()[:-1] + b'?')
  with pytest.raises(UserError, match='was changed'):
    run.judged(run.target(str(tmp_path / 'd')))
  with pytest.raises(UserError, match="no measure 'kl'; use some of reconstruction, "):
    some(['kl'])


@pytest.fixture
def small_ledger(toy, tmp_path):  # noqa: F811
  """A ledger of three finished cells and an unfinished one."""
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  made = [measured.cell(**{'train.seed': seed}) for seed in range(4)]
  store.register(grid.Sweep('m', 'x.py', tuple(({'train.seed': c.train.seed}, c) for c in made), dropped=0))
  for c in made[:3]:
    folder = pathlib.Path(store.folder(c.id))
    (folder / schema.CONFIG).unlink()
    measured.finished(folder, c, seed=c.train.seed)
  return store, made


def measuring(store, *wanted):
  return sweep_measure.Measuring(ledger.Ledger(store.path), some(wanted), measured.SCOPE, None)


def test_cells_are_chosen_by_what_their_config_says(small_ledger):
  store, made = small_ledger
  settings = (store, some(['latents']), measured.SCOPE, None)
  chosen = sweep_measure.Measuring(*settings, where={'train.seed': '1', 'sae.activation': 'topk'})
  assert [of.id for of in chosen.targets] == [made[1].id]
  as_written = {'sae.k': '3', 'sae.latent_bias': 'true', 'optim.eps': '6.25e-10', 'loss.dead_share': '0.0'}
  assert len(sweep_measure.Measuring(*settings, where=as_written).targets) == 3
  for where in ({'train.seed': '9'}, {'train.sed': '1'}, {'sae': '1'}, {'': ''}):
    with pytest.raises(UserError, match='leaves no finished cell'):
      sweep_measure.Measuring(*settings, where=where)


def test_two_workers_share_a_ledger_and_do_no_unit_twice(small_ledger, monkeypatch):
  """The second starts while the first is at its first unit. It takes the other cells, then waits for what the first has."""
  store, made = small_ledger
  done, second = [], []
  add, run_unit = results.Lines.add, Downstream.run
  monkeypatch.setattr(
    results.Lines, 'add', lambda self, record: (done.append((self._path, len(self.records))), add(self, record))[1]
  )

  def begun(self, unit, of, shared):
    if not second:
      second.append(measuring(store, 'downstream'))
      with monkeypatch.context() as patched:
        patched.setattr(sweep_measure.time, 'sleep', lambda _: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
          sweep_measure.work(second[0], work.Stop(), visible=False)
      assert len({path for path, _ in done}) == 2
    return run_unit(self, unit, of, shared)

  monkeypatch.setattr(Downstream, 'run', begun)
  first = measuring(store, 'downstream')
  assert sweep_measure.work(first, work.Stop(), visible=False) and not first.refused
  assert len(done) == len(set(done)) and len({path for path, _ in done}) == 3
  for c in made[:3]:
    assert results.read(store.folder(c.id), c.id)


def test_status_shows_what_is_measured_and_gc_keeps_it(small_ledger):
  store, made = small_ledger
  assert not any('measures' in row for row in status.report(store, 3)['cells'])
  assert sweep_measure.work(measuring(store), work.Stop(), visible=False)
  folders = [pathlib.Path(store.folder(c.id)) for c in made[:3]]
  for name in (schema.CHECKPOINTS, schema.CORRUPT):
    (folders[2] / name / '5').mkdir(parents=True)
  before = tree(folders[2])
  for garbage in gc.find(ledger.Ledger(store.path)):
    gc.free(garbage)
  assert tree(folders[2]) == before and not (folders[2] / schema.CHECKPOINTS).exists()
  measured.finished(folders[0], made[0], seed=9)
  broken = folders[1] / schema.MEASURES / schema.MEASURES_INFO
  broken.write_bytes(broken.read_bytes().replace(b'"value": 0', b'"value": 1', 1))
  rows = {row['id']: row for row in status.report(ledger.Ledger(store.path), 3)['cells']}
  assert all('replaced' in why for why in rows[made[0].id]['measures'].values())
  assert (
    rows[made[1].id]['measures'] == {} and 'measures.json: it does not fit its digest' in rows[made[1].id]['reason']
  )
  assert rows[made[2].id]['measures'] == dict.fromkeys(sorted(names.USUAL), '')
  shown = status.text(status.report(ledger.Ledger(store.path), 3))
  assert 'downstream (stale)' in shown and 'measured' in shown.splitlines()[1]


def test_a_cell_that_fails_is_named_and_the_others_are_measured(small_ledger, capsys):
  store, made = small_ledger
  bad = pathlib.Path(store.folder(made[1].id)) / schema.ARTIFACT / 'ema.safetensors'
  bad.write_bytes(bad.read_bytes()[:-1] + b'?')
  found = measuring(store)
  assert sweep_measure.work(found, work.Stop(), visible=False)
  assert list(found.refused) == [made[1].id] and 'was changed' in capsys.readouterr().err
  assert results.read(store.folder(made[2].id), made[2].id)
  asked = sweep_measure.Measuring(store, some([]), measured.SCOPE, None, [made[3].id])
  assert 'it is waiting' in asked.refused[made[3].id]
  with pytest.raises(UserError, match='no cell'):
    sweep_measure.Measuring(store, some([]), measured.SCOPE, None, ['0' * 12])


def test_commands_say_costs_and_values(small_ledger, capsys, monkeypatch):
  store, made = small_ledger
  small = ['--measures=downstream', '--windows=11', '--train_windows=9']
  lines = sweep_measure.preview(measuring(store, 'downstream'))
  assert lines[0].startswith('downstream: 3 of 3 cells') and 'FLOPs, at least' in lines[0]
  folders = [store.folder(c.id) for c in made[:2]]
  with pytest.raises(SystemExit) as ended:
    measure.main([f'--cell={folders[0]}', f'--against={folders[1]}', *small])
  assert ended.value.code == 0
  out = capsys.readouterr().out
  assert 'downstream/kl  ' in out and f'downstream/kl - that of {made[1].id}' in out and '±' in out
  # Latents are each autoencoder's own: what has errors over these, in arrays, cannot be paired.
  with pytest.raises(SystemExit) as ended:
    measure.main([f'--cell={folders[0]}', f'--against={folders[1]}', *small[1:], '--measures=n2g'])
  assert ended.value.code == 0
  said = capsys.readouterr().out
  none = 'n2g: no differences; none of its values has an error over windows, tasks or places of both\n'
  assert 'n2g/recall  ' in said and said.endswith(none) and 'that of' not in said
  with pytest.raises(SystemExit):
    measure.main([f'--cell={folders[0]}', *small, '--dry_run'])
  assert f'{made[0].id} downstream: done' in capsys.readouterr().out
  lines = pathlib.Path(results.path(folders[1], 'downstream.jsonl'))
  lines.write_bytes(lines.read_bytes().replace(b'"kl": [', b'"kl": [7', 1))
  with monkeypatch.context() as patched, pytest.raises(SystemExit):
    patched.setattr(measure, 'measured', lambda *_: True)  # another process changes them after that
    measure.main([f'--cell={folders[0]}', f'--against={folders[1]}', *small])
  assert re.fullmatch(rf'error: downstream of {made[1].id} cannot be believed .*\n', capsys.readouterr().err)
  with pytest.raises(SystemExit):
    measure.main([f'--cell={folders[0]}', f'--against={folders[1]}', *small])
  assert capsys.readouterr().out == out
  # Inputs of all cells of a ledger are in one place.
  assert (pathlib.Path(store.path) / schema.MEASURES).is_dir() and not (
    pathlib.Path(folders[0]) / 'measures/inputs'
  ).exists()


def test_measures_at_evaluation_steps_stand_in_the_metrics(toy, tmp_path):  # noqa: F811
  from sae_jax import metrics, training

  asked = {'eval.measures': 'downstream', 'eval.measure_windows': 4, 'train.checkpoint_every': 4}
  plain, cell = measured.cell(**{'train.checkpoint_every': 4}), measured.cell(**asked)
  assert plain.id != cell.id and 'measures' not in plain.to_record()['eval']
  assert training.train(cell, str(tmp_path / 'a')) == 'done'
  lines = metrics.read_metrics(str(tmp_path / 'a'), cell.id)
  assert all(line['eval/downstream/kl'] > 0 and line['eval/downstream/kl_se'] > 0 for line in lines)
  spent = [line['eval/measure_s'] for line in lines]
  assert spent == sorted(spent) and spent[0] > 0
  # What training writes is what it is without measures.
  assert training.train(plain, str(tmp_path / 'b')) == 'done'
  one, other = (json.loads((tmp_path / name / schema.RESULT).read_bytes()) for name in 'ab')
  assert one['params_digest'] == other['params_digest'] and one['nmse'] == other['nmse']
  # The last line is that of the finished autoencoder.
  shared = measured.inputs(tmp_path / 'again', Scope(4, 4))
  run.run(run.target(str(tmp_path / 'a')), [Downstream()], shared, None)
  found = results.read(str(tmp_path / 'a'), cell.id)['downstream'].values['kl']
  assert lines[-1]['eval/downstream/kl'] == pytest.approx(found['value'], rel=1e-4)
  with pytest.raises(UserError, match=r"eval.measures='kl': no measure 'kl'"):
    measured.cell(**{'eval.measures': 'kl'})
  with pytest.raises(UserError, match='activations of no language model'):
    cells.cell(**{'eval.measures': 'downstream'})
