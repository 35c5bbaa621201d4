"""The files of a cell's autoencoder: what the result says of them, and whether they are still that. Plain Python.

They may have terabytes, so there are two levels. `glance` sees a file that is gone or has another size, and a changed
sae.json on a local disk: status, report and launch do it for every finished cell. `check` reads all and sees any
changed byte: `sweeps.status --verify` and `sweeps.retry` do it, and `sae_jax.load` for the weights that it takes.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sae_jax import files, schema

_REPEATED = ('id', 'n_latents', 'k', 'd_model', 'activation', 'weights')  # in sae.json and result.json
_WIDEST = 8  # bytes of a number in the widest tensors
_HEADER = 2**20  # bytes of a tensor file beside its numbers, and far more than it takes


def facts(info: bytes, tensors: Mapping[str, int]) -> dict[str, Any]:
  """What a result says of its autoencoder: of the bytes of sae.json, and of tensor files with so many bytes."""
  sizes = {f'{weights}.safetensors': size for weights, size in tensors.items()}
  return {
    'artifact_sha256': hashlib.sha256(info).hexdigest(),
    'artifact_bytes': sizes | {schema.ARTIFACT_INFO: len(info)},
  }


def glance(cell: str, result: Mapping[str, Any]) -> None:
  """Raises `schema.Broken` when the files beside a result are not there as it says. Results of early versions say nothing.

  In a bucket that is one listing a cell. Reading sae.json would be another request, and is left to `check`.
  """
  expected = result.get('artifact_bytes')
  if not expected:
    return
  folder = files.join(cell, schema.ARTIFACT)
  found = files.sizes(folder, expected)
  for name, size in expected.items():
    if name not in found:
      raise _broken(name, 'it is missing')
    if found[name] != size:
      raise _broken(name, f'it has {found[name]} bytes, and {size} in {schema.RESULT}')
  if files.is_local(cell):
    _check_info(files.read(files.join(folder, schema.ARTIFACT_INFO)), result)


def check(cell: str, beat: Callable[[bytes], Any] = lambda _: None) -> bool:
  """Reads every file of an autoencoder, and says whether digests covered them; those of early versions had none.

  Args:
    cell: a cell folder.
    beat: called with all bytes in turn.

  Raises:
    schema.Broken: they cannot be believed. OSError: they cannot be read.
  """
  found = info(cell)
  for weights in found.get('sha256') or {}:
    tensors(cell, found, weights, beat)
  return schema.verified(found)


def info(cell: str) -> dict[str, Any]:
  """sae.json as it is, where it agrees with itself, the configuration and the result. Raises as `check`."""
  try:
    result = schema.parse(files.read(files.join(cell, schema.RESULT)))
    schema.check(result, schema.RESULTS)
  except (OSError, schema.Broken):
    result = {}  # sae/ alone was copied, or somebody else says what is wrong with the result
  glance(cell, result)
  data = files.read(files.join(cell, schema.ARTIFACT, schema.ARTIFACT_INFO))
  try:
    found = schema.parse(data)
    schema.check_artifact(found)
    _check_owner(cell, found)
    for name in _REPEATED:
      if name in result and name in found and found[name] != result[name]:
        raise schema.Broken(f'{name}={found[name]!r}, and {result[name]!r} in {schema.RESULT}')
  except schema.Broken as error:
    raise _broken(schema.ARTIFACT_INFO, str(error)) from None
  _check_info(data, result)
  return found


def tensors(cell: str, info: Mapping[str, Any], weights: str, sink: Callable[[bytes], Any]) -> None:
  """Hands the bytes of a tensor file on, and raises `schema.Broken` at their end when they are not those of `info`."""
  folder, name = files.join(cell, schema.ARTIFACT), f'{weights}.safetensors'
  n, d = info['n_latents'], info['d_model']
  size = files.sizes(folder, [name]).get(name, 0)
  if size > _WIDEST * (2 * n * d + n + d) + _HEADER:
    raise _broken(name, f'it has {size} bytes, more than {n} latents of width {d} need')
  digest = hashlib.sha256()
  for piece in files.pieces(files.join(folder, name)):
    digest.update(piece)
    sink(piece)
  expected = (info.get('sha256') or {}).get(weights)
  if expected != digest.hexdigest() and (expected or schema.verified(dict(info))):
    raise _broken(name, 'it does not fit its digest: it was changed')


def why(error: Exception) -> str:
  """What `check` found, in one line."""
  if isinstance(error, OSError):
    name = str(error.filename or '').rpartition('/')[2]
    return f'{schema.ARTIFACT}/{name}: {error.strerror or error}'
  return str(error)


def size(cell: str, result: Mapping[str, Any]) -> int:
  """Bytes that `check` will read."""
  names: Iterable[str] = result.get('artifact_bytes') or ('raw.safetensors', 'ema.safetensors')
  found = files.sizes(files.join(cell, schema.ARTIFACT), names)
  return sum(count for name, count in found.items() if name != schema.ARTIFACT_INFO)


def _check_info(data: bytes, result: Mapping[str, Any]) -> None:
  expected = result.get('artifact_sha256')
  if expected and hashlib.sha256(data).hexdigest() != expected:
    raise _broken(schema.ARTIFACT_INFO, f'it is not the one that {schema.RESULT} was written with')


def _check_owner(cell: str, info: Mapping[str, Any]) -> None:
  """Raises `schema.Broken` when the cell beside an autoencoder is another than it was trained as."""
  if schema.is_imported(info) or not info.get('id'):
    return
  try:
    config = schema.parse(files.read(files.join(cell, schema.CONFIG)))
  except (OSError, schema.Broken):
    return  # sae/ alone was copied, or somebody else says what is wrong with the configuration
  if config.get('id') != info['id']:
    raise schema.Broken(f'it is of cell {info["id"]!r} and {schema.CONFIG} of {config.get("id")!r}')


def _broken(name: str, why: str) -> schema.Broken:
  return schema.Broken(f'{schema.ARTIFACT}/{name}: {why}')
