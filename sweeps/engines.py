"""What a sweep becomes on a cluster: one gang a cell, or a few gangs of workers that go through many short cells."""

import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Callable
from typing import Protocol

from sae_jax import files, flops
from sae_jax.config import Config
from sae_jax.errors import UserError
from sweeps import executors, ledger
from sweeps.board import UNFINISHED


class Engine(executors.Executor, Protocol):
  """An executor that can also show what it would send to its cluster."""

  def render(self, jobs: list[executors.Job]) -> str:
    """What `submit` would send for these jobs."""
    ...


@dataclasses.dataclass(frozen=True)
class Cluster:
  engine: Engine
  shape: Callable[[int], tuple[int, int]]  # hosts, and processes on each, for a mesh of so many devices
  poll_s: float  # between two looks
  logs: str  # where a person finds the output
  limits: dict[str, int] = dataclasses.field(default_factory=dict)  # grace_s, max_restarts of its jobs


def slurm_cluster(site_file: str | None, ledger_path: str) -> Cluster:
  from sweeps.executors import slurm

  site = slurm.read_site(site_file)
  name = hashlib.sha256(ledger_path.encode()).hexdigest()[:8]
  folder = (
    files.local(files.join(ledger_path, 'slurm'))
    if files.is_local(ledger_path)
    else pathlib.Path('slurm', name).absolute()  # a bucket takes no scripts and no logs that are appended to
  )
  return Cluster(
    slurm.Slurm(site, folder, f'sae-{name}-'), site.shape, site.poll_s, str(folder),
    {'grace_s': site.grace_s, 'max_restarts': site.max_restarts},
  )  # fmt: skip


def jobset_cluster(site_file: str | None, ledger_path: str) -> Cluster:
  from sweeps.executors import jobset, jobset_site

  if site_file is None:
    raise UserError(
      '--executor=jobset needs --site=FILE.toml, which says what cluster, slice and image to use'
    )
  site = jobset_site.read_site(site_file)

  def shape(devices: int) -> tuple[int, int]:
    if devices > site.chips or (site.hosts > 1 and devices != site.chips):
      raise UserError(
        f'a mesh of {devices} devices does not fill {site.tpu_topology}, which has {site.chips} chips; set '
        'mesh.data and mesh.latent so that their product does'
      )
    return site.hosts, 1

  limits = {'grace_s': site.grace_s, 'max_restarts': site.max_restarts}
  return Cluster(jobset.JobSet(site, ledger_path), shape, 15.0, 'the pods: kubectl logs', limits)


def jobs(
  store: ledger.Ledger, cluster: Cluster, states: list[ledger.CellState], gangs: int | None, max_failures: int
) -> list[executors.Job]:
  """Jobs for the cells that wait: one a cell, the largest first, or `gangs` jobs that share them all.

  A cell that someone trains now is left to whoever does. Raises `UserError` when cells of unequal meshes would share
  a gang.
  """
  waiting = sorted((s for s in states if s.state == 'waiting'), key=lambda s: (-_cost(s), s.cell.id))
  work = (sys.executable, '-m', 'sweeps.work', f'--ledger={store.path}', f'--max_failures={max_failures}')

  def job(name: str, argv: tuple[str, ...], devices: int) -> executors.Job:
    hosts, processes = cluster.shape(devices)
    return executors.Job(name, argv, hosts=hosts, processes_per_host=processes, **cluster.limits)

  if gangs is None:
    return [job(s.cell.id, (*work, f'--cell={s.cell.id}'), devices_of(s.cell.config)) for s in waiting]
  sizes = sorted({devices_of(s.cell.config) for s in waiting})
  if len(sizes) > 1:
    raise UserError(
      f'--gangs={gangs}: cells for {sizes[0]} and for {sizes[-1]} devices cannot share a gang; leave --gangs out'
    )
  return [job(f'gang-{i}', work, sizes[0]) for i in range(min(gangs, len(waiting)))]


def names(states: list[ledger.CellState], gangs: int | None) -> list[str]:
  """Ids of the jobs, of this launch or an earlier one, that the unfinished cells may have."""
  unfinished = [s.cell.id for s in states if s.state in UNFINISHED]
  return unfinished if gangs is None else [f'gang-{i}' for i in range(gangs)]


def devices_of(config: Config) -> int:
  return config.mesh.data * config.mesh.latent * config.mesh.member


def _cost(state: ledger.CellState) -> float:
  return flops.cell_flops(state.cell.config)['dense']
