"""What a launch asks of an engine, with one that only pretends."""

import pytest

from sae_jax import flops, plan
from sae_jax.errors import UserError
from sweeps import grid, jobs, launch, ledger, preview
from tests import cells
from tests.test_launch import SHORT


class FakeEngine:
  """An engine whose jobs are where the test says; `at_poll` runs before each look at them."""

  def __init__(self, at_poll=lambda engine: None):
    self.jobs, self.state, self.cancelled, self.at_poll = {}, {}, [], at_poll

  def render(self, jobs):
    return '\n'.join(f'job {job.id}' for job in jobs)

  def submit(self, job):
    if self.state.get(job.id, 'gone') == 'gone':
      self.jobs[job.id], self.state[job.id] = job, 'pending'
    return job.id

  def states(self, ids):
    self.at_poll(self)
    return {job_id: self.state.get(job_id, 'gone') for job_id in ids}

  def cancel(self, job_id):
    self.cancelled.append(job_id)


def fake_cluster(engine):
  return jobs.Cluster(engine, lambda devices: (devices, 1), 0.01, 'nowhere', {'grace_s': 7})


@pytest.fixture
def registered(tmp_path):
  """A ledger with the six short cells, none trained."""
  (tmp_path / 'cells.py').write_text(SHORT)
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(grid.build(str(tmp_path / 'cells.py')))
  return store


def commit(store, cell_id):
  (config,) = (entry.cell for entry in store.entries() if entry.id == cell_id)
  cells.finish(store.folder(cell_id), config)


def test_follow_submits_a_job_a_cell_and_watches_to_the_end(registered, capsys):
  def one_more(engine):
    waiting = [job_id for job_id, state in engine.state.items() if state == 'pending']
    if waiting:
      commit(registered, waiting[0])
      engine.state[waiting[0]] = 'gone'

  engine = FakeEngine(one_more)
  launch.follow(registered, fake_cluster(engine), None, [], 3)
  states = registered.states()
  assert all(s.state == 'done' for s in states) and not engine.cancelled
  assert set(engine.jobs) == {s.entry.id for s in states}
  for job in engine.jobs.values():
    assert job.argv[1:3] == ('-m', 'sweeps.work') and f'--cell={job.id}' in job.argv and job.grace_s == 7
  cost = [flops.cell_flops(next(s.entry.cell for s in states if s.entry.id == i))['dense'] for i in engine.jobs]
  assert cost == sorted(cost, reverse=True)
  told = capsys.readouterr().out
  assert '1 done, 0 running, 0 failed, 5 waiting' in told and '; jobs: 0 running, 5 pending' in told
  assert told.splitlines()[-1].startswith('6 done')


def test_follow_leaves_jobs_alone_when_it_must_go(registered):
  received = []
  engine = FakeEngine(lambda engine: received.append(2))
  launch.follow(registered, fake_cluster(engine), None, received, 3)
  assert len(engine.jobs) == 6 and not engine.cancelled
  before = dict(engine.jobs)
  launch.follow(registered, fake_cluster(engine), None, [], 3, detach=True)
  assert engine.jobs == before  # found by their ids


def test_follow_does_not_submit_a_lost_job_again(registered):
  submitted = []
  engine = FakeEngine(lambda engine: engine.state.update(dict.fromkeys(engine.state, 'gone')))
  submit, engine.submit = engine.submit, lambda job: submitted.append(job.id) or submit(job)
  launch.follow(registered, fake_cluster(engine), None, [], 3)
  assert len(submitted) == 6 and not any(s.state == 'done' for s in registered.states())


def test_follow_finds_the_running_job_of_an_earlier_launch(registered):
  """Its cell is running when the launch looks first, and waits between two runs of the job when it looks again."""
  first, *others = registered.entries()
  for cell in others:
    commit(registered, cell.id)
  held = registered.claim(first.id)
  looks = []

  def preempted_then_done(engine):
    looks.append(engine.state[first.id])
    if len(looks) == 1:
      held.release()
    if len(looks) == 3:
      commit(registered, first.id)
      engine.state[first.id] = 'gone'

  engine = FakeEngine(preempted_then_done)
  engine.state[first.id] = 'running'
  launch.follow(registered, fake_cluster(engine), None, [], 3)
  assert not engine.jobs and looks == ['running'] * 3 and registered.states()[0].state == 'done'


