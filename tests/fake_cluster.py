"""A Kubernetes API server of JobSets on loopback, with a `kubectl` and an `xpk` that reach nothing else."""

import asyncio
import json
import pathlib
import shutil
import sys
import threading

import kmock

RESOURCE = kmock.resource('jobset.x-k8s.io', 'v1alpha2', 'jobsets')

# Knows the flags that the executor uses and no other: an unknown one ends with argparse's exit code 2.
_FAKE_KUBECTL = """#!{python} -IS
import argparse, http.client, json, os, sys

common = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
common.add_argument('--namespace', required=True)
common.add_argument('--request-timeout', required=True)
common.add_argument('--context', choices=['fake'])
where, rest = common.parse_known_args()
parser = argparse.ArgumentParser(allow_abbrev=False)
commands = parser.add_subparsers(dest='verb', required=True)
create = commands.add_parser('create', allow_abbrev=False)
create.add_argument('-f', required=True, choices=['-'])
get = commands.add_parser('get', allow_abbrev=False)
get.add_argument('kind', choices=['jobsets.jobset.x-k8s.io'])
get.add_argument('--selector', required=True)
get.add_argument('--output', required=True, choices=['json'])
delete = commands.add_parser('delete', allow_abbrev=False)
delete.add_argument('kind', choices=['jobsets.jobset.x-k8s.io'])
delete.add_argument('name')
delete.add_argument('--ignore-not-found', action='store_true')
delete.add_argument('--cascade', choices=['foreground'])
delete.add_argument('--wait', choices=['true', 'false'])
args = parser.parse_args(rest)

server = http.client.HTTPConnection(os.environ['FAKE_SERVER'])
path = '/apis/jobset.x-k8s.io/v1alpha2/namespaces/' + where.namespace + '/jobsets'
method = {'create': 'POST', 'get': 'GET', 'delete': 'DELETE'}[args.verb]
documents = [d for d in sys.stdin.read().split('---\\n') if d.strip()] if args.verb == 'create' else [None]
for body in documents:
  url = path + '/' + args.name if args.verb == 'delete' else path
  server.request(method, url, body, {'Content-Type': 'application/json'})
  response = server.getresponse()
  answer = json.load(response)
  gone = response.status == 404 and args.verb == 'delete' and args.ignore_not_found
  if response.status >= 400 and not gone:
    sys.exit('Error from server (%s): %s' % (answer['reason'], answer['message']))
if args.verb == 'get':  # this server does not select by labels
  def selected(labels):
    pairs = [term.partition('=') for term in args.selector.split(',')]
    return all(labels.get(key) == value if equals else key in labels for key, equals, value in pairs)
  answer['items'] = [i for i in answer['items'] if selected(i['metadata']['labels'])]
print(json.dumps(answer))
"""

# What `xpk workload create` of xpk 1.16 does that matters here. It takes no --quiet, which would delete unasked.
_FAKE_XPK = """#!{python} -IS
import argparse, http.client, json, os, sys

with open(os.path.join(os.path.dirname(__file__), 'xpk_calls'), 'a') as calls:
  calls.write(json.dumps(sys.argv[1:]) + '\\n')
parser = argparse.ArgumentParser(allow_abbrev=False)
parser.add_argument('noun', choices=['workload'])
parser.add_argument('verb', choices=['create'])
for flag in ('workload', 'cluster', 'namespace', 'tpu-type', 'docker-image', 'command'):
  parser.add_argument('--' + flag, required=True)
for flag in ('project', 'zone', 'priority'):
  parser.add_argument('--' + flag)
for flag in ('num-slices', 'max-restarts', 'termination-grace-period-seconds', 'ttl-seconds-after-finished'):
  parser.add_argument('--' + flag, type=int)
parser.add_argument('--skip-validation', action='store_true')
args = parser.parse_args()

server = http.client.HTTPConnection(os.environ['FAKE_SERVER'])
path = '/apis/jobset.x-k8s.io/v1alpha2/namespaces/' + args.namespace + '/jobsets'

def ask(method, path, body=None):
  server.request(method, path, body and json.dumps(body), {'Content-Type': 'application/json'})
  return json.load(server.getresponse())

if args.workload in [item['metadata']['name'] for item in ask('GET', path)['items']]:
  if input(f'[XPK] {args.workload} already exists, do you want to overwrite it? (y/N): ') != 'y':
    sys.exit(1)
  ask('DELETE', path + '/' + args.workload)
labels = {'xpk.google.com/workload': args.workload}
ask('POST', path, {
  'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSet',
  'metadata': {'name': args.workload, 'namespace': args.namespace, 'labels': labels}, 'spec': {},
})
sys.exit(int(os.environ.get('FAKE_XPK_EXIT', 0)))  # of the steps after
"""

