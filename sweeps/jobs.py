"""What a sweep becomes on a cluster: one gang for each cell or group of cells, or a few gangs that share all cells."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Protocol

from sae_jax import files, flops, schema
from sae_jax.config import Cell
from sae_jax.errors import UserError
from sweeps import executors, groups, ledger, work


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
    slurm.Slurm(site, folder, f'sae-{name}-'),
    site.shape,
    site.poll_s,
    str(folder),
    {'grace_s': site.grace_s, 'max_restarts': site.max_restarts},
  )


def jobset_cluster(site_file: str | None, ledger_path: str) -> Cluster:
  from sweeps.executors import jobset, jobset_site, xpk

  if site_file is None:
    raise UserError('--executor=jobset needs --site=FILE.toml, which says what cluster, slice and image to use')
  site = jobset_site.read_site(site_file)

  def shape(devices: int) -> tuple[int, int]:
    if devices > site.chips or (site.hosts > 1 and devices != site.chips):
      raise UserError(
        f'a mesh of {devices} devices does not fill {site.tpu_topology}, which has {site.chips} chips; set '
        'mesh.data and mesh.latent so that their product does'
      )
    return site.hosts, 1

  limits = {'grace_s': site.grace_s, 'max_restarts': site.max_restarts}
  engine = (xpk.Xpk if site.xpk_cluster else jobset.JobSet)(site, ledger_path)
  return Cluster(engine, shape, 15.0, 'the pods: kubectl logs', limits)


def jobs(
  store: ledger.Ledger,
  cluster: Cluster,
  states: list[ledger.EntryState],
  gangs: int | None,
  max_failures: int,
  group: int | None = None,
) -> list[executors.Job]:
  """Jobs for the cells that wait: one for each group of cells, the largest first, or `gangs` jobs that share all cells.

  `groups.most` says how many cells are a group; mostly it is one. Cells that someone trains now are left to whoever does.
  Raises `UserError` when cells of unequal meshes would share a gang.
  """
  waiting = {s.entry.id for s in states if s.state == 'waiting'}
  command = work.command(store, max_failures, group)

  def job(name: str, argv: tuple[str, ...], cell: Cell) -> executors.Job:
    hosts, processes = cluster.shape(devices_of(cell))
    return executors.Job(name, argv, hosts=hosts, processes_per_host=processes, **cluster.limits)

  if gangs is None:
    return [
      job(_name(entries), (*command, f'--cell={",".join(e.id for e in entries)}'), entries[0].cell)
      for entries in _partition(states, group)
      if any(e.id in waiting for e in entries)
    ]
  meshes = {devices_of(s.entry.cell): s.entry.cell for s in states if s.entry.id in waiting}
  if len(meshes) > 1:
    raise UserError(
      f'--gangs={gangs}: cells for {min(meshes)} and for {max(meshes)} devices cannot share a gang; leave --gangs out'
    )
  return [job(f'gang-{i}', command, cell) for cell in meshes.values() for i in range(min(gangs, len(waiting)))]


def names(states: list[ledger.EntryState], gangs: int | None, group: int | None = None) -> list[str]:
  """Ids of the jobs that the unfinished cells may have, from this launch or an earlier one."""
  if gangs is not None:
    return [f'gang-{i}' for i in range(gangs)]
  unfinished = {s.entry.id for s in states if s.state in schema.UNFINISHED}
  return [_name(entries) for entries in _partition(states, group) if any(e.id in unfinished for e in entries)]


def _partition(states: list[ledger.EntryState], group: int | None) -> list[list[ledger.Entry]]:
  ordered = sorted(states, key=lambda s: (-flops.cell_flops(s.entry.cell)['dense'], s.entry.id))
  return groups.partition([s.entry for s in ordered], group)


def _name(entries: list[ledger.Entry]) -> str:
  return entries[0].id if len(entries) == 1 else f'group-{entries[0].id}'


def devices_of(cell: Cell) -> int:
  return cell.mesh.data * cell.mesh.latent
