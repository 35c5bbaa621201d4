"""Checkpoints: orbax v1, a SHA-256 for every array, and the previous good step when the newest is damaged.

Orbax restores a flipped bit silently (50 of 60 trials) and takes an empty step folder for the latest, so what comes
back is compared with the digests that were saved with it. These and the facts lie under a digest of their own.
"""

import hashlib
import json
import math
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from sae_jax import faults, files, schema
from sae_jax.errors import UserError

_BLOCK = 1024  # rows of a hashed block; a power of two, so that power-of-two shards hold whole blocks
_COMMITTED = 'commit_success.txt'  # orbax writes it last, into every finished step
_unclosed: dict[str, '_Open'] = {}  # by folder, the checkpointers of this process that may still be writing


def array_digest(array: jax.Array) -> str:
  """SHA-256 over shape, dtype and the digests of blocks of 1,024 rows in order.

  No array is gathered when shards hold whole blocks, and neither mesh nor layout matters. Every process gets the answer.
  """
  rows = array.shape[0] if array.ndim else 1
  shards = [s for s in array.addressable_shards if s.replica_id == 0]
  whole_blocks = all(_holds_whole_blocks(s.data.shape, array.shape) for s in shards)
  n_blocks = math.ceil(rows / _BLOCK)
  digests = np.zeros((n_blocks, 32), np.uint8)
  if array.is_fully_replicated:
    _hash_blocks(digests, 0, np.asarray(array.addressable_data(0)))
  elif not _everywhere(whole_blocks):
    _hash_blocks(digests, 0, np.asarray(multihost_utils.process_allgather(array, tiled=True)))
  else:
    for shard in shards:
      _hash_blocks(digests, (shard.index[0].start or 0) // _BLOCK, np.asarray(shard.data))
    if jax.process_count() > 1:  # each block was hashed by one process and is zero elsewhere
      digests = np.max(multihost_utils.process_allgather(digests), axis=0)
  head = f'{array.shape}{array.dtype}'.encode()
  return hashlib.sha256(head + digests.tobytes()).hexdigest()


def tree_digests(tree: Any) -> dict[str, str]:
  """Digest of every array, by path."""
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): array_digest(leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


def combined_digest(tree: Any) -> str:
  """One digest of a tree of arrays."""
  return hashlib.sha256(json.dumps(tree_digests(tree), sort_keys=True).encode()).hexdigest()


class Checkpoints:
  """The two newest good steps of one cell, under `<workdir>/ckpt/`."""

  def __init__(self, workdir: str, cell_id: str):
    workdir = str(files.local(workdir)) if files.is_local(workdir) else str(workdir)
    self._folder, self._corrupt = files.join(workdir, schema.CHECKPOINTS), files.join(workdir, schema.CORRUPT)
    self._cell = cell_id
    # Before unfinished steps are cleaned up: an attempt in this process that ended with an exception may be saving.
    _close_abandoned(self._folder)
    if not files.is_local(workdir):
      self._remove_unfinished()
    self._open = self._opened()

  def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
    """Starts saving; the state may be donated at once. `facts` are JSON-able and come back from `restore`.

    Errors of the previous save (a full disk, say) surface here or in `wait`.
    """
    self.wait()
    if any(c.step == step for c in self._open.checkpointer.checkpoints):
      return  # saved by the interval just before the preemption
    metadata = {'cell': self._cell, 'digests': tree_digests(state), 'facts': facts}
    metadata = schema.seal(metadata, owner=self._cell)
    with _disk_full_is_user_error(self._folder):
      self._open.save(step, state, metadata)

  def wait(self) -> None:
    """Until the last save is on disk. Among several processes, that of every cell in training.

    The barriers of orbax are not named after the folder: one rank's next save walked into another cell's last
    ("Barrier ThreadSaveMultiHostValueHolder:set_value_start is already ongoing").
    """
    waited_for = list(_unclosed.values()) if jax.process_count() > 1 else [self._open]
    with _disk_full_is_user_error(self._folder):
      for opened in waited_for:
        opened.wait()

  def close(self) -> None:
    """Waits for the last save and lets go of the folder."""
    self.wait()
    _unclosed.pop(self._folder, None)
    with _disk_full_is_user_error(self._folder):
      self._open.close()

  def restore(
    self, abstract_state: Any, note: Callable[[str], None], fields: Sequence[schema.Field] = ()
  ) -> tuple[Any, dict[str, Any]] | None:
    """The newest undamaged state, placed as `abstract_state` says, and its facts; None when there is none.

    A step is damaged when an array or a fact differs from its digest, or one of `fields` is missing in the facts. It is
    moved to `<workdir>/corrupt/` and `note` is told. Raises `UserError` when the newest undamaged checkpoint belongs to
    another configuration, and an error of the machine as it is.
    """
    for step in self._steps():
      problem = self._problem_of_folder(step)
      if problem is None:
        try:
          metadata = self._open.checkpointer.metadata(step).custom_metadata
          _check(metadata, fields)
          if metadata['cell'] != self._cell:
            raise UserError(
              f'checkpoint {files.join(self._folder, str(step))} is of cell {metadata["cell"]}, not {self._cell}; '
              'use another workdir or the configuration it was made with'
            )
          state = self._open.checkpointer.load(step, abstract_state)
          if tree_digests(state) == metadata['digests']:
            return state, metadata['facts']
          problem = 'an array differs from its digest'
        except UserError:
          raise
        except Exception as error:
          if faults.is_host_error(error):
            raise
          problem = f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'
      note(f'checkpoint at step {step} is damaged ({problem}); moved to corrupt/, trying the one before')
      self._set_aside(step)
    return None

  def _steps(self) -> list[int]:
    return sorted((int(n) for n in files.listdir(self._folder) if n.isdigit()), reverse=True)

  def _problem_of_folder(self, step: int) -> str | None:
    return None if files.listdir(files.join(self._folder, str(step))) else 'the folder is empty'

  def _remove_unfinished(self) -> None:
    """Deletes what a kill left of a save in a bucket, where a step has its final name from its first file on.

    Orbax would, but in a thread beside the one that lists the steps: a worker restarted after a kill in its first save
    died of it (FileNotFoundError), and another saw the step and could not load it.
    """
    if jax.process_index() == 0:
      for folder in (files.join(self._folder, str(step)) for step in self._steps()):
        if _COMMITTED not in files.listdir(folder):
          files.remove_tree(folder)
    multihost_utils.sync_global_devices(f'{self._folder} holds finished steps only')

  def _set_aside(self, step: int) -> None:
    self._open.close()
    if jax.process_index() == 0:
      taken = len(files.listdir(self._corrupt))
      files.move_tree(files.join(self._folder, str(step)), files.join(self._corrupt, f'{step}-{taken}'))
    multihost_utils.sync_global_devices(f'set aside {step}')
    # A checkpointer remembers the steps it has seen, so one that saw the damaged step is not reused.
    self._open = self._opened()

  def _opened(self) -> '_Open':
    opened = _unclosed[self._folder] = _Open(
      ocp.training.Checkpointer(
        self._folder,
        preservation_policy=ocp.training.preservation_policies.LatestN(2),
        cleanup_tmp_directories=files.is_local(self._folder),
      )
    )
    return opened


def close_abandoned() -> None:
  """Ends what attempts of this process left open when they ended with an exception; call while no cell is in training.

  Their cells may be tried again elsewhere, and their threads and descriptors would stay.
  """
  for folder in list(_unclosed):
    _close_abandoned(folder)


class _Open:
  """A checkpointer of orbax and its save in flight.

  Orbax makes an event loop with a thread for every save, and frees them only when the result is asked for. Left alone
  they took three descriptors and a thread a checkpoint.
  """

  def __init__(self, checkpointer: ocp.training.Checkpointer):
    self.checkpointer = checkpointer
    self._saving: Any = None

  def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
    """Starts a save after the end of the one before."""
    self.wait()
    self._saving = self.checkpointer.save_async(step, state, force=True, custom_metadata=metadata)

  def wait(self) -> None:
    """Until the save in flight has ended. Raises what it failed with, once."""
    saving, self._saving = self._saving, None
    try:
      if saving is not None:
        saving.result()
    finally:
      # Also after an error: orbax raises it once in each thread, and would raise it here in the middle of closing.
      self.checkpointer.wait()

  def close(self) -> None:
    """Ends the save in flight and lets go of the folder, also when the save failed."""
    try:
      self.wait()
    finally:
      self.checkpointer.close()


def _close_abandoned(folder: str) -> None:
  abandoned = _unclosed.pop(folder, None)
  if abandoned is not None:
    try:
      abandoned.close()
    except Exception as error:
      print(f'{folder}: the save of the attempt before failed ({error})', file=sys.stderr)


class _disk_full_is_user_error:
  def __init__(self, path: str):
    self._path = path

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
  ) -> None:
    if error is not None and faults.is_disk_full(error):
      raise UserError(f'{self._path}: no space left on the device; free some and start again: it resumes') from error


