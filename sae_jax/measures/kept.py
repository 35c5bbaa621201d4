"""Arrays that are made once for a ledger and kept beside it, by whichever worker needs them first."""

import collections
import hashlib
import time
from collections.abc import Callable

import numpy as np
import safetensors
import safetensors.numpy

from sae_jax import cell_state, files, lease, schema
from sae_jax.errors import UserError

Arrays = dict[str, np.ndarray]
_HELD = 24  # in memory
_POLL_S = 0.2
_LARGEST = 2**33  # bytes


class Kept:
  """A folder of named arrays that all belong to one identity.

  Args:
    folder: where they are.
    identity: says what they are of. Arrays of another identity are refused.
  """

  def __init__(self, folder: str, identity: str):
    self.folder, self.identity = folder, identity
    self._observer = lease.Observer()
    self._held: collections.OrderedDict[str, Arrays] = collections.OrderedDict()

  def get(self, name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays of a name. Of several workers one makes them, and the others wait."""
    if name in self._held:
      self._held.move_to_end(name)
      return self._held[name]
    while (found := self.find(name) or self._made(name, make)) is None:
      time.sleep(_POLL_S)
    self._held[name] = found
    while len(self._held) > _HELD:
      self._held.popitem(last=False)
    return found

  def make(self, name: str, make: Callable[[], Arrays]) -> None:
    """Makes the arrays of a name, unless they are there or another worker is at it."""
    if self._record(name) is None:
      self._made(name, make)

  def find(self, name: str) -> Arrays | None:
    """The arrays of a name, or None where nobody made them. Raises `UserError` for what cannot be believed."""
    record = self._record(name)
    if record is None:
      return None
    try:
      data = files.read(files.join(self.folder, name, 'arrays.safetensors'), _LARGEST)
      if hashlib.sha256(data).hexdigest() != record.get('sha256'):
        raise schema.Broken('the arrays do not fit their digest')
      return _ordered(safetensors.numpy.load(data))
    except (schema.Broken, OSError, safetensors.SafetensorError) as error:
      raise self._refused(name, error) from None

  def _made(self, name: str, make: Callable[[], Arrays]) -> Arrays | None:
    held = self._observer.claim(files.join(self.folder, name))
    if held is None:
      return None
    with held:
      found = self.find(name)
      if found is None:
        found = _ordered(make())
        data = safetensors.numpy.save({key: np.asarray(a, order='C') for key, a in found.items()})
        files.replace(files.join(self.folder, name, 'arrays.safetensors'), data)
        record = {'sha256': hashlib.sha256(data).hexdigest(), 'bytes': len(data)}
        files.replace(files.join(self.folder, name, 'arrays.json'), schema.dump(record, self.identity))
    return found

  def _record(self, name: str) -> dict | None:
    try:
      record = schema.parse(files.read(files.join(self.folder, name, 'arrays.json')))
      schema.check(record, (), self.identity)
      return record
    except FileNotFoundError:
      return None
    except (schema.Broken, OSError) as error:
      raise self._refused(name, error) from None

  def _refused(self, name: str, error: Exception) -> UserError:
    return UserError(
      f'{files.join(self.folder, name)} cannot be believed ({cell_state.printable(str(error))[:120]}); delete the '
      'folder: it is made again'
    )


def _ordered(arrays: Arrays) -> Arrays:
  """The same by name, so that who made them and who reads them write the same bytes."""
  return dict(sorted(arrays.items()))
