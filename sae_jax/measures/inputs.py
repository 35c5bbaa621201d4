"""What all autoencoders of one site are measured on: windows of text, their activations, the undisturbed predictions.

Each input is made once for a ledger, by whichever worker needs it first, and kept beside it. Since all autoencoders see
the same windows, differences between them are paired.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sae_jax import cell_state, files
from sae_jax.cell import DataConfig
from sae_jax.data import windows
from sae_jax.data.reading import Reading
from sae_jax.errors import UserError
from sae_jax.measures import Scope
from sae_jax.measures.kept import Arrays, Kept

if TYPE_CHECKING:  # which names this module
  from sae_jax.measures.measure import Judged

BLOCK_WINDOWS = 8  # windows of a unit of work; lines of measures depend on it
_VERSION = 1  # of what is kept


@dataclasses.dataclass(frozen=True)
class Block:
  """Some windows and what the undisturbed model makes of them.

  Attributes:
    windows: ids, documents and offsets.
    x_WTD: activations at the site, raw.
    places_WT: the positions that count, in order.
    final_WTD: what leaves the last block; of held-out windows alone.
    ce_WT: cross-entropy [W, T - 1] of each token but the first, in nats; of held-out windows alone.
  """

  windows: windows.Windows
  x_WTD: np.ndarray
  places_WT: np.ndarray
  final_WTD: np.ndarray | None
  ce_WT: np.ndarray | None

  @property
  def counted_BD(self) -> np.ndarray:
    """The activations that count, in order."""
    return np.take_along_axis(self.x_WTD, self.places_WT[..., None], axis=1).reshape(-1, self.x_WTD.shape[-1])


class Inputs:
  """The inputs of one subject, site and text.

  Args:
    data: of a cell that is measured.
    scope: how much text.
    folder: where inputs of a ledger are kept, under a name that says what they are.
    facts: what sae.json says of subject and text; {} knows nothing.

  Attributes:
    text_windows: all windows of the training text, of which the 'train' ones are the first.

  Raises `UserError` for a cell without a subject, for another subject or text than the cell's, and as `Reading` does.
  """

  def __init__(self, data: DataConfig, scope: Scope, folder: str, facts: dict[str, Any], cell: str = ''):
    who = f'cell {cell}' if cell else 'the cell'
    if data.source == 'planted' or not data.subject:
      raise UserError(f'{who} was trained on activations of no language model; measures need a cell with data.subject')
    reading = Reading(data, whole=True)
    self.subject, self.site, self.positions = reading.subject, data.site, data.positions
    self.text, self.weights = data.text, data.weights
    _check_same(who, facts, reading)
    self.text_windows = reading.windows['train']
    self._windows = {
      'held_out': reading.windows['held_out'][: scope.held_out],
      'train': reading.windows['train'][: scope.train],
    }
    self.window_tokens = data.window_tokens
    self.identity = _digest(self._facts())
    self.folder = folder
    self._kept = Kept(files.join(folder, self.identity[:16]), self.identity)
    self._mesh = jax.make_mesh(
      (jax.local_device_count(),), ('window',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.local_devices()
    )
    self._compiled: dict[Any, Callable] = {}
    self._once: dict[str, tuple[Any, Any]] = {}
    everywhere = NamedSharding(self._mesh, P())
    self._params = jax.device_put(self.subject.params, everywhere)

  def count(self, stream: str) -> int:
    """Windows of a stream, 'held_out' or 'train'."""
    return len(self._windows[stream])

  def blocks(self, stream: str) -> int:
    """Blocks of a stream. Each but the last has `BLOCK_WINDOWS` windows."""
    return -(-self.count(stream) // BLOCK_WINDOWS)

  def block(self, stream: str, i: int) -> Block:
    """A block of 'held_out' or 'train' windows."""
    some = self._windows[stream][i * BLOCK_WINDOWS : (i + 1) * BLOCK_WINDOWS]
    kept = self.kept(f'{stream}.{i:04d}', lambda: self._run(some.ids_WT, predictions=stream == 'held_out'))
    places_WT = np.asarray(windows.places(kept['x_WTD'], self.positions))
    return Block(some, kept['x_WTD'], places_WT, kept.get('final_WTD'), kept.get('ce_WT'))

  @functools.cached_property
  def mean_D(self) -> np.ndarray:
    """The mean activation over the positions that count of the training windows, raw."""

    def make() -> dict[str, np.ndarray]:
      total_D, tokens = np.zeros(self.subject.width(self.site)), 0
      for i in range(self.blocks('train')):
        x_BD = self.block('train', i).counted_BD
        total_D, tokens = total_D + x_BD.sum(axis=0, dtype=np.float64), tokens + len(x_BD)
      return {'mean_D': (total_D / tokens).astype(np.float32)}

    return self.kept('mean', make)['mean_D']

  def spliced(
    self, i: int, key: Any, edit: Callable[..., jax.Array], numbers: Any, *given: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Cross-entropy and Kullback-Leibler divergence [W, T - 1] of a held-out block under an edit at the site, in nats.

    Positions that do not count stay as they are.

    Args:
      i: the block.
      key: says which edit this is. Edits with equal keys share a compiled program.
      edit: from `numbers`, raw activations [W, T, D] and `given`: what takes their place.
      numbers: arrays that the edit needs.
      given: others that it needs, with a row for each window.
    """
    block = self.block('held_out', i)
    assert block.final_WTD is not None

    def run(
      both: Any, ids_WT: jax.Array, x_WTD: jax.Array, counts_WT: jax.Array, final_WTD: jax.Array, *given: jax.Array
    ) -> Any:
      params, numbers = both
      edited_WTD = jnp.where(counts_WT[..., None], edit(numbers, x_WTD, *given), x_WTD)
      subject = dataclasses.replace(self.subject, params=params)
      return subject.next_token(edited_WTD, ids_WT, self.site, final_WTD)

    counts_WT = np.zeros(block.x_WTD.shape[:2], bool)
    np.put_along_axis(counts_WT, block.places_WT, True, axis=1)
    return self.over_windows(
      ('spliced', key), run, numbers, block.windows.ids_WT, block.x_WTD, counts_WT, block.final_WTD, *given
    )

  def over_windows(self, key: Any, run: Callable[..., Any], numbers: Any, *arrays: np.ndarray) -> Any:
    """`run((weights of the subject, numbers), *arrays)`, the windows shared out over the devices of this process.

    Args:
      key: says which function this is: functions with equal keys share a compiled program.
      run: a function of arrays whose first axis is windows, one giving such arrays.
      numbers: arrays that every device needs.
      arrays: [W, ...].
    """
    if key not in self._compiled:
      spec = P('window')
      specs = ((P(), P()), *(spec for _ in arrays))
      shared = jax.shard_map(run, mesh=self._mesh, in_specs=specs, out_specs=spec, check_vma=False)
      self._compiled[key] = jax.jit(run if self._mesh.size == 1 else shared)
    n = len(arrays[0])
    # Filled up to a whole block, so that the last one needs no program of its own.
    rows = -(-max(n, BLOCK_WINDOWS) // self._mesh.size) * self._mesh.size
    padded = [np.concatenate([a, np.repeat(a[-1:], rows - n, axis=0)]) for a in arrays]
    return jax.tree.map(lambda a: np.asarray(a)[:n], self._compiled[key]((self._params, numbers), *padded))

  def kept(self, name: str, make: Callable[[], Arrays]) -> Arrays:
    """Arrays that are made once for the ledger. Of several workers one makes them, and the others wait."""
    return self._kept.get(name, make)

  def kept_of(
    self, judged: 'Judged', kind: str, settings: list[Any], make: Callable[[], Arrays], where: Kept | None = None
  ) -> Arrays:
    """`kept` for what is of one autoencoder and some settings.

    In training nothing tells its weights at one step from those at another. Then the last ones stay in memory.

    Args:
      judged: the autoencoder.
      kind: what it is.
      settings: all that decides it beside the autoencoder and these inputs, as JSON has it.
      make: gives it.
      where: in place of where inputs are kept.
    """
    if not judged.tensors:
      return self.once(kind, (judged, settings), make)
    of = _digest([*settings, judged.cell, judged.tensors, judged.weights])
    return (where or self._kept).get(f'{kind}.{of[:16]}', make)

  def once(self, name: str, of: Any, make: Callable[[], Any]) -> Any:
    """What `make` gives, in memory until the name is asked for with another `of`."""
    if name not in self._once or self._once[name][0] != of:
      self._once[name] = of, make()
    return self._once[name][1]

  def activations(self, ids_WT: np.ndarray) -> np.ndarray:
    """Raw activations [W, T, D] of any windows, each opening with the start token."""
    return self._run(ids_WT, predictions=False)['x_WTD']

  def _run(self, ids_WT: np.ndarray, predictions: bool) -> dict[str, np.ndarray]:
    last = f'resid_post.{self.subject.arch.n_layers - 1}'
    sites = (self.site, last) if predictions else (self.site,)

    def run(both: Any, ids_WT: jax.Array) -> Any:
      subject = dataclasses.replace(self.subject, params=both[0])
      found = subject.residuals(ids_WT, sites)
      if not predictions:
        return found
      # Spliced at its end the model runs no block: what remains is the prediction.
      ce_WT, _ = subject.next_token(found[1], ids_WT, last, found[1])
      return *found, ce_WT

    found = self.over_windows(('run', predictions), run, (), ids_WT)
    return dict(zip(('x_WTD', 'final_WTD', 'ce_WT'), found, strict=False))

  @property
  def place(self) -> dict[str, Any]:
    """What says which activations these are, but for the text."""
    return {
      'subject_sha256': self.subject.provenance.get('subject_sha256'),
      'weights': self.weights,
      'site': self.site,
      'positions': self.positions,
      'window_tokens': self.window_tokens,
      'start_token': self.subject.start_token,
    }

  def _facts(self) -> dict[str, Any]:
    facts: dict[str, Any] = {'version': _VERSION, **self.place}
    for name, some in self._windows.items():
      places = np.stack([some.document_W, some.offset_W]).astype('<i8')
      facts |= {f'{name}_corpus': some.corpus, f'{name}_windows': hashlib.sha256(places.tobytes()).hexdigest()}
      facts |= {f'{name}_ids': hashlib.sha256(some.ids_WT.astype('<i4').tobytes()).hexdigest()}
    return facts


def _check_same(who: str, facts: dict[str, Any], reading: Reading) -> None:
  found = {
    'subject_sha256': reading.subject.provenance.get('subject_sha256'),
    'text_sha256': reading.windows['train'].corpus,
  }
  for key, is_now in found.items():
    if facts.get(key) and facts[key] != is_now:
      what = key.removesuffix('_sha256')
      raise UserError(
        f'{who} was trained on the {what} {cell_state.printable(str(facts.get(what)))[:80]} with sha256 '
        f'{cell_state.printable(str(facts[key]))[:12]} and the one found has {str(is_now)[:12]}; install that one'
      )


def _digest(record: Any) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
