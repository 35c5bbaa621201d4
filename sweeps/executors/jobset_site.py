"""The site file of the JobSet executor: which cluster, slice and image, and what must never be written into it.

A manifest can be read by everybody who may list objects, so a value that looks like a secret is refused here.
"""

import dataclasses
import math
import pathlib
import re
import tomllib

from sae_jax.errors import UserError
from sweeps import executors

_LABEL = re.compile(r'[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?')
_SUBDOMAIN = re.compile(r'[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?')
_NO_SPACE = re.compile(r'[\x21-\x7e]{1,1000}')
_PATH = re.compile(r'/[^\x00-\x1f]{0,1000}')
_CONTEXT = re.compile(r'[\x21-\x7e]([\x20-\x7e]{0,250}[\x21-\x7e])?')
_ENV_NAME = re.compile(r'[A-Za-z_][A-Za-z0-9_]*')
_SECRET_WORD = re.compile(r'(TOKENS?|KEYS?|PASS|PASSWORDS?|PASSWD|PASSPHRASE|SECRETS?|CREDENTIALS?|CREDS)$')
# What is a secret whatever it is called: key files, well-known token prefixes, passwords in URLs.
_SECRET_VALUE = re.compile(
  r'PRIVATE KEY-----|\b(gh[opsu]_|github_pat_|glpat-|hf_|sk-|xox[abp]-|AKIA|AIza|ya29\.)[\w-]{12,}'
  r'|\beyJ[\w-]{8,}\.eyJ|://[^/@\s]*:[^/@\s]+@'
)


@dataclasses.dataclass(frozen=True)
class Site:
  """Where jobs run, from a TOML file of the same keys. The image holds the code. Secrets are named here, never held."""

  image: str
  queue: str  # Kueue's LocalQueue
  tpu_accelerator: str  # e.g. 'tpu-v5p-slice'
  tpu_topology: str  # e.g. '2x2x2'
  chips_per_host: int
  path: str | None = None  # working folder in the image
  context: str | None = None  # of kubectl; None is its current one
  namespace: str = 'default'
  service_account: str | None = None
  priority_class: str | None = None
  grace_s: int = 120  # between SIGTERM and SIGKILL
  max_restarts: int = executors.MAX_PREEMPTIONS  # of one JobSet; see `Job.max_restarts`
  env: dict[str, str] = dataclasses.field(default_factory=dict)
  secrets: tuple[str, ...] = ()  # Kubernetes secrets whose keys become environment variables
  xpk_cluster: str | None = None  # submit through xpk to this cluster of its making; see xpk.py
  xpk_project: str | None = None  # of the cluster; None is gcloud's
  xpk_zone: str | None = None

  def __post_init__(self) -> None:
    for name, pattern, rule in (
      ('image', _NO_SPACE, 'an image reference such as registry.example/sae_jax:1'),
      ('queue', _SUBDOMAIN, 'the name of a LocalQueue, e.g. as kubectl get localqueues prints it'),
      ('tpu_accelerator', _SUBDOMAIN, 'a value of cloud.google.com/gke-tpu-accelerator, e.g. tpu-v5p-slice'),
      ('tpu_topology', re.compile(r'[1-9]\d{0,3}(x[1-9]\d{0,3}){1,2}'), 'chips along each axis, e.g. 2x2x2'),
      ('path', _PATH, 'an absolute folder of the image'),
      ('context', _CONTEXT, 'a name that kubectl config get-contexts prints'),
      ('namespace', _LABEL, 'the name of a namespace'),
      ('service_account', _SUBDOMAIN, 'the name of a service account'),
      ('priority_class', _SUBDOMAIN, 'the name of a priority class'),
      ('xpk_cluster', re.compile(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?'), 'the name of a cluster that xpk made'),
      ('xpk_project', _SUBDOMAIN, 'a project id'),
      ('xpk_zone', _LABEL, 'a zone, e.g. us-east5-a'),
    ):
      value = getattr(self, name)
      if value is not None and not (isinstance(value, str) and pattern.fullmatch(value)):
        raise UserError(f'{name} = {str(value)[:80]!r} is not valid; give {rule}')
    for name, least, usual in (('chips_per_host', 1, 4), ('grace_s', 1, 120), ('max_restarts', 0, 100)):
      value = getattr(self, name)
      if type(value) is not int or value < least:
        raise UserError(f'{name} = {value!r} is not a whole number of at least {least}; {usual} is usual')
    if self.chips % self.chips_per_host:
      raise UserError(
        f'tpu_topology = {self.tpu_topology!r} has {self.chips} chips, which hosts of chips_per_host = '
        f'{self.chips_per_host} do not divide; see the table of TPU machine types'
      )
    if not isinstance(self.env, dict):
      raise UserError(f'env = {str(self.env)[:80]!r} is not a table; write [env] with one NAME = "value" a line')
    check_no_secrets({'image': self.image, **self.env})
    for name in self.secrets:
      if not (isinstance(name, str) and _SUBDOMAIN.fullmatch(name)):
        raise UserError(f'secrets holds {str(name)[:20]!r}; list the names of Kubernetes secrets, not their values')

  @property
  def chips(self) -> int:
    return math.prod(int(side) for side in self.tpu_topology.split('x'))

  @property
  def hosts(self) -> int:
    """Hosts of one slice, and so of every job."""
    return self.chips // self.chips_per_host


def read_site(path: str) -> Site:
  """Reads a site file. Raises `UserError` for one that is missing, is not TOML or has unknown or missing keys."""
  try:
    record = tomllib.loads(pathlib.Path(path).read_text(encoding='utf-8'))
  except OSError as error:
    raise UserError(f'cannot read the site file {path!r}: {error.strerror}; see docs/first_pod_sweep.md') from None
  except ValueError as error:
    raise UserError(f'{path} is not TOML: {error}') from None
  fields = {field.name: field for field in dataclasses.fields(Site)}
  if unknown := sorted(record.keys() - fields.keys()):
    raise UserError(f'{path} has the unknown key {unknown[0][:80]!r}; known are {", ".join(fields)}')
  required = [name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
  if missing := [name for name in required if name not in record]:
    raise UserError(f'{path} lacks {", ".join(missing)}; see docs/first_pod_sweep.md for an example')
  secrets = record.pop('secrets', [])
  if not isinstance(secrets, list):
    raise UserError(f'secrets = {str(secrets)[:20]!r} is not a list; write e.g. secrets = ["wandb"]')
  return Site(**record, secrets=tuple(secrets))


def check_no_secrets(env: dict[str, str]) -> None:
  """Raises `UserError`, which never repeats the value, for what would put a secret into a manifest."""
  for name, value in env.items():
    if not (isinstance(name, str) and _ENV_NAME.fullmatch(name) and isinstance(value, str)):
      raise UserError(f'env {str(name)[:80]!r} is not a NAME = "text" pair; use letters, digits and _')
    if any(_SECRET_WORD.search(word) for word in name.upper().split('_')) or _SECRET_VALUE.search(value):
      raise UserError(
        f'{name} looks like a secret, and manifests can be read by many; reference a Kubernetes secret '
        'in the list `secrets` of the site file instead'
      )
