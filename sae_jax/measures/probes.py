"""How well single latents tell things apart: the best logistic probe of one dimension over all latents.

Gao et al. 2024, section 4.2. For each task a probe is fitted to every latent, and the one with the lowest cross-entropy on
the training half is chosen. Its cross-entropy on the held-out half is the value; the halves share no document. Classes
are equally frequent, so that knowing nothing costs ln 2. Three kinds of columns compete apart:

    pre        pre-activations of the latents
    codes      the codes, as the family chooses them
    channels   channels of the normalised activation, which is what the autoencoder reads
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sae_jax.measures import estimate, tables
from sae_jax.measures.measure import Judged, Unit, Value
from sae_jax.measures.tasks import TASKS

if TYPE_CHECKING:
  from sae_jax.form import Form
  from sae_jax.measures.examples import Examples
  from sae_jax.measures.inputs import Inputs
  from sae_jax.sae import Params

_NATS = 'nats'
_KINDS = ('pre', 'codes', 'channels')
_COLUMNS = 8192  # that are looked at together
_NUMBERS = 2**24  # pre-activations that exist at once while codes are chosen


@dataclasses.dataclass(frozen=True)
class Probes:
  """Fields are settings.

  Attributes:
    examples: of each class, in each half, at most.
    seed: of the choice of examples.
    ridge: half of it times the squared weight of the standardised column is added to the mean cross-entropy that is
      minimised. It keeps probes finite where a column separates the classes.
    table_sha256: of the table whose tasks are used; '' for the built-in ones.
    table: its path, which is no setting: only the content counts.
  """

  NAME: ClassVar[str] = 'probes'
  examples: int = 512
  seed: int = 0
  ridge: float = 1e-4
  table_sha256: str = dataclasses.field(default='', init=False)
  table: dataclasses.InitVar[str] = ''
  _rows: ClassVar[dict[str, list[tables.Row]]] = {}  # of a table, by task; an instance has its own

  def __post_init__(self, table: str) -> None:
    """Raises `UserError` for a table that cannot be used."""
    if table:
      data = tables.read(table)
      rows = tables.tasks(data, table)
      for name, some in rows.items():
        tables.chosen(name, some, self.examples, self.seed)  # refused before hours are spent on other tasks
      object.__setattr__(self, 'table_sha256', hashlib.sha256(data).hexdigest())
      object.__setattr__(self, '_rows', rows)

  def units(self, inputs: 'Inputs') -> int:
    del inputs
    return len(self._tasks)

  @property
  def _tasks(self) -> list[str]:
    return list(self._rows or TASKS)

  def run(self, unit: int, judged: Judged, inputs: 'Inputs') -> Unit:
    """One task: for each kind the loss of the best column on either half, and which it is."""
    examples, name = self._examples(unit, inputs), self._tasks[unit]
    record: dict[str, Any] = {'task': name, 'train': len(examples.y_train_B), 'held_out': len(examples.y_held_out_B)}
    return Unit(record | (self._losses(examples, judged) if record['train'] else {}))

  def values(self, units: list[Unit]) -> dict[str, Value]:
    """Means over tasks. Their standard errors are over tasks, those of a text that all of them share."""
    found = [unit.record for unit in units if unit.record['train']]
    if not found:
      return {kind: Value(float('nan'), None, _NATS) for kind in _KINDS}
    losses = {name: estimate.column(found, name) for kind in _KINDS for name in (kind, f'{kind}_train')}
    values = {name: estimate.mean(loss_U, _NATS) for name, loss_U in losses.items()}
    for kind in ('pre', 'codes'):
      less_U = losses['channels'] - losses[kind]
      values[f'{kind}_below_channels'] = estimate.mean(less_U, _NATS)
      values[f'{kind}_wins'] = estimate.mean(less_U > 0, 'share of tasks')
    return values | {'tasks': Value(float(len(found)), None, 'tasks')}

  def flops(self, judged: Judged, inputs: 'Inputs') -> float:
    size, rows = judged.form.size, 2 * self.examples
    encoding = 5 * rows * 2 * size.n_latents * size.d_model  # pre-activations of one half, codes of both, and choosing
    return self.units(inputs) * (encoding + rows * (2 * size.n_latents + size.d_model) * 40 * 10)

  def _examples(self, unit: int, inputs: 'Inputs') -> 'Examples':
    from sae_jax.measures import examples

    name = self._tasks[unit]
    if self._rows:
      return examples.of_table(name, self._rows[name], self.table_sha256, inputs, self.examples, self.seed)
    return examples.of_windows(name, inputs, self.examples, self.seed)

  def _losses(self, examples: 'Examples', judged: Judged) -> dict[str, Any]:
    from sae_jax.measures import newton

    form, params = judged.form, judged.params
    # Filled up, so that all tasks share compiled programs.
    units = []
    for x_BD in (examples.x_train_BD, examples.x_held_out_BD):
      unit_BD = np.zeros((2 * self.examples, form.size.d_model), np.float32)
      unit_BD[: len(x_BD)] = form.unit(x_BD)[0]
      units.append(unit_BD)
    codes = [_Codes(form, params, unit_BD) for unit_BD in units]
    # From a half, and the first column and the last + 1: these columns.
    columns: dict[str, Callable[[int, int, int], Any]] = {
      'pre': lambda half, first, stop: _pre(form, params, units[half], first, stop),
      'codes': lambda half, first, stop: codes[half].columns(first, stop),
      'channels': lambda half, first, stop: units[half][:, first:stop],
    }
    sizes = dict(zip(_KINDS, (form.size.n_latents, form.size.n_latents, form.size.d_model), strict=True))
    found: dict[str, Any] = {}
    for kind, n in sizes.items():
      read = columns[kind]
      probes = []
      for first in range(0, n, _COLUMNS):
        one = newton.best(read(0, first, min(n, first + _COLUMNS)), examples.y_train_B, self.ridge)
        probes.append(one._replace(column=first + one.column))
      best = min(probes, key=lambda probe: probe.loss)
      for half, (name, y_B) in enumerate(((f'{kind}_train', examples.y_train_B), (kind, examples.y_held_out_B))):
        z_B = np.asarray(read(half, best.column, best.column + 1))[: len(y_B), 0]
        found[name] = newton.cross_entropy(best.weight, best.bias, z_B, y_B)
      found[f'{kind}_column'] = best.column
    return found


def _pre(form: 'Form', params: 'Params', unit_BD: np.ndarray, first: int, stop: int) -> Any:
  """Pre-activations [B, stop - first] of some latents."""
  some = {name: a[first:stop] if name.endswith(('_F', '_FD')) else a for name, a in params.items()}
  return form.pre(some, unit_BD)


@functools.cache
def _encoder(form: 'Form') -> Callable[['Params', np.ndarray], Any]:
  """Compiled once for all autoencoders of a form."""
  import jax

  return jax.jit(form.codes)


class _Codes:
  """The codes of some activations. Those that are 0 take no memory."""

  def __init__(self, form: 'Form', params: 'Params', unit_BD: np.ndarray):
    from sae_jax.codes import Sparse

    self._rows = len(unit_BD)
    n = form.size.n_latents
    batch = min(self._rows, max(8, _NUMBERS // n))
    row, latent, value = [], [], []
    for first in range(0, self._rows, batch):
      codes = _encoder(form)(params, np.asarray(unit_BD[first : first + batch]))
      z, idx = (np.asarray(a) for a in codes[:2]) if isinstance(codes, Sparse) else (np.asarray(codes.z_BF), None)
      at_B, at_K = np.nonzero(z)
      row.append(first + at_B)
      latent.append(at_K if idx is None else idx[at_B, at_K])
      value.append(z[at_B, at_K])
    latent_N = np.concatenate(latent)
    order = np.argsort(latent_N, kind='stable')
    self._latent_N, self._row_N, self._value_N = (np.concatenate(a)[order] for a in (latent, row, value))

  def columns(self, first: int, stop: int) -> np.ndarray:
    """Those of some latents, [B, stop - first]."""
    z_BC = np.zeros((self._rows, stop - first), np.float32)
    some = slice(*np.searchsorted(self._latent_N, (first, stop)))
    z_BC[self._row_N[some], self._latent_N[some] - first] = self._value_N[some]
    return z_BC