def test_cells_of_one_stream_are_one_job_when_groups_are_wanted(registered):
  engine = FakeEngine()
  given = registered, fake_cluster(engine)
  made = jobs.jobs(*given, registered.states(), None, 3, group=4)
  assert [len(cells_of(job)) for job in made] == [4, 2]
  assert all(job.id == f'group-{cells_of(job)[0]}' and '--group=4' in job.argv for job in made)
  assert sorted(i for job in made for i in cells_of(job)) == sorted(c.id for c in registered.entries())
  commit(registered, cells_of(made[0])[0])  # its job may be alive, and is found again by its name
  assert jobs.jobs(*given, registered.states(), None, 3, group=4) == made
  assert jobs.names(registered.states(), None, 4) == [job.id for job in made]
  for cell_id in cells_of(made[1]):
    commit(registered, cell_id)
  assert jobs.names(registered.states(), None, 4) == [made[0].id]


def cells_of(job):
  (stated,) = [word for word in job.argv if word.startswith('--cell=')]
  return stated.removeprefix('--cell=').split(',')


def test_gangs_share_the_cells_and_unneeded_ones_are_cancelled(registered):
  def first_does_all(engine):
    engine.state['gang-0'] = 'running'
    for s in registered.states():
      if s.state == 'waiting':
        commit(registered, s.entry.id)

  engine = FakeEngine(first_does_all)
  launch.follow(registered, fake_cluster(engine), 2, [], 3)
  assert list(engine.jobs) == ['gang-0', 'gang-1'] and engine.cancelled == ['gang-1']
  assert not any(arg.startswith('--cell') for job in engine.jobs.values() for arg in job.argv)


def test_jobs_are_for_waiting_cells_and_their_meshes(tmp_path):
  text = SHORT + "  cells[0]['mesh.data'] = 2\n  return cells\n"
  (tmp_path / 'cells.py').write_text(text.replace('return grid', 'cells = grid'))
  store = ledger.Ledger(str(tmp_path / 'ledger'))
  store.register(grid.build(str(tmp_path / 'cells.py')))
  cluster = fake_cluster(FakeEngine())
  first, second, *_ = store.entries()
  with store.claim(second.id):
    found = {job.id: job for job in jobs.jobs(store, cluster, store.states(), None, 3)}
  assert len(found) == 5 and second.id not in found
  assert {job_id: job.hosts for job_id, job in found.items()} == {i: 1 + (i == first.id) for i in found}
  with pytest.raises(UserError, match='for 1 and for 2 devices cannot share a gang'):
    jobs.jobs(store, cluster, store.states(), 2, 3)
  commit(store, first.id)
  assert len(jobs.jobs(store, cluster, store.states(), 9, 3)) == 5


def test_dry_run_prices_each_shape_once(registered, monkeypatch):
  asked = []

  def planned(config, topology):
    asked.append((config.sae.n_latents, config.sae.k))
    mesh = {'data': 2, 'latent': 1}
    return plan.Plan(
      **dict.fromkeys(plan.Plan.__dataclass_fields__) | dict(seconds=36.0, chips=2, mesh=mesh, memory_fraction=0.5)
    )

  monkeypatch.setattr(plan, 'plan', planned)
  states = registered.states()
  commit(registered, states[0].entry.id)
  text = preview.cost_table([*registered.states(), *states[1:]], 'v5p:2', 1.5)
  # Ten cells of five shapes, 20 steps of 36 s on two chips each.
  assert len(asked) == len(set(asked)) == 5
  assert '10 cells, 4 chip-hours, 6.00 dollars at 1.5 a chip-hour' in text
  assert text.splitlines()[1].split()[-4:] == ['2x1', '50.0%', '0.4', '0.60']
