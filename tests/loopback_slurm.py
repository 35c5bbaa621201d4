"""A real Slurm cluster on the loopback addresses of this machine, for as long as a `with` block lasts.

Needs root and the Debian packages slurmctld, slurmd, slurm-client and munge; starts no service of the system.
"""

import contextlib
import dataclasses
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

_NODE = 'SLURMD_NODENAME'
PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'srun', 'squeue', 'scontrol', 'scancel', 'sinfo')

# Nodes are named by their addresses because jax takes its coordinator from the node list and resolves it. The short
# credential lifetime and slurmd timeout are what a requeue waits for.
CONF = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/ctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/ended.txt
ReturnToService=2
JobRequeue=1
MessageTimeout=5
SlurmdTimeout=6
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=127.0.0.[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.[1-{nodes}] Port=[{node_ports}] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
  """Why no cluster can be started here; empty when one can."""
  absent = [name for name in PROGRAMS if not shutil.which(name)]
  if absent:
    return f'{", ".join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)'
  return '' if os.geteuid() == 0 else 'slurmd wants root'


@dataclasses.dataclass
class Cluster:
  folder: pathlib.Path
  env: dict[str, str]  # for clients; everything they need is SLURM_CONF
  nodes: dict[str, subprocess.Popen] = dataclasses.field(default_factory=dict)

  def call(self, *argv: str) -> str:
    """Runs a client command and returns its output."""
    done = subprocess.run(argv, env=self.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (argv, done.stderr, self.log())
    return done.stdout

  def log(self) -> str:
    return (self.folder / 'ctld.log').read_text()[-3000:]

  def start_node(self, name: str) -> None:
    # The name in its environment is how `lose_node` finds its steps, which belong to init as soon as they run.
    self.nodes[name] = _daemon(['slurmd', '-D', '-N', name], self.folder, self.env | {_NODE: name})

  def lose_node(self, name: str) -> None:
    """Kills a node's daemon and everything under it at once, as a power cut would."""
    daemon = self.nodes.pop(name)
    for pid in self._of_node(name):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    daemon.wait()

  def _of_node(self, name: str) -> list[int]:
    marks = {f'SLURM_CONF={self.env["SLURM_CONF"]}'.encode(), f'{_NODE}={name}'.encode()}
    found = []
    for process in pathlib.Path('/proc').glob('[0-9]*'):
      with contextlib.suppress(OSError):
        if marks <= set((process / 'environ').read_bytes().split(b'\0')):
          found.append(int(process.name))
    return found

  def wait_idle(self, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(self.call('sinfo', '-h', '-N', '-p', 'main', '-t', 'idle', '-o', '%N').split()) < count:
      assert time.monotonic() < deadline, self.log()
      time.sleep(0.1)


@contextlib.contextmanager
def cluster(nodes: int = 4) -> Iterator[Cluster]:
  """A running cluster with partitions `main` and, preempting it, `high`."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix='slurm-'))  # a short path: it holds a unix socket
  host = socket.gethostname().split('.')[0]
  ports = _free_ports(nodes + 1)
  for name in ('munge', 'state', 'spool'):
    (folder / name).mkdir(mode=0o711)
  folder.chmod(0o711)  # munged insists that others could reach its socket
  (folder / 'munge/key').write_bytes(os.urandom(128))
  (folder / 'munge/key').chmod(0o400)
  conf = folder / 'slurm.conf'
  conf.write_text(
    CONF.format(folder=folder, host=host, ports=ports, nodes=nodes, node_ports=','.join(map(str, ports[1:])))
  )
  env = {k: v for k, v in os.environ.items() if not k.startswith(('SLURM_', 'SBATCH_', 'SQUEUE_'))}
  found = Cluster(folder, env | {'SLURM_CONF': str(conf)})
  daemons = []
  try:
    munge = {
      f'--{use}={folder}/munge/{name}'
      for use, name in zip(
        ('socket', 'key-file', 'pid-file', 'log-file', 'seed-file'),
        ('sock', 'key', 'pid', 'log', 'seed'),
        strict=True,
      )
    }
    daemons.append(_daemon(['munged', '--foreground', '--num-threads=2', *munge], folder, found.env))
    _until((folder / 'munge/sock').exists, folder)
    daemons.append(_daemon(['slurmctld', '-D', '-i'], folder, found.env))
    for i in range(nodes):
      found.start_node(f'127.0.0.{i + 1}')
    _until(lambda: _answers(found), folder)
    found.wait_idle(nodes)
    yield found
  finally:
    _drain(found)
    for daemon in [*found.nodes.values(), *reversed(daemons)]:
      daemon.terminate()
    for daemon in [*found.nodes.values(), *daemons]:
      try:
        daemon.wait(10)
      except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    shutil.rmtree(folder)


def _daemon(argv: list[str], folder: pathlib.Path, env: dict[str, str]) -> subprocess.Popen:
  with open(folder / 'daemons.txt', 'ab') as out:
    return subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)


def _answers(found: Cluster) -> bool:
  return subprocess.run(['scontrol', 'ping'], env=found.env, capture_output=True).returncode == 0


def _drain(found: Cluster) -> None:
  """Ends all jobs first: a slurmd that leaves before its steps leaves orphans which ignore SIGTERM."""
  if not _answers(found):
    return
  found.call('scancel', '--user=root', '--signal=KILL', '--full')
  found.call('scancel', '--user=root')
  deadline = time.monotonic() + 20
  while found.call('squeue', '-h') and time.monotonic() < deadline:
    time.sleep(0.1)


def _until(condition, folder: pathlib.Path) -> None:
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline, (folder / 'daemons.txt').read_text()[-3000:]
    time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for s in sockets:
      s.bind(('127.0.0.1', 0))
    return [s.getsockname()[1] for s in sockets]