def _check(metadata: Any, fields: Sequence[schema.Field]) -> None:
  """Raises `schema.Broken` for what cannot have been saved. Checkpoints from before there was a digest have none."""
  if not isinstance(metadata, dict):
    raise schema.Broken('it has no facts')
  schema.check_fields(metadata, schema.CHECKPOINT)
  # Of the cell that it names: a whole checkpoint of another one is a mistake of the user.
  schema.check(metadata, schema.CHECKPOINT, owner=metadata['cell'])
  schema.check_fields(metadata['facts'], fields)


def _holds_whole_blocks(shard: tuple[int, ...], whole: tuple[int, ...]) -> bool:
  """Whether a shard of this shape has entire rows, and all of them or a multiple of a block."""
  return shard[1:] == whole[1:] and (shard[:1] == whole[:1] or shard[0] % _BLOCK == 0)


def _hash_blocks(digests: np.ndarray, first: int, data: np.ndarray) -> None:
  data = np.ascontiguousarray(data)
  rows = data.reshape(1) if data.ndim == 0 else data
  for start in range(0, rows.shape[0], _BLOCK):
    block = hashlib.sha256(memoryview(rows[start : start + _BLOCK]).cast('B')).digest()
    digests[first + start // _BLOCK] = np.frombuffer(block, np.uint8)


def _everywhere(claim: bool) -> bool:
  if jax.process_count() == 1:
    return claim
  return bool(np.all(multihost_utils.process_allgather(np.asarray(claim))))
