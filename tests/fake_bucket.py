"""gs:// in the memory of this process, with exclusive create, for tests of what never sees a real bucket."""

import importlib

from fsspec.implementations import memory


class Bucket(memory.MemoryFileSystem):
  protocol = ('gs',)

  @classmethod
  def _strip_protocol(cls, path):
    return super()._strip_protocol(path.removeprefix('gs://'))


def use(monkeypatch) -> None:
  """Makes gs:// an empty bucket until the end of the test."""
  monkeypatch.setattr(Bucket, 'store', {})
  monkeypatch.setattr(Bucket, 'pseudo_dirs', [''])
  monkeypatch.setitem(importlib.import_module('fsspec.registry')._registry, 'gs', Bucket)