_KUBECONFIG = """
apiVersion: v1
kind: Config
current-context: fake
contexts: [{name: fake, context: {cluster: fake, user: nobody}}]
clusters: [{name: fake, cluster: {server: 'URL'}}]
users: [{name: nobody, user: {}}]
"""

# What kubectl looks at before it leaves the validation of fields to the server.
_PREFIX = 'apis/jobset.x-k8s.io/v1alpha2'
_OPENAPI = {
  'openapi': '3.0.0',
  'info': {'title': 'fake', 'version': '1'},
  'paths': {
    f'/{_PREFIX}/namespaces/{{namespace}}/jobsets/{{name}}': {
      'patch': {
        'parameters': [{'name': 'fieldValidation', 'in': 'query', 'schema': {'type': 'string'}}],
        'responses': {},
        'x-kubernetes-group-version-kind': {
          'group': 'jobset.x-k8s.io',
          'version': 'v1alpha2',
          'kind': 'JobSet',
        },
      }
    }
  },
}


class _ApiServer(kmock.KubernetesEmulator):
  """kmock, closer to Kubernetes: the reason for a name that is taken, and lists that say what they are."""

  async def _serve_list(self, request):
    kind = {'apiVersion': 'jobset.x-k8s.io/v1alpha2', 'kind': 'JobSetList'}
    return kind | await super()._serve_list(request)

  async def _handle(self, request):
    try:
      return await super()._handle(request)
    except kmock.KubernetesError as error:
      if error.status != 409:
        raise
      raise kmock.KubernetesError(status=409, reason='AlreadyExists', message='already exists') from None


class Cluster:
  """The server in a thread. `objects` is what it holds; `env` leads `kubectl` to it and away from anything real."""

  def __init__(self, folder: pathlib.Path, real_kubectl: bool = False):
    self._folder, self._ready, self._stop = folder, threading.Event(), None
    self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
    binaries = folder / 'bin'
    binaries.mkdir(parents=True)
    programs = {'kubectl': _FAKE_KUBECTL, 'xpk': _FAKE_XPK}
    if real_kubectl:
      (binaries / 'kubectl').symlink_to(shutil.which('kubectl'))
      del programs['kubectl']
    for name, text in programs.items():
      (binaries / name).write_text(text.replace('{python}', sys.executable))
      (binaries / name).chmod(0o755)
    self.env = {'PATH': str(binaries), 'KUBECONFIG': str(folder / 'kubeconfig'), 'HOME': str(folder)}

  async def _serve(self) -> None:
    self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
    async with _ApiServer() as self._api, kmock.Server(self._api) as server:
      self._api.resources[RESOURCE] = {
        'kind': 'JobSet',
        'singular': 'jobset',
        'namespaced': True,
        'verbs': {'create', 'delete', 'get', 'list'},
        'shortnames': set(),
        'categories': set(),
        'subresources': set(),
      }
      self._api['get /openapi/v3'] << {'paths': {_PREFIX: {'serverRelativeURL': f'/openapi/v3/{_PREFIX}'}}}
      self._api[f'get /openapi/v3/{_PREFIX}'] << _OPENAPI
      self.env['FAKE_SERVER'] = f'{server.host}:{server.port}'
      (self._folder / 'kubeconfig').write_text(_KUBECONFIG.replace('URL', str(server.url).rstrip('/')))
      self._ready.set()
      await self._stop.wait()

  def __enter__(self) -> 'Cluster':
    self._thread.start()
    assert self._ready.wait(20), 'the fake API server did not start'
    return self

  def __exit__(self, *_) -> None:
    self._loop.call_soon_threadsafe(self._stop.set)
    self._thread.join(20)

  def jobsets(self) -> dict[str, dict]:
    """Live objects by name."""
    return {name: dict(o.raw) for (_, _, name), o in self._api.objects.items() if not o.deleted}

  def xpk_calls(self) -> list[list[str]]:
    """Arguments of every call of xpk so far."""
    calls = self._folder / 'bin' / 'xpk_calls'
    return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

  def set_status(self, namespace: str, name: str, status: dict) -> None:
    """What the JobSet controller would do."""
    self._api.objects[RESOURCE, namespace, name].patch({'status': status})
