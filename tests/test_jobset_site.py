"""The site file of the JobSet executor: what is read, what is refused, and that secrets are never repeated."""

import pytest

from sae_jax.errors import UserError
from sweeps.executors import jobset_site

SITE_FILE = """
image = "registry.example/sae_jax:7"
queue = "tpu-queue"
tpu_accelerator = "tpu-v5p-slice"
tpu_topology = "2x2x3"
chips_per_host = 4
secrets = ["wandb"]
[env]
XLA_FLAGS = "--xla_foo"
"""


@pytest.mark.parametrize(
  'name, value',
  [
    ('WANDB_API_KEY', 'c0ffee'),
    ('HF_TOKEN', 'x'),
    ('db_password', 'x'),
    ('GOOGLE_APPLICATION_CREDENTIALS', '/x'),
    ('MYSECRET', 'x'),
    ('NOTE', 'hf_' + 'a1' * 17),
    ('NOTE', 'ghp_' + 'b2' * 18),
    ('NOTE', 'AKIA' + 'C3' * 8),
    ('PROXY', 'http://me:hunter2@proxy.example'),
    ('NOTE', '-----BEGIN RSA PRIVATE KEY-----'),
  ],
)
def test_secrets_are_refused_without_being_repeated(name, value):
  with pytest.raises(UserError, match='reference a Kubernetes secret') as refused:
    jobset_site.Site('i', 'q', 'a', '2x2', 4, env={name: value})
  assert value not in str(refused.value) or len(value) < 3


def test_harmless_variables_are_no_secrets():
  jobset_site.check_no_secrets(
    {'TOKENIZERS_PARALLELISM': 'false', 'KEEP': '1', 'KEYBOARD': 'qwerty', 'JAX_LOG': 'sk-learn', 'A': 'gs://b/x:y@z'}
  )


def write(tmp_path, text):
  (tmp_path / 'site.toml').write_text(text)
  return str(tmp_path / 'site.toml')


def test_site_file_is_read(tmp_path):
  site = jobset_site.read_site(write(tmp_path, SITE_FILE))
  assert (site.hosts, site.chips, site.namespace, site.secrets) == (3, 12, 'default', ('wandb',))
  assert site.env == {'XLA_FLAGS': '--xla_foo'}


@pytest.mark.parametrize(
  'edit, message',
  [
    (('queue = "tpu-queue"', ''), 'lacks queue'),
    (('queue =', 'que ='), "unknown key 'que'"),
    (('"2x2x3"', '"2x2x"'), 'tpu_topology .*chips along each axis'),
    (('"2x2x3"', '"2x3"'), 'has 6 chips, which hosts of chips_per_host = 4 do not divide'),
    (('= 4', '= "4"'), "chips_per_host = '4' is not a whole number of at least 1"),
    (('= 4', '= true'), 'chips_per_host = True is not a whole number of at least 1'),
    (('= 4', '= 4\nmax_restarts = -1'), 'max_restarts = -1 is not a whole number of at least 0'),
    (('= 4', '= 4\ngrace_s = 0.5'), 'grace_s = 0.5 is not a whole number of at least 1'),
    (('"tpu-queue"', '"Tpu Queue"'), 'queue .*LocalQueue'),
    (('"tpu-queue"', '7'), "queue = '7' is not valid"),
    (('sae_jax:7', 'sae jax:7'), 'image .*image reference'),
    (('sae_jax:7', 'x\\u0000'), 'image .*image reference'),
    (('["wandb"]', '"wandb"'), "secrets = 'wandb' is not a list"),
    (('["wandb"]', '["Not A Name"]'), 'list the names of Kubernetes secrets'),
    (('XLA_FLAGS = "--xla_foo"', 'XLA_FLAGS = 3'), "env 'XLA_FLAGS' is not"),
    (('XLA_FLAGS', '"A B"'), "env 'A B' is not"),
    (('[env]', '[env.x]'), "env 'x' is not"),
    (('[env]\nXLA_FLAGS = "--xla_foo"', ''), None),
    (('image = ', 'env = 3\nimage = '), 'is not TOML'),
    (('image = ', 'image == '), 'is not TOML'),
    (('image = ', 'path = "relative"\nimage = '), 'path .*absolute folder'),
    (('image = ', 'namespace = "../kube-system"\nimage = '), 'namespace'),
    (('image = ', 'context = "--as=admin\\n"\nimage = '), 'context'),
    (('image = ', 'xpk_cluster = "Cluster"\nimage = '), 'xpk_cluster .*a cluster that xpk made'),
  ],
)
def test_site_file_with_a_mistake_is_refused(tmp_path, edit, message):
  path = write(tmp_path, SITE_FILE.replace(*edit))
  if message is None:
    assert jobset_site.read_site(path).env == {}
    return
  with pytest.raises(UserError, match=message) as refused:
    jobset_site.read_site(path)
  assert '\n' not in str(refused.value)


def test_site_file_missing_or_binary_is_refused(tmp_path):
  with pytest.raises(UserError, match='cannot read the site file'):
    jobset_site.read_site(str(tmp_path / 'none.toml'))
  (tmp_path / 'site.toml').write_bytes(b'\xff\xfe')
  with pytest.raises(UserError, match='is not TOML'):
    jobset_site.read_site(str(tmp_path / 'site.toml'))
