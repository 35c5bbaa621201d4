"""A bucket of Google Cloud Storage on a local port, for tests: the part of its JSON API that gcsfs, tensorstore and orbax use.

Preconditions hold as in the real store: an upload with ifGenerationMatch=0 is refused with 412 where the object
exists, also when a resumable upload is finished after another has won. Answers are strongly consistent, and folders
do not exist. It is no proof about the real store: authentication, rate limits and batches are not here.
"""

import dataclasses
import http.server
import itertools
import json
import secrets
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

BUCKET = 'bucket'


class Refused(Exception):
  """The answer to a request that is not carried out."""

  def __init__(self, status: int, message: str = 'refused'):
    super().__init__(message)
    self.status = status


class Dropped(Exception):
  """The connection is closed without an answer."""


@dataclasses.dataclass
class _Object:
  data: bytes
  generation: int
  metadata: dict[str, str]


@dataclasses.dataclass
class _Upload:
  name: str
  metadata: dict[str, str]
  condition: str | None
  data: bytearray


class FakeGCS:
  """Serves one bucket until `close`; a context manager.

  Attributes:
    url: what STORAGE_EMULATOR_HOST and TENSORSTORE_GCS_HTTP_URL are to be.
    requests: method and path of every request so far.
    before: called with method and path (which holds the query) ahead of every request; may raise `Refused` or `Dropped`.
    after: the same once the request has been carried out and before it is answered.
  """

  def __init__(self):
    self.requests: list[tuple[str, str]] = []
    self.before: Callable[[str, str], None] = lambda method, path: None
    self.after: Callable[[str, str], None] = lambda method, path: None
    self._objects: dict[str, _Object] = {}
    self._uploads: dict[str, _Upload] = {}
    self._generations = itertools.count(1)
    self._lock = threading.Lock()
    handler = type('Handler', (_Handler,), {'store': self})
    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    self._server.daemon_threads = True
    self._server.handle_error = lambda request, address: None  # a killed client is not worth a traceback
    self.url = f'http://127.0.0.1:{self._server.server_port}'
    threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

  def close(self) -> None:
    self._server.shutdown()
    self._server.server_close()

  def __enter__(self) -> 'FakeGCS':
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def names(self, prefix: str = '') -> list[str]:
    with self._lock:
      return sorted(name for name in self._objects if name.startswith(prefix))

  def read(self, name: str) -> bytes:
    return self._objects[name].data

  def write(self, name: str, data: bytes, metadata: dict[str, str] | None = None) -> None:
    """Puts an object there behind everyone's back."""
    with self._lock:
      self._put(name, data, metadata or {}, None)

  def remove(self, name: str) -> None:
    with self._lock:
      del self._objects[name]

  def answer(
    self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes
  ) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers. Raises `Refused`."""
    with self._lock:
      if path.startswith('/upload/'):
        return self._upload(method, path, query, headers, body)
      # Names are quoted, so that a slash of the path is never one of a name.
      parts = [urllib.parse.unquote(p) for p in path.removeprefix('/download').split('/')]
      if parts[:4] != ['', 'storage', 'v1', 'b'] or len(parts) < 5:
        raise Refused(404, f'no such endpoint {path}')
      if parts[4] != BUCKET:
        raise Refused(404, 'The specified bucket does not exist.')
      rest = parts[5:]
      if not rest and method == 'GET':
        return _json({'kind': 'storage#bucket', 'name': BUCKET, 'id': BUCKET})
      if rest == ['o'] and method == 'GET':
        return self._list(query)
      if len(rest) == 2 and method == 'GET':
        return self._get(rest[1], query, headers)
      if len(rest) == 2 and method == 'DELETE':
        self._check(rest[1], query.get('ifGenerationMatch'))
        del self._objects[self._found(rest[1])]
        return 204, b'', {}
      if rest[2:3] == ['moveTo'] and method == 'POST':
        moved = self._objects.pop(self._found(rest[1]))
        return _json(self._put(rest[4], moved.data, moved.metadata, query.get('ifGenerationMatch')))
      if rest[2:3] == ['rewriteTo'] and method == 'POST':
        source = self._objects[self._found(rest[1])]
        copy = self._put(rest[6], source.data, source.metadata, query.get('ifGenerationMatch'))
        return _json({'kind': 'storage#rewriteResponse', 'done': True, 'resource': copy})
    raise Refused(501, f'{method} {path} is not faked')

  def _found(self, name: str) -> str:
    if name not in self._objects:
      raise Refused(404, f'No such object: {BUCKET}/{name}')
    return name

  def _check(self, name: str, condition: str | None) -> None:
    generation = self._objects[name].generation if name in self._objects else 0
    if condition is not None and int(condition) != generation:
      raise Refused(412, 'At least one of the pre-conditions you specified did not hold.')

  def _put(self, name: str, data: bytes, metadata: dict[str, str], condition: str | None) -> dict[str, Any]:
    self._check(name, condition)
    self._objects[name] = _Object(bytes(data), next(self._generations), metadata)
    return self._resource(name)

  def _resource(self, name: str) -> dict[str, Any]:
    found = self._objects[name]
    return {
      'kind': 'storage#object',
      'bucket': BUCKET,
      'name': name,
      'size': str(len(found.data)),
      'generation': str(found.generation),
      'metageneration': '1',
      'contentType': 'application/octet-stream',
      'timeCreated': '2026-01-01T00:00:00.000Z',
      'updated': '2026-01-01T00:00:00.000Z',
      'metadata': found.metadata,
    }

  def _get(self, name: str, query: dict[str, str], headers: Any) -> tuple[int, bytes, dict[str, str]]:
    found = self._objects[self._found(name)]
    self._check(name, query.get('ifGenerationMatch'))
    if query.get('ifGenerationNotMatch') == str(found.generation):
      return 304, b'', {}
    if query.get('alt') != 'media':
      return _json(self._resource(name))
    facts = {'x-goog-generation': str(found.generation), 'content-type': 'application/octet-stream'}
    if not (wanted := headers.get('Range')):
      return 200, found.data, facts
    first, last = wanted.removeprefix('bytes=').split('-')
    size = len(found.data)
    start, stop = (int(first), min(size, int(last or size) + 1)) if first else (size - int(last), size)
    if start >= size:
      raise Refused(416, 'The requested range cannot be satisfied.')
    return 206, found.data[start:stop], facts | {'content-range': f'bytes {start}-{stop - 1}/{size}'}

  def _list(self, query: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter', '')
    entries = {}
    for name in self._objects:
      if name.startswith(prefix) and query.get('startOffset', '') <= name:
        head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, '', '')
        entries[prefix + head + found if found else name] = bool(found)
    names = sorted(name for name in entries if name > query.get('pageToken', ''))
    most = int(query.get('maxResults', 1000))
    page = {'kind': 'storage#objects'} | ({'nextPageToken': names[most - 1]} if len(names) > most else {})
    names = names[:most]
    items = [self._resource(name) for name in names if not entries[name]]
    return _json(page | {'items': items, 'prefixes': [name for name in names if entries[name]]})

  def _upload(self, method: str, path: str, query: dict[str, str], headers: Any, body: bytes):
    if path.split('/')[5] != BUCKET:
      raise Refused(404, 'The specified bucket does not exist.')
    kind, condition = query['uploadType'], query.get('ifGenerationMatch')
    if kind == 'media':
      return _json(self._put(query['name'], body, {}, condition))
    if kind == 'multipart':
      boundary = b'--' + headers['Content-Type'].split('boundary=')[1].strip('"').encode()
      start, end = body.index(boundary), body.rindex(boundary) - 1  # a line end before a boundary is its own
      facts, data = body[start:end].split(b'\n' + boundary, 1)
      record, data = json.loads(facts.split(b'\n\n', 1)[1]), data.split(b'\n\n', 1)[1]
      return _json(self._put(record['name'], data, record.get('metadata', {}), condition))
    if 'upload_id' not in query:
      record = json.loads(body or b'{}')
      name = query.get('name') or record['name']
      self._check(name, condition)
      upload = secrets.token_hex(8)
      self._uploads[upload] = _Upload(name, record.get('metadata', {}), condition, bytearray())
      place = f'{self.url}{path}?uploadType=resumable&upload_id={upload}'
      return 200, b'', {'Location': place}
    if method == 'DELETE':
      self._uploads.pop(query['upload_id'], None)
      return 499, b'', {}
    going = self._uploads[query['upload_id']]
    going.data += body
    if headers['Content-Range'].endswith('/*'):
      return 308, b'', {'Range': f'bytes=0-{len(going.data) - 1}'}
    del self._uploads[query['upload_id']]
    return _json(self._put(going.name, going.data, going.metadata, going.condition))


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  wbufsize = -1  # head and body in one packet: two would wait 40 ms for each other
  store: FakeGCS

  def do_GET(self):
    body = self.rfile.read(int(self.headers.get('Content-Length') or 0))
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query))
    self.store.requests.append((self.command, self.path))
    try:
      self.store.before(self.command, self.path)
      status, data, headers = self.store.answer(self.command, url.path, query, self.headers, body)
      self.store.after(self.command, self.path)
    except Refused as refused:
      error = {'error': {'code': refused.status, 'message': str(refused)}}
      status, data, headers = refused.status, json.dumps(error).encode(), {'content-type': 'application/json'}
    except Dropped:
      self.close_connection = True
      return
    self.send_response(status)
    for key, value in headers.items():
      self.send_header(key, value)
    if status not in (204, 304):
      self.send_header('Content-Length', str(len(data)))
    self.end_headers()
    self.wfile.write(data)

  do_POST = do_PUT = do_DELETE = do_GET

  def log_message(self, format, *args):
    pass


def _json(record: dict[str, Any]) -> tuple[int, bytes, dict[str, str]]:
  return 200, json.dumps(record).encode(), {'content-type': 'application/json'}
