"""What is handed to Weights & Biases, by a stand-in for its package."""

import sys
import types

import pytest

from experiments import tiny
from sae_jax import config, metrics
from sae_jax.errors import UserError
from sweeps import grid, ledger, wandb


class Service(types.ModuleType):
  """Keeps runs by id over several exports, as the service does."""

  def __init__(self):
    super().__init__('wandb')
    self.runs = {}

  def init(self, *, project, id, name, config, resume, mode):
    assert resume == 'allow' and project == 'p' and mode == 'offline'
    run = self.runs.setdefault(id, types.SimpleNamespace(step=0, logged=[], open=True, name=name, config=config))

    def log(values, step):
      run.logged.append((step, values))
      run.step = step + 1

    run.log, run.finish = log, lambda: setattr(run, 'open', False)
    return run


@pytest.fixture
def store(tmp_path):
  made = ledger.Ledger(str(tmp_path / 'ledger'))
  cells = tuple((o, config.resolve(config.override(tiny.get_config(), o))) for o in ({'sae.k': 3}, {'sae.k': 5}))
  made.register(grid.Sweep('two', 'experiments/tiny.py', cells, dropped=0))
  return made


def test_export_sends_every_line_once(store, monkeypatch):
  service = Service()
  monkeypatch.setitem(sys.modules, 'wandb', service)
  first = store.entries()[0]
  file = metrics.MetricsFile(store.folder(first.id), first.id)
  file.write(1, {'eval/nmse': 0.5})
  assert wandb.export(store, 'p', 'offline') == 1  # the other cell has no metrics: no empty run
  file.write(2, {'eval/nmse': 0.25})
  assert wandb.export(store, 'p', 'offline') == 1
  (run,) = service.runs.values()
  assert run.logged == [(1, {'eval/nmse': 0.5}), (2, {'eval/nmse': 0.25})]
  assert run.config == first.cell.flat() and run.name == grid.label(first.overrides) and not run.open


def test_export_without_the_package_names_the_extra(store, monkeypatch):
  monkeypatch.setitem(sys.modules, 'wandb', None)
  with pytest.raises(UserError, match=r'sae_jax\[wandb\]'):
    wandb.export(store, 'p')
