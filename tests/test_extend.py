"""One run is one curve: longer runs pass through the ends of shorter ones, go on from them, and stop where they converge."""

import json
import pathlib
import shutil

import numpy as np
import pytest

from sae_jax import cell_state, convergence, extend, recipe, schema, startup, training
from sae_jax.errors import UserError
from sweeps import extend as sweeps_extend
from sweeps import launch, ledger
from tests import cells

OPEN = {'recipe.horizon': 'so far', 'optim.ema_decay': None, 'loss.dead_tokens': None}


def cell(steps: int, **overrides):
  return cells.cell(**OPEN | {'train.tokens': 40 * steps, 'train.checkpoint_every': 50} | overrides)


def result(folder):
  return json.loads((folder / 'result.json').read_text())


def lines(folder):
  return {line['step']: line for line in map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """Of 18 steps, of 32, and of 32 from the end of the first; 18 is where every longer run is evaluated, too."""
  folder = tmp_path_factory.mktemp('runs')
  with pytest.MonkeyPatch.context() as patch:
    for module in (extend, startup):
      patch.setattr(module, 'SAMPLE_TOKENS', 700)
    assert training.train(cell(18), str(folder / 'short')) == 'done'
    assert training.train(cell(32), str(folder / 'long')) == 'done'
    assert training.train(cell(32, **{'train.extends': 'short'}), str(folder / 'extended')) == 'done'
  return folder


def test_a_long_run_passes_through_the_end_of_a_short_one(runs):
  short, at_18 = result(runs / 'short'), lines(runs / 'long')[18]
  assert short['nmse_raw'] == at_18['eval/nmse_raw'] and short['nmse_ema'] == at_18['eval/nmse_ema']


def test_an_extended_run_ends_with_the_bits_of_one_from_the_start(runs):
  long, extended = result(runs / 'long'), result(runs / 'extended')
  assert long['id'] == extended['id'] and long['params_digest'] == extended['params_digest']
  assert extended['extends'] == {'cell': cell(18).id, 'step': 18} and 'extends' not in long
  assert {step: line['eval/nmse'] for step, line in lines(runs / 'long').items()} == {
    step: line['eval/nmse'] for step, line in lines(runs / 'extended').items()
  }


def test_a_run_killed_after_its_last_checkpoint_ends_with_the_result_it_would_have_had(runs):
  before = result(runs / 'short')
  (runs / 'short' / 'result.json').unlink()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(startup, 'SAMPLE_TOKENS', 700)
    assert training.train(cell(18), str(runs / 'short')) == 'done'
  again = result(runs / 'short')
  for key in before.keys() - {'wall_s', 'digest', 'artifact_sha256', 'artifact_bytes'}:
    assert again[key] == before[key], key


def test_an_extended_run_that_had_converged_ends_where_one_from_the_start_does(tmp_path):
  with pytest.MonkeyPatch.context() as patch:
    for module in (extend, startup):
      patch.setattr(module, 'SAMPLE_TOKENS', 700)
    stops = {'train.stop_gain': 0.25}
    for name, more in (('short', {}), ('long', {}), ('extended', {'train.extends': 'short'})):
      config = cell(130 if name == 'short' else 400, **stops | more)
      assert training.train(config, str(tmp_path / name)) == 'done'
  long, extended = result(tmp_path / 'long'), result(tmp_path / 'extended')
  assert cell_state.read(str(tmp_path / 'extended'), long['id']).state == schema.DONE
  for key in ('steps', 'params_digest', 'dead_fraction', 'nmse'):
    assert long[key] == extended[key], key


def test_an_extended_run_judges_convergence_where_one_from_the_start_does(tmp_path, monkeypatch):
  judged = []
  monkeypatch.setattr(convergence, 'has_converged', lambda curve, _: judged.append([at for at, *_ in curve]))
  for module in (extend, startup):
    monkeypatch.setattr(module, 'SAMPLE_TOKENS', 700)
  for name, steps, more in (('short', 25, {}), ('long', 32, {}), ('extended', 32, {'train.extends': 'short'})):
    config = cell(steps, **{'train.stop_gain': 0.2, 'train.checkpoint_every': 5} | more)
    assert training.train(config, str(tmp_path / name)) == 'done'
    assert judged.pop()[-1] == 18  # and not 25, which only the shorter run was measured at


@pytest.mark.parametrize(
  'overrides, message',
  [
    ({'train.extends': 'nobody'}, "train.extends='nobody': .* holds no cell"),
    ({'train.seed': 3}, r"train.extends='short' differs in train\.seed; only train\.tokens may be larger"),
    ({'train.tokens': 40 * 18}, 'no fewer than the 720 here; raise train.tokens'),
    ({}, 'fewer than 32768 tokens, and a longer run starts from a sample of so many; train without train.extends'),
  ],
)
def test_what_is_no_extension_is_refused(runs, tmp_path, overrides, message):
  config = cell(32, **{'train.extends': 'short'} | overrides)
  with pytest.raises(UserError, match=message):
    extend.shorter(config, str(runs / 'new'))


def test_a_run_whose_horizons_follow_the_budget_cannot_be_extended(tmp_path):
  for name, tokens in (('short', 800), ('long', 1600)):
    (tmp_path / name).mkdir()
    config = cells.cell(**{'train.tokens': tokens, 'train.extends': 'short' if name == 'long' else ''})
    (tmp_path / name / 'config.json').write_bytes(config.to_json())
    (tmp_path / name / 'result.json').write_text('{}')
  with pytest.raises(UserError, match='follow the budget, so a longer run is another'):
    extend.shorter(config, str(tmp_path / 'long'))
  with pytest.raises(UserError, match='feign convergence'):
    cells.cell(**{'train.stop_gain': 0.1})


def test_a_dead_threshold_in_tokens_leaves_one_curve():
  assert cell(20, **{'loss.dead_share': 0.0, 'loss.dead_tokens': 400, 'train.stop_gain': 0.1}).one_curve
  assert cell(20).one_curve and not cells.cell().one_curve


def test_a_run_ends_where_it_has_converged_and_resumes_into_the_same(tmp_path):
  config = cell(2000, **{'train.stop_gain': 0.2})
  assert training.train(config, str(tmp_path / 'whole')) == 'done'
  seen = iter([False] * 58 + [True])
  assert training.train(config, str(tmp_path / 'halves'), should_stop=lambda: next(seen)) == 'preempted'
  assert training.train(config, str(tmp_path / 'halves')) == 'done'
  whole, halves = result(tmp_path / 'whole'), result(tmp_path / 'halves')
  assert 100 <= whole['steps'] < 2000 and whole['tokens'] == 40 * whole['steps'] and whole['tokens_asked'] == 80_000
  assert (whole['steps'], whole['params_digest']) == (halves['steps'], halves['params_digest'])
  (tmp_path / 'whole' / 'result.json').unlink()  # killed after the last checkpoint
  assert training.train(config, str(tmp_path / 'whole')) == 'done'
  assert result(tmp_path / 'whole')['params_digest'] == halves['params_digest']


def test_convergence_is_the_gain_of_the_last_doubling():
  steps = np.array([1, 10, 32, 56, 100, 178, 316, 562, 1000])
  falling = [[int(t), float(t**-0.2), 9.0] for t in steps]  # gains 13 % at every doubling
  assert convergence.has_converged(falling, 0.14) and not convergence.has_converged(falling, 0.12)
  assert not convergence.has_converged(falling, 0.0)
  assert not convergence.has_converged([[1, 1.0, 9.0], [10, 1.0, 9.0], [56, 1.0, 9.0]], 0.5)  # too early to tell
  assert not convergence.has_converged([[400, 1.0, 9.0], [500, 1.0, 9.0]], 0.5)  # nothing is known of half the steps


def test_a_curve_whose_l0_still_moves_has_not_converged():
  for last, converged in ((9.0, True), (9.3, True), (8.0, False), (11.0, False), (0.0, False)):
    for nmse in (1.0, 1.5):  # fewer latents, a larger loss: no gain
      assert convergence.has_converged([[100, 1.0, 9.0], [200, nmse, last]], 0.01) == converged
  assert not convergence.has_converged([[100, 1.0], [200, 1.0, 9.0]], 0.5)  # of a checkpoint without L0


@pytest.mark.parametrize('name', ['relu', 'gated'])
def test_a_steered_run_does_not_end_before_it_is_at_its_target(name, tmp_path):
  config = cell(400, **cells.family_keys(name) | {'train.stop_gain': 0.2, 'train.checkpoint_every': 400})
  assert training.train(config, str(tmp_path)) == 'done'
  found = result(tmp_path)
  assert found['steps'] == 400 or abs(np.log(found['l0'] / config.sae.k)) < 0.2, found


def test_the_open_recipe_is_the_paper_s_but_for_its_horizons():
  sizes = {'n_latents': 4096, 'd_model': 576, 'batch_tokens': 2048}
  short, long = (recipe.ONE_CURVE.hyperparameters(tokens=tokens, **sizes) for tokens in (10**6, 10**9))
  assert short == long and short['optim.ema_width'] == short['loss.dead_share'] == 0.1


def test_a_cell_whose_shorter_one_lost_its_checkpoints_is_trained_from_the_start_and_says_so(runs, tmp_path, capsys):
  shutil.copytree(runs / 'short', tmp_path / 'short', ignore=shutil.ignore_patterns('ckpt'))
  with pytest.MonkeyPatch.context() as patch:
    for module in (extend, startup):
      patch.setattr(module, 'SAMPLE_TOKENS', 700)
    config, stops = cell(32, **{'train.extends': 'short'}), iter([False] * 9 + [True])
    assert training.train(config, str(tmp_path / 'anew'), should_stop=lambda: next(stops)) == 'preempted'
    assert training.train(config, str(tmp_path / 'anew')) == 'done'
    assert training.train(cell(40, **{'train.extends': 'anew'}), str(tmp_path / 'longer')) == 'done'
  anew, longer = result(tmp_path / 'anew'), result(tmp_path / 'longer')
  assert anew['params_digest'] == result(runs / 'long')['params_digest']
  assert 'extends' not in anew and anew['not_extended'] == extend.NO_CHECKPOINT
  assert 'not_extended' not in longer and longer['extends'] == {'cell': anew['id'], 'step': 32}
  assert f"train.extends='short': {extend.NO_CHECKPOINT}; training from the start" in capsys.readouterr().err
  assert not (tmp_path / 'short' / 'ckpt').exists()


def saved(folder, step):
  """What stands for a checkpoint where only its being there counts."""
  (pathlib.Path(folder) / 'ckpt' / str(step)).mkdir(parents=True)
  (pathlib.Path(folder) / 'ckpt' / str(step) / 'arrays').touch()


def test_a_launch_lets_cells_go_on_from_the_longest_that_can_be_used(tmp_path):
  """Of each seed there are finished cells of some budgets, and a longer one is asked for."""
  store = ledger.Ledger(str(tmp_path))
  few, enough, more, most = startup.SAMPLE_TOKENS - 1, *(startup.SAMPLE_TOKENS * n for n in (1, 2, 3))
  finished = [(0, few), (1, few), (1, enough), (2, enough), (3, enough), (3, more)]
  asked = [{'train.seed': seed, 'train.tokens': most} for seed in range(6)]
  store.register(cells.sweep(*({'train.seed': seed, 'train.tokens': t} for seed, t in finished), *asked[4:], base=OPEN))
  ids = {}
  for one in (entry.cell for entry in store.entries()):
    ids[one.train.seed, one.train.tokens] = one.id
    if one.train.tokens < most:
      folder = cells.write(tmp_path, one)
      if (one.train.seed, one.train.tokens) not in [(2, enough), (3, more)]:
        saved(folder, one.train.steps)
  saved(store.folder(ids[4, most]), 5)  # under way; of the last nothing shorter is finished
  longer = cells.sweep({'train.seed': 3, 'train.tokens': more}, *asked, base=OPEN)
  found, said = sweeps_extend.extended(longer, store, 3)
  assert [one.train.extends for _, one in found.cells] == ['', '', ids[1, enough], '', ids[3, enough], '', '']
  assert [one.id for _, one in found.cells] == [one.id for _, one in longer.cells]
  assert said == (
    '2 cells go on from shorter ones, 3 are trained from the start (1: the shorter cell has fewer than 32768 tokens, and a '
    'longer run starts from a sample of so many; 1: the shorter cell has no checkpoint left (sweeps.gc removes them); 1: '
    'no finished cell differs in train.tokens alone and has fewer)'
  )


def test_a_first_launch_and_one_whose_horizons_follow_the_budget_say_why_nothing_is_extended(tmp_path, capsys):
  grid = tmp_path / 'grid.py'
  for base, why in ((OPEN, 'no finished cell differs'), ({}, 'averages and thresholds follow the budget')):
    grid.write_text(f'from experiments import tiny as EXPERIMENT\ndef sweep():\n  return [{base}]\n')
    with pytest.raises(SystemExit) as ended:
      launch.main(
        [f'--sweep={grid}', f'--ledger={tmp_path / "ledger"}', '--extend', '--dry_run', '--flops_per_second=1e9']
      )
    assert not ended.value.code
    assert f'0 cells go on from shorter ones, 1 are trained from the start (1: {why}' in capsys.readouterr().err
